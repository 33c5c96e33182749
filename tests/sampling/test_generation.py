"""A checkpoint that makes clips (`ldm/sampling/generator.py`): batches, guidance, precision, and what it refuses."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.errors import UserError
from ldm.sampling.generator import ClipGenerator
from ldm.sampling.settings import ClipSettings
from tests.scripts.test_txt2vid import training_config
from tests.tiny_checkpoint import video_state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("generation") / "last.ckpt"
    torch.save({"state_dict": video_state(), "config": training_config()}, path)
    return path


def test_a_sample_is_the_same_alone_and_in_a_batch(checkpoint):
    generator = ClipGenerator(checkpoint)
    generator.read_prompts(["a road", ""])
    settings = ClipSettings("a road", frames=3, height=16, width=16, fps=4, steps=3)
    batch = generator.generate(settings, [5, 6, 7])
    (alone,) = generator.generate(settings, [6])
    assert np.abs(batch[1].astype(int) - alone).max() <= 1
    assert np.abs(batch[0].astype(int) - alone).max() > 10


def test_guidance_and_negative_prompt_matter(checkpoint):
    generator = ClipGenerator(checkpoint)
    generator.read_prompts(["a road", "", "rain"])
    clips = {}
    for name, words in {"none": {"scale": 1}, "plain": {}, "negative": {"negative_prompt": "rain"}}.items():
        settings = ClipSettings("a road", **{"frames": 2, "height": 16, "width": 16, "fps": 4, "steps": 2} | words)
        clips[name] = generator.generate(settings, [1])[0]
    assert not np.array_equal(clips["none"], clips["plain"])
    assert not np.array_equal(clips["negative"], clips["plain"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_full(checkpoint, precision):
    settings = ClipSettings("a road", frames=2, height=16, width=16, fps=4, steps=2, scale=1)
    clips = []
    for name in ("full", precision):
        generator = ClipGenerator(checkpoint, precision=name)
        generator.read_prompts(["a road"])
        clips.append(generator.generate(settings, [1])[0].astype(int))
    difference = np.abs(clips[0] - clips[1])
    assert 0 < difference.max() and difference.mean() < 8


# bad input


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.params.timesteps", "x", "model.params.timesteps: expected a whole number, found 'x'"),
        ("model.params.scale_factor", 0, "model.params.scale_factor: expected a number above 0 or null, found 0"),
        ("model.params.unet_config.params", {}, "unet_config.params: ldm.modules.unet.UNetModel needs in_channels"),
        ("model.params.unet_config.params.channel_mult", 3, "channel_mult: expected a list, each a whole number"),
        ("model.params.first_stage_config.params", {}, "first_stage_config.params: .*KLFirstStage needs ddconfig"),
        ("data.params.strides", "x", "data.params.strides: expected a whole number or a list"),
        ("data.params.frames", "x", "data.params.frames: expected a whole number or null, found 'x'"),
        ("prepare.fps", "x", "prepare.fps: expected a number or null, found 'x'"),
        ("prepare.fps", -8, "prepare.fps: expected frames a second above 0, found -8"),
        (
            "model.params.noise",
            {"kind": "pink"},
            "noise.kind: expected one of independent, mixed, progressive, found 'pin",
        ),
        (
            "model.params.noise",
            {"colour": 1},
            "model.params.noise: expected the keys kind, share, offset, found 'colour'",
        ),
        (
            "model.params.noise",
            {"kind": "mixed", "share": "x"},
            "noise.share: expected a correlation from 0 to below 1",
        ),
        ("model.params.noise", "mixed", "model.params.noise: expected .*found 'mixed'"),
        ("model.params.zero_terminal_snr", 1, "model.params.zero_terminal_snr: expected true or false, found 1"),
        ("model.params.zero_terminal_snr", True, "zero_terminal_snr: expected parameterization v or x0"),
        ("model.params.parameterization", "z", "parameterization: expected one of eps, x0, v, found 'z'"),
        ("model.params.known_frames", 5, "model.params.known_frames: expected a mapping, found 5"),
        ("model.params.known_frames", {"max_noise": "x"}, "known_frames.max_noise: expected a whole number, found 'x'"),
        ("prepare.size", "x", "prepare.size: expected a number of pixels or HEIGHTxWIDTH, found 'x'"),
        ("data", 5, "data: expected a mapping, found 5"),
    ],
)
def test_a_checkpoint_with_an_odd_config_is_refused(tmp_path, path, value, message):
    config = training_config()
    *parts, last = path.split(".")
    reduce(dict.__getitem__, parts, config)[last] = value
    torch.save({"state_dict": video_state(), "config": config}, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match=message):
        ClipGenerator(tmp_path / "odd.ckpt")


def test_numbers_that_are_not_finite_are_an_error(checkpoint):
    generator = ClipGenerator(checkpoint)
    generator.read_prompts(["a road"])
    with torch.no_grad():
        generator.unet.out[2].bias.fill_(float("nan"))
    settings = ClipSettings("a road", frames=1, height=16, width=16, fps=4, steps=1, scale=1)
    with pytest.raises(UserError, match=r"latents: expected finite numbers.*--precision full"):
        generator.generate(settings, [1])


def test_a_network_with_odd_input_channels_is_refused(tmp_path):
    config = training_config()
    config["model"]["params"]["unet_config"]["params"]["in_channels"] = 5
    torch.save({"state_dict": video_state(), "config": config}, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match=r"odd.ckpt: expected a network with 4 input channels .* or 9 .*, found 5"):
        ClipGenerator(tmp_path / "odd.ckpt")
