"""The tables of a model card, and the bundled model if it has weights."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.checkpoint.layouts import BUNDLED, is_bundle
from ldm.checkpoint.writing import MAX_FILE, MAX_TOTAL
from ldm.errors import UserError
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.request import read_request
from scripts import convert
from scripts.dev.tables import fill_document, table_of
from tests.tiny_checkpoint import CONFIG, video_state

CARD = BUNDLED / "README.md"
WITH_WEIGHTS = pytest.mark.skipif(not is_bundle(BUNDLED), reason="the bundled model has no weights yet")


@pytest.fixture
def bundle(tmp_path) -> Path:
    config = copy.deepcopy(CONFIG)
    config |= {"data": {"params": {"frames": 5, "strides": [1, 3]}}, "prepare": {"fps": 12, "size": 32}}
    config["sampling"] = {"frames": 16, "steps": 9}
    torch.save({"state_dict": video_state(), "config": config}, tmp_path / "last.ckpt")
    convert.main(["--in", str(tmp_path / "last.ckpt"), "--out", str(tmp_path / "drive"), "--format", "bundle"])
    return tmp_path / "drive"


def test_the_table_of_a_bundle(bundle):
    table = table_of(bundle / "config.yaml")
    unet = sum(one.numel() for name, one in video_state().items() if name.startswith("model."))
    files = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert [line[0].strip("| `") for line in files][-1] == "unet-1.safetensors"
    counted = sum(float(line[2]) for line in files if "UNet" in line[1])
    assert counted == pytest.approx(unet / 1e6, abs=0.011)
    size = sum(path.stat().st_size for path in bundle.glob("*.safetensors"))
    assert table.splitlines()[6].endswith(f"| {size / 1e6:.1f} |")
    assert "| 5 frames | 12, 4 frames a second | 32x32 pixels | 16 | 9 |" in table
    assert "| `--frames` | `--steps` |" in table
    (bundle / "temporal.safetensors").unlink()
    with pytest.raises(UserError, match=r"temporal.safetensors: expected weights, as config.yaml says"):
        table_of(bundle / "config.yaml")


def test_the_card_takes_its_numbers_from_files(bundle):
    shutil.copy(CARD, bundle / "README.md")
    stages = {"image": {"minutes": 10, "steps": 1234, "seconds": 601.3}, "video": {"steps": 7, "seconds": 30}}
    (bundle / "training.json").write_text(json.dumps(stages))
    measure = {"title": "roadside", "places": 2}
    row = {"name": "model", "num_clips": 64, "estimates": {"roadside": {"mean": 0.876, "low": 0.8, "high": 0.9}}}
    evaluations = re.findall(r"evaluation-[\w-]+\.json", CARD.read_text())
    for name in evaluations:
        (bundle / name).write_text(json.dumps({"measures": {"roadside": measure}, "rows": [row]}))
    text = fill_document(bundle / "README.md")
    assert "| image | 1,234 | 10.0 |" in text and "| video | 7 | 0.5 |" in text
    assert text.count("| model | 64 | 0.88 (0.80 to 0.90) |") == len(evaluations) > 1 and "32x32 pixels" in text


def test_other_json_is_an_error(tmp_path):
    for results in ({}, {"image": {"steps": 3}}, [1]):
        (tmp_path / "x.json").write_text(json.dumps(results))
        with pytest.raises(UserError, match=r"x.json: expected results of .*, found other JSON"):
            table_of(tmp_path / "x.json")


@WITH_WEIGHTS
def test_the_bundled_model_is_small_and_its_card_is_up_to_date():
    sizes = [path.stat().st_size for path in BUNDLED.glob("*.safetensors")]
    assert max(sizes) < MAX_FILE and sum(sizes) < MAX_TOTAL
    assert fill_document(CARD) == CARD.read_text()


@pytest.mark.slow
@WITH_WEIGHTS
def test_the_bundled_model_follows_the_prompt():
    generator = ClipGenerator(BUNDLED)
    prompts = ("volcano fire burning scenic byway road drive", "snow scenic byway road drive")
    clips = []
    for prompt in prompts:
        settings = read_request({"prompt": prompt, "frames": 2, "window": 2, "steps": 6}, generator).settings
        assert (settings.height, settings.width) == (128, 128)
        generator.read_prompts([prompt, ""])
        clips.append(generator.generate(settings, [0])[0].astype(float))
    assert all(clip.std() > 20 for clip in clips)
    volcano, snow = (clip.mean(axis=(0, 1, 2)) for clip in clips)
    assert np.abs(volcano - snow).max() > 20 and snow[2] > volcano[2]  # the same noise: snow is bluer than fire
