"""Sampling without --ckpt: from the newest run, otherwise from the bundled model with its suggested settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ldm.errors import UserError
from ldm.sampling.record import read_record
from scripts import convert
from scripts.txt2vid import main
from tests.scripts.test_txt2vid import training_config
from tests.tiny_checkpoint import video_state

QUICK = ["--steps", "1", "--frames", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """What a training run leaves."""
    path = tmp_path_factory.mktemp("run") / "logs" / "2026-01-01T00-00-00_tiny" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": video_state(), "config": training_config()}, path)
    return path


@pytest.fixture
def bundle(checkpoint, tmp_path, monkeypatch) -> Path:
    """A project with a bundled model, below the working folder."""
    folder = tmp_path / "models" / "drive"
    words = ["--format", "bundle", "--sampling", "steps=3", "sampler=dpm++", "scale=1.5", "fps=12", "frames=7"]
    convert.main(["--in", str(checkpoint), "--out", str(folder), *words])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scripts.txt2vid.BUNDLED", folder)
    return folder


def test_without_a_run_the_bundled_model_is_taken_as_it_suggests(bundle, tmp_path, capsys):
    main(["--prompt", "a road", "--outdir", "out", "--device", "cpu"])
    assert "checkpoint: models/drive (the bundled model)" in capsys.readouterr().out
    record = read_record(tmp_path / "out" / "00000.json")
    words = ("steps", "sampler", "scale", "fps", "frames", "height", "window")
    assert [record["clip"][word] for word in words] == [3, "dpm++", 1.5, 12, 7, 32, 7]
    assert record["checkpoint"]["path"] == "models/drive"  # no path of this machine
    main(["--prompt", "a road", "--outdir", "out", "--device", "cpu", "--steps", "1", "--fps", "6", "--frames", "2"])
    clip = read_record(tmp_path / "out" / "00001.mp4")["clip"]
    assert [clip[word] for word in words] == [1, "dpm++", 1.5, 6, 2, 32, 2]
    (bundle / "README.md").write_text("a card")  # no weights: the bytes are the same again
    main(["--replay", "out/00001.mp4", "--outdir", "out"])
    assert (tmp_path / "out" / "00001.mp4").read_bytes() == (tmp_path / "out" / "00002.mp4").read_bytes()


def test_a_run_comes_before_the_bundled_model_which_is_named(bundle, tmp_path, checkpoint, capsys):
    shutil.copytree(checkpoint.parents[2], tmp_path / "logs")
    main(["--prompt", "a road", *QUICK, "--outdir", "out", "--device", "cpu"])
    found = " ".join(capsys.readouterr().out.split())
    assert "last.ckpt (the newest run; the bundled model is --ckpt models/drive)" in found
    main(["--prompt", "a road", *QUICK, "--outdir", "out", "--ckpt", "models/drive"])
    assert "checkpoint: models/drive (the bundled model)" in capsys.readouterr().out


def test_without_a_run_and_without_weights_it_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scripts.txt2vid.BUNDLED", tmp_path / "models" / "drive")
    with pytest.raises(
        UserError, match=r"no logs/\*/checkpoints/last.ckpt of .*, and no bundled model in .*models/drive; give --ckpt"
    ):
        main(["--prompt", "a road", "--device", "cpu"])
    assert not list(tmp_path.iterdir())
