"""Text alignment and I3D: what they read, their error messages, and their values in a report."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from ldm.data.world import draw_clip
from ldm.data.world.captions import look_of_prompt
from ldm.errors import UserError
from ldm.evaluation.clip_files import read_prompt
from ldm.evaluation.features import load_i3d
from ldm.evaluation.look_judge import save_style_classifier
from ldm.evaluation.metrics import MetricNeeds, MetricSet, choose_metrics
from ldm.evaluation.motion import reversed_clip
from ldm.evaluation.text_alignment import load_clip_alignment, style_alignment
from ldm.modules.frame_tower import FrameClassifier
from ldm.video import write_gif, write_mp4
from scripts import evaluate
from tests.fake_style_classifier import LOOKS, FakeStyleClassifier

SIZE = (32, 128)
FRAMES = draw_clip("snow", 5, 16, SIZE, 8, 8.0).frames
ALL = MetricNeeds(16, True, True)
WORDS = ["<|startoftext|>", "<|endoftext|>", "a</w>", "s", "n", "o", "w</w>"]


class Switched(nn.Module):
    """The form with `SWITCHES`."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert rescale and resize and return_features, "every switch is on"
        return x.mean(dim=[3, 4]).flatten(1) / 255.0


class Plain(nn.Module):
    """The form without `SWITCHES`."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.size(3) == 224 and x.size(4) == 224 and bool((x.abs() <= 1).all()), "pixels as they should be"
        return x.mean(dim=[3, 4]).flatten(1)


class NoClips(nn.Module):
    """Takes no clips."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4, "only images here"
        return x


class WrongFeatures(nn.Module):
    """Returns features of a wrong shape, or NaN."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[1, 2, 3, 4]).repeat(1, 3) / 0.0 * 0.0 if self.broken else x.mean(dim=[3, 4])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """I3D files good and bad, an untrained style classifier, and a tiny CLIP."""
    folder = tmp_path_factory.mktemp("files")
    made = {"switched": Switched(), "plain": Plain(), "stubborn": NoClips(), "shape": WrongFeatures(False)}
    for name, network in {**made, "nan": WrongFeatures(True)}.items():
        torch.jit.script(network).save(str(folder / f"{name}.pt"))
    (folder / "text.pt").write_text("not a network")
    (folder / "half.pt").write_bytes((folder / "plain.pt").read_bytes()[:500])
    torch.save({"weight": torch.ones(2)}, folder / "weights.pt")
    torch.manual_seed(0)
    save_style_classifier(folder / "judge.safetensors", FrameClassifier(len(LOOKS), (8, 16)), LOOKS, 0.5, 0.25, 1)
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(WORDS), "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
    for name, network in (("clip", clip), ("half_clip", CLIPTextModel(clip.config.text_config))):
        network.save_pretrained(folder / name)
        (folder / name / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(WORDS)}))
        (folder / name / "merges.txt").write_text("#version: 0.2\n")
    return folder


def test_text_alignment_is_the_share_of_frames_with_the_style_of_the_prompt():
    frames = np.concatenate([draw_clip(look, 3, 2, 32, 8).frames for look in ("snow", "snow", "night")])
    alignment = style_alignment(FakeStyleClassifier())
    assert alignment.read(frames, "snow scenic byway road drive, straight, fast").value == pytest.approx(4 / 6)
    assert alignment.read(frames, "mars scenic byway road drive").value == 0
    for prompt in ("a forest road", "0: snow road | 9: night road", "underwater scenic byway road drive"):
        assert alignment.read(frames, prompt).reason == "the prompt names no style of the classifier, or several"
    assert alignment.read(frames, None).reason.startswith("no prompt is known")
    assert "fake classifier, 75.0% accurate on held-out frames" in alignment.description


def test_prompts_are_read_from_metadata_and_text_files(tmp_path):
    write_mp4(tmp_path / "ours.mp4", FRAMES[:2], 8, {"clip": {"prompt": "a snowy road"}, "seed": 1})
    write_mp4(tmp_path / "world.mp4", FRAMES[:2], 8, {"prompt": "a night road"})
    write_mp4(tmp_path / "footage.mp4", FRAMES[:2], 8)
    write_mp4(tmp_path / "odd.mp4", FRAMES[:2], 8, {"clip": "two", "prompt": 3})
    write_gif(tmp_path / "beside.gif", FRAMES[:2], 8)
    (tmp_path / "beside.txt").write_text("a desert road\nanother caption\n")
    found = {path.stem: read_prompt(path) for path in tmp_path.glob("*.[mg]*")}
    assert found == {
        "ours": "a snowy road", "world": "a night road", "footage": None, "odd": None, "beside": "a desert road",
    }  # fmt: skip


def test_both_kinds_of_i3d(files, caplog):
    with caplog.at_level(logging.INFO):
        switched, plain = load_i3d(files / "switched.pt"), load_i3d(files / "plain.pt")
    colours = FRAMES.mean(axis=(1, 2)).T.reshape(1, -1) / 255
    np.testing.assert_allclose(switched.extract(FRAMES, None), colours, atol=1e-5)
    longer = np.concatenate([FRAMES, FRAMES[:4]])
    np.testing.assert_allclose(switched.extract(longer, None), colours, atol=1e-5)
    np.testing.assert_allclose(plain.extract(FRAMES, None), colours * 2 - 1, atol=0.01)
    assert "rescaling and resizing itself, 48 features" in switched.name
    assert "given 224x224 pixels in [-1, 1], 48 features" in plain.name
    sha256 = caplog.messages[0].split("sha256 ")[1][:64]
    assert len(sha256) == 64 and sha256[:12] in switched.name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere.pt: expected a TorchScript file with an I3D network .*found no such file"),
        ("text", r"text.pt: expected an I3D network as TorchScript, found a file that torch.jit.load cannot read"),
        ("half", r"half.pt: expected an I3D network as TorchScript, found .*; fetch it again"),
        ("weights", r"weights.pt: expected an I3D network as TorchScript, found .*constants.pkl"),
        ("stubborn", r"stubborn.pt: expected a network that takes clips `b 3 16 h w`, found .*only images here"),
        ("shape", r"shape.pt: expected features `b d` of a clip, found \[1, 3, 16\]; give an I3D"),
        ("nan", "nan.pt: expected finite features, found NaN or infinity; fetch the file again"),
    ],
)
def test_files_that_are_no_i3d_are_errors(files, name, message):
    with pytest.raises(UserError, match=message):
        load_i3d(files / f"{name}.pt")


def test_clip_reads_words_and_frames(files):
    alignment = load_clip_alignment(files / "clip")
    found = {prompt: alignment.read(FRAMES[:2], prompt).value for prompt in ("a snow", "snow a a", "snow " * 40)}
    assert len(set(found.values())) == 3
    assert all(-1 <= value <= 1 for value in found.values())
    singly = [alignment.read(FRAMES[place : place + 1], "a snow").value for place in (0, 1)]
    assert found["a snow"] == pytest.approx(np.mean(singly), abs=1e-5)
    assert alignment.read(FRAMES, None).reason.startswith("no prompt is known")


def test_colours_are_scaled_as_the_folder_says(files, tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for path in (files / "clip").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    usual = load_clip_alignment(folder).read(FRAMES[:1], "a snow").value
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    assert load_clip_alignment(folder).read(FRAMES[:1], "a snow").value != usual
    for content in ('{"image_mean": [0, 0], "image_std": [1, 1, 1]}', "{", "[]"):
        (folder / "preprocessor_config.json").write_text(content)
        with pytest.raises(UserError, match=r"preprocessor_config.json: expected image_mean and image_std, three"):
            load_clip_alignment(folder)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"clip: expected a CLIP folder .* found one that cannot be loaded"):
        load_clip_alignment(folder)


def test_folders_that_are_no_clip(files, tmp_path):
    with pytest.raises(UserError, match=r"found no config.json, vocab.json, merges.txt; write one with"):
        load_clip_alignment(tmp_path)
    with pytest.raises(UserError, match=r"half_clip: expected all weights of CLIP, found .* alone is not"):
        load_clip_alignment(files / "half_clip")


@pytest.mark.parametrize(
    ("needs", "options", "message"),
    [
        (MetricNeeds(5, True, True), {"i3d": "plain.pt"}, "--i3d: expected clips of at least 16 frames, found 5; make"),
        (MetricNeeds(16, False, True), {"i3d": "plain.pt"}, "--i3d: expected true clips, found none; give them with"),
        (MetricNeeds(16, True, False), {"clip": "clip"}, "--clip-model: expected clips with prompts, found none"),
        (
            ALL,
            {"classifier": "nowhere.safetensors"},
            "nowhere.safetensors: expected a style classifier, found no",
        ),
        (ALL, {"classifier": "plain.pt"}, "plain.pt: expected a style classifier as .safetensors"),
    ],
)
def test_metrics_that_cannot_be_used_are_errors(files, needs, options, message):
    words = {"classifier": files / "judge.safetensors", "clip": None, "i3d": None}
    with pytest.raises(UserError, match=message):
        choose_metrics(**{**words, **{name: files / file for name, file in options.items()}}, needs=needs)


def test_metrics_follow_from_clips_and_files(files, monkeypatch):
    path = files / "judge.safetensors"
    everything = choose_metrics(path, None, files / "plain.pt", ALL)
    assert list(everything.extractors) == ["frechet_frames", "frechet_clips", "frechet_motion", "fvd"]
    assert "text_agreement" in everything.measures
    assert any("50.0% accurate on held-out frames" in line for line in everything.descriptions)
    assert "CLIP in" in choose_metrics(path, files / "clip", None, ALL).descriptions[0]
    alone = choose_metrics(path, None, None, MetricNeeds(5, False, False))
    assert (alone.text_alignment, dict(alone.extractors)) == (None, {})
    assert [line.partition(":")[0] for line in alone.descriptions] == ["no text alignment", "no Frechet distances"]
    monkeypatch.setattr("ldm.evaluation.metrics.BUNDLED_CLASSIFIER", files / "nowhere.safetensors")
    without = choose_metrics(None, None, None, ALL)
    assert list(without.extractors) == ["frechet_motion"]
    assert without.descriptions[0].startswith("no style classifier (nowhere.safetensors): no text alignment")


@pytest.mark.parametrize("colour", [0, 90])
def test_a_clip_without_texture_has_no_values_and_no_features(files, colour):
    metrics = choose_metrics(files / "judge.safetensors", None, files / "plain.pt", ALL)
    seen = metrics.measure(np.full((16, *SIZE, 3), colour, np.uint8), "a snowy road")
    assert set(seen.readings) == set(metrics.measures)
    assert all(reading.value is None and "black, constant" in reading.reason for reading in seen.readings.values())
    assert set(seen.features.values()) == {None} and len(seen.features) == 4


def test_measures_of_motion_need_no_files():
    assert set(MetricSet().measure(FRAMES[:3], None).readings) == set(MetricSet().measures)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """True clips with captions beside them, and clips with prompts inside, one of them black."""
    folder = tmp_path_factory.mktemp("clips")
    for name in ("true", "made"):
        (folder / name).mkdir()
    for number in range(4):
        clip = draw_clip(LOOKS[number % 3], number, 16, SIZE, 8, 8.0)
        write_mp4(folder / "true" / f"{number}.mp4", clip.frames, 8)
        (folder / "true" / f"{number}.txt").write_text("\n".join(clip.captions))
    for number in range(3):
        clip = draw_clip(LOOKS[number], 10 + number, 16, SIZE, 8, 8.0)
        frames = clip.frames if number else np.zeros_like(clip.frames)
        write_mp4(folder / "made" / f"{number}.mp4", frames, 8, {"clip": {"prompt": clip.captions[0]}})
    return folder


@pytest.mark.slow
def test_a_report_with_all_metrics(clips, files, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(clips)
    monkeypatch.setattr("ldm.evaluation.metrics.load_style_classifier", lambda path: FakeStyleClassifier())
    monkeypatch.setattr(evaluate, "CONTROLS", {"reversed": reversed_clip})
    monkeypatch.setattr(evaluate, "NUM_SHOWN", 1)
    named = ["--judge", str(files / "judge.safetensors"), "--i3d", str(files / "switched.pt"), "--trust-i3d"]
    evaluate.main(["made", "--reference", "true", *named, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "report.json").read_text())
    true, made = (next(row for row in summary["rows"] if row["name"] == name) for name in ("true", "made"))
    assert true["estimates"]["text_agreement"]["mean"] > 0.7
    assert made["estimates"]["text_agreement"]["num_clips"] == 2
    assert "black, constant" in next(iter(made["not_judged"]["text_agreement"]))
    assert look_of_prompt(made["clips"][1]["prompt"]) == "night"
    assert list(summary["distances"]) == ["frechet_frames", "frechet_clips", "frechet_motion", "fvd"]
    assert summary["distances"]["fvd"]["name"].startswith("I3D switched.pt, sha256 ")
    backwards = next(row for row in summary["rows"] if row["name"] == "reversed")
    assert backwards["distances"]["frechet_frames"]["mean"] == pytest.approx(0, abs=1e-6)
    assert backwards["distances"]["frechet_motion"]["mean"] > 10
    for name in summary["distances"]:
        assert made["distances"][name]["mean"] > 0
        assert (made["distances"][name]["num_clips"], made["distances"][name]["num_unjudged"]) == (2, 1)
        assert true["distances"][name]["num_clips"] == 2
    assert "true: half against half" in printed
    assert "text alignment by fake classifier, 75.0% accurate on held-out frames" in printed
    assert "are biased upwards, as all below 2,000 clips" in printed
    assert "made: 1 of 3 clips left out of the Frechet distances: the picture is black, constant" in printed
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == len(summary["measures"]) + len(summary["distances"])
    assert f"<figcaption>{made['clips'][0]['prompt']}</figcaption>" in page
    assert "Frechet distances from the true clips" in page
    assert "I3D switched.pt" in page


def test_clip_in_a_report(clips, files, capsys, tmp_path):
    videos = [str(clips / "made"), "--clip-model", str(files / "clip"), "--judge", str(files / "judge.safetensors")]
    evaluate.main([*videos, "--frames", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"text alignment by CLIP in {files / 'clip'}" in printed
    assert "no Frechet distances: they need true clips; give them with --reference" in printed
    row = json.loads((tmp_path / "report.json").read_text())["rows"][0]
    assert (row["distances"], row["estimates"]["text_agreement"]["num_clips"]) == ({}, 16)
