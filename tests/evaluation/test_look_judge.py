"""The style classifier: training, its file with its accuracy, and the augmentation of its frames."""

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
from ldm.models.augmentation import KINDS, corrupt_frames, quantise
from ldm.models.look_classifier import JudgeWriter, LookClassifier
from ldm.modules.frame_tower import FrameClassifier

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "drive" / "judge.yaml"
FEW = ["snow", "night", "mars", "coast"]


def make_frames(num: int = 4, size: int = 64) -> torch.Tensor:
    data = DriveFrameDataModule(looks=FEW, size=size, val_frames=num)
    return torch.cat([data.val_frames[position].pixels for position in range(num)])


def write_classifier(path: Path, looks: list[str] | None = None) -> Path:
    torch.manual_seed(0)
    looks = looks or ["day", "night"]
    save_style_classifier(path, FrameClassifier(len(looks), (8, 16)), looks, 0.75, 0.5, 12)
    return path


# training


@pytest.mark.slow
def test_a_few_steps_train_a_classifier_and_its_file_records_the_accuracy(tmp_path):
    torch.manual_seed(0)
    data = DriveFrameDataModule(looks=FEW, size=16, batch_size=4, val_frames=16)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    quiet |= {"logger": False, "num_sanity_val_steps": 0, "default_root_dir": tmp_path}
    writer = JudgeWriter(tmp_path)
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=40, val_check_interval=40, callbacks=[writer], **quiet)
    trainer.fit(model := LookClassifier(learning_rate=3e-3, warmup_steps=2, cooldown_steps=20), data)
    classifier = load_style_classifier(writer.path)
    assert classifier.accuracy > 0.8 and classifier.steps == 40 and classifier.looks == LOOKS
    assert 0.3 < classifier.accuracy_damaged <= 1
    frames = [draw_clip(FEW[number % 4], 10**9 + number, 1, 16, 8).frames for number in range(16)]
    answers = classifier.predict(np.concatenate(frames))
    assert np.mean([classifier.looks[answer] == FEW[number % 4] for number, answer in enumerate(answers)]) > 0.7
    assert torch.allclose(classifier.network.head.weight, model.network.head.weight, atol=1e-3)


def test_training_is_repeatable_and_uses_corrupted_frames():
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


def test_batches_without_styles_are_an_error():
    with pytest.raises(UserError, match=r"frames with looks, found FrameBatch; use .*DriveFrameDataModule"):
        LookClassifier().training_step(FrameBatch(torch.zeros(2, 3, 16, 16), [0, 1], rates=[1, 1]), 0)


def test_a_share_out_of_range_is_an_error():
    with pytest.raises(UserError, match="damaged: expected a share, 0 to 1, found -1"):
        LookClassifier(damaged=-1)


def test_a_cooldown_longer_than_the_run_is_an_error(tmp_path):
    trainer = pl.Trainer(accelerator="cpu", max_steps=5, logger=False, enable_checkpointing=False, barebones=True)
    data = DriveFrameDataModule(looks=FEW, size=16, batch_size=4)
    with pytest.raises(UserError, match=r"cooldown_steps: expected at most .* found 6 with max_steps 5"):
        trainer.fit(LookClassifier(cooldown_steps=6), data)


# augmentation


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_kind_of_corruption_keeps_frames_recognisable(kind):
    pixels = make_frames()
    corrupted = torch.cat([kind(pixels[index : index + 1], np.random.default_rng(index)) for index in range(4)])
    assert corrupted.shape == pixels.shape and not torch.equal(corrupted, pixels)
    assert torch.equal(kind(pixels[:1], np.random.default_rng(0)), corrupted[:1])
    for index in range(4):  # of all four frames it is still most like its own
        distances = (corrupted[index] - pixels).square().mean((1, 2, 3))
        assert distances.argmin() == index


def test_corruption_depends_on_the_seed_of_each_frame_and_hits_a_share_of_them():
    pixels, seeds = make_frames(), [(3, index) for index in range(4)]
    corrupted = corrupt_frames(pixels, seeds)
    assert torch.equal(corrupt_frames(pixels[2:], seeds[2:]), corrupted[2:])
    assert corrupted.abs().max() <= 1 and not torch.equal(corrupt_frames(pixels, [(4, 0)] * 4), corrupted)
    assert torch.equal(corrupt_frames(pixels, seeds, share=0.0), pixels)
    same = pixels[:1].expand(200, -1, -1, -1)
    met = corrupt_frames(same, [(5, index) for index in range(200)], share=0.5)
    assert 0.35 < (met != same).flatten(1).any(1).float().mean() < 0.6


def test_quantised_blocks_have_few_different_coefficients():
    flat = torch.full((1, 3, 16, 16), 0.4)
    rounded = quantise(flat, np.random.default_rng(0))
    assert (rounded - rounded[..., :1, :1]).abs().max() < 1e-5  # a flat block stays flat
    random = torch.rand(1, 3, 16, 16) * 2 - 1
    assert (quantise(random, np.random.default_rng(1)) - random).abs().mean() > 0.01


# files


def test_a_file_round_trip(tmp_path):
    classifier = load_style_classifier(path := write_classifier(tmp_path / "small.safetensors"))
    assert (classifier.looks, classifier.accuracy, classifier.accuracy_damaged, classifier.steps) == (
        ("day", "night"),
        0.75,
        0.5,
        12,
    )
    assert classifier.name.startswith("small ") and len(classifier.name) == len("small ") + 8
    assert path.read_bytes() == write_classifier(tmp_path / "again.safetensors").read_bytes()
    frames = np.random.default_rng(0).integers(0, 256, (130, 24, 40, 3)).astype(np.uint8)
    features, answers = classifier.features(frames), classifier.predict(frames)
    assert features.shape == (130, 16) and features.dtype == np.float32 and answers.dtype == np.int64
    assert np.allclose(classifier.features(frames[128:]), features[128:], atol=1e-5)
    scores = classifier.network(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert scores.argmax(1).tolist() == answers.tolist()


@pytest.mark.parametrize(("shape", "kind"), [((0, 8, 8, 3), np.uint8), ((2, 8, 8, 3), float), ((8, 8, 3), np.uint8)])
def test_other_arrays_than_frames_are_an_error(tmp_path, shape, kind):
    with pytest.raises(UserError, match="style classifier: expected frames, uint8 t h w 3, found"):
        load_style_classifier(write_classifier(tmp_path / "small.safetensors")).predict(np.zeros(shape, kind))


def test_other_files_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"none.safetensors: expected a style classifier, found no such file"):
        load_style_classifier(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("a page of the web")
    with pytest.raises(UserError, match=r"expected a style classifier as .safetensors, found another file"):
        load_style_classifier(tmp_path / "text")
    save_file({"weight": torch.zeros(2)}, path := tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"found a .safetensors file of something else"):
        load_style_classifier(path)
    words = {"looks": ["a"], "accuracy": 1, "accuracy_damaged": 1, "steps": 1, "widths": [8, 16]}
    for kept in (words, {"looks": ["a"]}, {}):
        save_file({"weight": torch.zeros(2)}, path, {METADATA_KEY: json.dumps(kept)})
        with pytest.raises(UserError, match="tensors and metadata do not match"):
            load_style_classifier(path)
