"""What the trainer's flags mean: which cards, how many processes, which precision."""

from __future__ import annotations

import pytest
import torch

from ldm.config import load_config
from ldm.errors import UserError
from ldm.runs.arguments import num_devices, parse_arguments, trainer_arguments, with_trainer_flags


def devices(*arguments, **trainer):
    options = parse_arguments(["-b", "x", *arguments])
    config = load_config([], [f"lightning.trainer.{name}={value}" for name, value in trainer.items()])
    return trainer_arguments(with_trainer_flags(config, options.trainer))


def test_gpus_as_in_compvis(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices() == {"accelerator": "auto", "devices": 1}
    for flag, expected in {"0,": [0], "1,": [1], "0,1": [0, 1], "2": 2, "-1": -1}.items():
        assert devices("--gpus", flag) == {"accelerator": "gpu", "devices": expected}, flag
    assert devices("--gpus=0") == {"accelerator": "cpu", "devices": 1}
    assert devices("--gpus", "0,", accelerator="cpu") == {"accelerator": "gpu", "devices": [0]}
    assert devices("--accelerator", "cpu", gpus=2) == {"accelerator": "cpu", "devices": 1}
    assert devices(gpus=2) == {"accelerator": "gpu", "devices": 2}
    assert devices("--devices", "2")["devices"] == 2
    assert [num_devices(devices("--gpus", flag)) for flag in ("0,1", "1,", "2", "-1", "0")] == [2, 1, 2, 2, 1]
    flags = ("auto", "0,1", "0,", "-1", "2")
    assert [num_devices(devices("--devices", flag)) for flag in flags] == [2, 2, 1, 2, 2]
    assert num_devices(devices("--accelerator", "cpu", "--devices", "auto")) == 1


def test_precisions_under_all_their_names():
    names = {"32": "32-true", "32-true": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "bf16-mixed": "bf16-mixed"}
    assert {name: devices("--precision", name)["precision"] for name in names} == names


def test_missing_gpus_are_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = r"--gpus 0,: expected 1 GPU, found 0: .* Give --accelerator cpu to train on the CPU"
    with pytest.raises(UserError, match=message):
        devices("--gpus", "0,")
    with pytest.raises(UserError, match="accelerator gpu: expected 1 GPU, found 0"):
        devices("--accelerator", "gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--gpus 0,1: expected 2 GPUs, found 1"):
        devices("--gpus", "0,1")
    with pytest.raises(UserError, match="--gpus 4: expected 4 GPUs, found 1"):
        devices("--gpus", "4")


def test_error_says_why_no_gpu_is_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    with pytest.raises(UserError, match=r"this PyTorch \(.*\) is built without CUDA"):
        devices("--gpus", "0,")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match=r"PyTorch sees 0 \(CUDA_VISIBLE_DEVICES=7\)"):
        devices("--gpus", "0,")
