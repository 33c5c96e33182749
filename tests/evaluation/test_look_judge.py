"""The judge of looks: it learns, keeps what it can do in its file, and sees through damage that frames have taken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file

from ldm.config import build, check, load_config, to_container
from ldm.data.frames import FrameBatch
from ldm.data.world import LOOKS, draw_clip
from ldm.data.world.frames import DriveFrameDataModule
from ldm.errors import UserError
from ldm.evaluation.look_judge import METADATA_KEY, load_style_classifier, save_style_classifier
from ldm.models.augmentation import KINDS, damage_frames, quantise
from ldm.models.look_classifier import JudgeWriter, LookClassifier
from ldm.modules.frame_tower import FrameClassifier

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "drive" / "judge.yaml"
FEW = ["snow", "night", "mars", "coast"]


def make_frames(num: int = 4, size: int = 64) -> torch.Tensor:
    data = DriveFrameDataModule(looks=FEW, size=size, val_frames=num)
    return torch.cat([data.val_frames[position].pixels for position in range(num)])


def fake_style_classifier(path: Path, looks: list[str] | None = None) -> Path:
    torch.manual_seed(0)
    looks = looks or ["day", "night"]
    save_style_classifier(path, FrameClassifier(len(looks), (8, 16)), looks, 0.75, 0.5, 12)
    return path


# training


def test_a_few_steps_tell_looks_apart_and_the_file_says_how_well(tmp_path):
    torch.manual_seed(0)
    data = DriveFrameDataModule(looks=FEW, size=16, batch_size=4, val_frames=16)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    quiet |= {"logger": False, "num_sanity_val_steps": 0, "default_root_dir": tmp_path}
    writer = JudgeWriter(tmp_path)
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=40, val_check_interval=40, callbacks=[writer], **quiet)
    trainer.fit(model := LookClassifier(learning_rate=3e-3, warmup_steps=2, cooldown_steps=20), data)
    judge = load_style_classifier(writer.path)
    assert judge.accuracy > 0.8 and judge.steps == 40 and judge.looks == LOOKS
    assert 0.3 < judge.accuracy_damaged <= 1
    frames = [draw_clip(FEW[number % 4], 10**9 + number, 1, 16, 8).frames for number in range(16)]
    answers = judge.predict(np.concatenate(frames))
    assert np.mean([judge.looks[answer] == FEW[number % 4] for number, answer in enumerate(answers)]) > 0.7
    assert torch.allclose(judge.network.head.weight, model.network.head.weight, atol=1e-3)


def test_training_repeats_itself_and_most_frames_are_damaged():
    batch = DriveFrameDataModule(looks=FEW, size=16, batch_size=4).train_frames[0]
    model = LookClassifier(damaged=1.0)
    model.log = lambda *words, **more: None
    loss = model.training_step(batch, 0)
    assert torch.equal(loss, model.training_step(batch, 0))
    model.damaged = 0.0
    assert not torch.equal(loss, clean := model.training_step(batch, 0))
    assert clean.item() == pytest.approx(torch.nn.functional.cross_entropy(model(batch.pixels), batch.looks).item())


def test_the_config_builds_and_every_key_is_read():
    config = load_config([CONFIG], [])
    check(config)
    words = to_container(config)["model"]
    model = build({"target": words["target"], "params": words["params"]}, "model")
    assert sum(weight.numel() for weight in model.parameters()) < 600_000


def test_what_has_no_looks_is_refused():
    with pytest.raises(UserError, match=r"frames with looks, found FrameBatch; use .*DriveFrameDataModule"):
        LookClassifier().training_step(FrameBatch(torch.zeros(2, 3, 16, 16), [0, 1], rates=[1, 1]), 0)


def test_a_share_of_damage_out_of_range_is_refused():
    with pytest.raises(UserError, match="damaged: expected a share, 0 to 1, found -1"):
        LookClassifier(damaged=-1)


def test_a_cooldown_longer_than_the_run_is_refused(tmp_path):
    trainer = pl.Trainer(accelerator="cpu", max_steps=5, logger=False, enable_checkpointing=False, barebones=True)
    data = DriveFrameDataModule(looks=FEW, size=16, batch_size=4)
    with pytest.raises(UserError, match=r"cooldown_steps: expected at most .* found 6 with max_steps 5"):
        trainer.fit(LookClassifier(cooldown_steps=6), data)


# damage


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_kind_of_damage_changes_frames_but_not_what_they_show(kind):
    pixels = make_frames()
    spoilt = torch.cat([kind(pixels[place : place + 1], np.random.default_rng(place)) for place in range(4)])
    assert spoilt.shape == pixels.shape and not torch.equal(spoilt, pixels)
    assert torch.equal(kind(pixels[:1], np.random.default_rng(0)), spoilt[:1])
    for place in range(4):  # of all four frames it is still most like its own
        distances = (spoilt[place] - pixels).square().mean((1, 2, 3))
        assert distances.argmin() == place


def test_damage_depends_on_the_seed_of_each_frame_and_meets_a_share_of_them():
    pixels, seeds = make_frames(), [(3, place) for place in range(4)]
    spoilt = damage_frames(pixels, seeds)
    assert torch.equal(damage_frames(pixels[2:], seeds[2:]), spoilt[2:])
    assert spoilt.abs().max() <= 1 and not torch.equal(damage_frames(pixels, [(4, 0)] * 4), spoilt)
    assert torch.equal(damage_frames(pixels, seeds, share=0.0), pixels)
    same = pixels[:1].expand(200, -1, -1, -1)
    met = damage_frames(same, [(5, place) for place in range(200)], share=0.5)
    assert 0.35 < (met != same).flatten(1).any(1).float().mean() < 0.6


def test_quantised_blocks_have_few_different_coefficients():
    flat = torch.full((1, 3, 16, 16), 0.4)
    rounded = quantise(flat, np.random.default_rng(0))
    assert (rounded - rounded[..., :1, :1]).abs().max() < 1e-5  # a flat block stays flat
    random = torch.rand(1, 3, 16, 16) * 2 - 1
    assert (quantise(random, np.random.default_rng(1)) - random).abs().mean() > 0.01


# files


def test_a_file_gives_the_judge_back(tmp_path):
    judge = load_style_classifier(path := fake_style_classifier(tmp_path / "small.safetensors"))
    assert (judge.looks, judge.accuracy, judge.accuracy_damaged, judge.steps) == (("day", "night"), 0.75, 0.5, 12)
    assert judge.name.startswith("small ") and len(judge.name) == len("small ") + 8
    assert path.read_bytes() == fake_style_classifier(tmp_path / "again.safetensors").read_bytes()
    frames = np.random.default_rng(0).integers(0, 256, (130, 24, 40, 3)).astype(np.uint8)
    features, answers = judge.features(frames), judge.predict(frames)
    assert features.shape == (130, 16) and features.dtype == np.float32 and answers.dtype == np.int64
    assert np.allclose(judge.features(frames[128:]), features[128:], atol=1e-5)
    scores = judge.network(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert scores.argmax(1).tolist() == answers.tolist()


@pytest.mark.parametrize(("shape", "kind"), [((0, 8, 8, 3), np.uint8), ((2, 8, 8, 3), float), ((8, 8, 3), np.uint8)])
def test_what_are_no_frames_is_refused(tmp_path, shape, kind):
    with pytest.raises(UserError, match="judge: expected frames, uint8 t h w 3, found"):
        load_style_classifier(fake_style_classifier(tmp_path / "small.safetensors")).predict(np.zeros(shape, kind))


def test_files_that_are_no_judge_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"none.safetensors: expected a judge of looks, found no such file"):
        load_style_classifier(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("a page of the web")
    with pytest.raises(UserError, match=r"expected a judge of looks in a .safetensors file, found another"):
        load_style_classifier(tmp_path / "text")
    save_file({"weight": torch.zeros(2)}, path := tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"found a .safetensors file of something else"):
        load_style_classifier(path)
    words = {"looks": ["a"], "accuracy": 1, "accuracy_damaged": 1, "steps": 1, "widths": [8, 16]}
    for kept in (words, {"looks": ["a"]}, {}):
        save_file({"weight": torch.zeros(2)}, path, {METADATA_KEY: json.dumps(kept)})
        with pytest.raises(UserError, match="tensors or words do not fit together"):
            load_style_classifier(path)
