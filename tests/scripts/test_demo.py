"""The demo: the bundled model, training from scratch with a few steps, and other files in its folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main as training
from ldm.errors import UserError
from ldm.video import read_metadata, read_video
from scripts import convert, demo, prepare, txt2vid
from tests.tiny_checkpoint import CONFIG, video_state

ROOT = Path(__file__).parents[2]
MAINS = {"main.py": training.main, "scripts/prepare.py": prepare.main, "scripts/txt2vid.py": txt2vid.main}
FEW_STEPS = demo.DemoSettings(size=64, footage_frames=60, autoencoder_steps=2, video_steps=2, sampler_steps=2)


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.slow
def test_train_and_sample(tmp_path, in_root):
    run = []

    def run_here(words):
        run.append(words[0])
        MAINS[words[0]](words[1:])

    film, animation, sheet = demo.train_and_sample(tmp_path, FEW_STEPS, run_here)
    assert run == ["main.py", "scripts/prepare.py", "main.py", "scripts/txt2vid.py"]
    frames, fps = read_video(film)
    assert frames.shape == (6, 64, 64, 3)
    assert fps == 10
    assert read_metadata(film)["clip"]["prompt"] == demo.PROMPT
    with Image.open(animation) as picture:
        assert (picture.format, picture.size, picture.n_frames) == ("GIF", (64, 64), 6)
    with Image.open(sheet) as picture:
        assert picture.format == "PNG"
        assert picture.width > 6 * 64
        assert np.asarray(picture.convert("RGB")).std() > 1
    assert (tmp_path / "prepared" / "preview.png").is_file()


def test_a_command_is_printed_logged_and_run(tmp_path, capfd):
    script = tmp_path / "works.py"
    script.write_text("import os; print('in', os.getcwd())")
    demo.run_and_time([str(script), "two words"], tmp_path / "log")
    printed = capfd.readouterr().out.strip().splitlines()
    assert printed[0] == f"$ {demo.shown(Path(sys.executable))} {script} 'two words'"
    assert printed[1] == f"in {ROOT}"
    assert re.fullmatch(rf"{re.escape(str(script))}: \d s", printed[2])
    assert (tmp_path / "log").read_text() == printed[0].removeprefix("$ ") + "\n"


def test_a_failing_command_is_an_error(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match=r"fails.py ended with status 3; see its message above"):
        demo.run_and_time([str(script)], tmp_path / "log")


def test_a_run_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(UserError, match="expected a checkpoint of the run 'video', found none"):
        demo.train_and_sample(tmp_path, FEW_STEPS, lambda words: leave_checkpoint(tmp_path, words, "autoencoder"))


def leave_checkpoint(folder: Path, words: list[str], name: str) -> None:
    if name in words:
        checkpoint = folder / "logs" / f"2026-01-01T00-00-00_{name}" / "checkpoints" / "last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()


def test_the_folder_of_an_earlier_demo_is_cleared(tmp_path):
    folder = tmp_path / "deep" / "demo"
    demo.fresh_folder(folder)
    (folder / demo.COMMANDS).touch()
    (folder / "clips").mkdir()
    demo.fresh_folder(folder)
    assert list(folder.iterdir()) == []


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"expected a new folder or that of an earlier demo .* choose another"):
        demo.main(["--out", str(tmp_path)])
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(UserError, match="expected a folder, found a file of that name"):
        demo.main(["--out", str(tmp_path / "demo")])


@pytest.mark.slow
def test_the_command_explains_itself():
    command = [sys.executable, "scripts/demo.py", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "default: outputs/demo, and outputs/demo-train with --train" in " ".join(shown.split())


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A tiny bundled model."""
    config = {**CONFIG, "prepare": {"fps": 8, "size": [16, 24]}, "sampling": {"frames": 10, "steps": 1, "scale": 1.0}}
    torch.save({"state_dict": video_state(), "config": config}, tmp_path / "last.ckpt")
    convert.main(["--in", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "drive"), "--format", "bundle"])
    return tmp_path / "drive"


def test_the_bundled_model_samples_three_prompts(bundle, tmp_path, in_root):
    run = []

    def run_here(words):
        run.append(words[0])
        MAINS[words[0]]([*words[1:], "--device", "cpu"])

    (tmp_path / "demo").mkdir()
    sheet, *films = demo.sample_bundled(tmp_path / "demo", bundle, run_here)
    assert run == ["scripts/txt2vid.py"]
    prompts = [read_metadata(film)["clip"]["prompt"] for film in films]
    assert [prompt.split()[0] for prompt in prompts] == ["cyberpunk", "volcano", "summer"]
    assert all(prompt.endswith("scenic byway road drive") for prompt in prompts)
    assert read_video(films[0])[0].shape == (10, 16, 24, 3)
    with Image.open(sheet) as picture:
        assert 8 * 24 < picture.width < 10 * 24 + 50 and picture.height > 3 * 16
        assert np.asarray(picture.convert("RGB")).std() > 1


def test_a_missing_bundle_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"drive: expected the bundled model, found no config.yaml .* `make demo-tra"):
        demo.sample_bundled(tmp_path, tmp_path / "drive", None)


@pytest.mark.parametrize(("words", "made"), [([], "bundled"), (["--train"], "trained")])
def test_the_option_train_selects_the_demo(tmp_path, monkeypatch, capsys, words, made):
    monkeypatch.setattr(demo, "sample_bundled", lambda folder, bundle, run: [folder / "bundled"])
    monkeypatch.setattr(demo, "train_and_sample", lambda folder, settings, run: [folder / "trained"])
    monkeypatch.chdir(ROOT)
    demo.main(["--out", str(tmp_path / "demo"), *words])
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "demo" / made))
