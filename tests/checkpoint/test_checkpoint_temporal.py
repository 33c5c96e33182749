"""Temporal layers alone: what such a file holds, and image models it is put into."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from ldm.checkpoint import CheckpointError, identity, load_unet, read_checkpoint, unet_tensors
from ldm.checkpoint.encoders import opened
from ldm.checkpoint.names import UNET_PREFIX, average_names
from ldm.checkpoint.temporal import BASE_IDENTITY, base_identity, load_with_temporal, temporal_part
from ldm.checkpoint.writing import write_full, write_temporal
from ldm.config import ConfigError
from ldm.errors import UserError
from ldm.modules.unet import UNetModel
from ldm.sampling.generator import ClipGenerator, ClipSettings
from tests.checkpoint.test_checkpoint_known import inpainting_state
from tests.conftest import fill_by_rule
from tests.tiny_checkpoint import (
    CONFIG,
    UNET,
    assert_same,
    image_state,
    image_weights,
    part,
    video_state,
    write_bare,
    write_safetensors,
)

TOLD = {"in_channels": 9, "fps_embedding": True, "known_level_embedding": True, "temporal_attention": {"local": 3}}
NOISE = {"kind": "mixed", "share": 0.5}
SCHEDULE = {"timesteps": 500, "parameterization": "v", "zero_terminal_snr": True, "noise": NOISE}
CLIPS = {"data": {"params": {"frames": 7, "strides": [1, 2]}}, "prepare": {"fps": 12.5, "size": [16, 16]}}


def config_of(words=None, **params):
    config = copy.deepcopy(CONFIG) | copy.deepcopy(CLIPS)
    config["model"]["params"] |= params
    config["model"]["params"]["unet_config"]["params"] = UNET | (words or {})
    return config


def trained(path, words=None, averages=False, **params):
    """A checkpoint of a run: the tiny image model, and temporal layers far from their start."""
    shapes = {UNET_PREFIX + name: one.shape for name, one in UNetModel(**UNET | (words or {})).state_dict().items()}
    state = fill_by_rule(shapes) | image_state()
    if averages:
        names = average_names(part(state, UNET_PREFIX))
        state |= {names[name]: one + 1 for name, one in part(state, UNET_PREFIX).items() if ".temporal." in name}
    torch.save({"state_dict": state, "config": config_of(words, **params)}, path)
    return path


def written(checkpoint, path):
    """The checkpoint, or that of a path, as one file of everything, read again."""
    write_full(opened(checkpoint), path)
    return read_checkpoint(path)


def fine_tune(path, seed, config=None):
    """The tiny image model with every weight of its UNet moved at random."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: one + 0.05 * torch.randn(one.shape, generator=generator) if name.startswith(UNET_PREFIX) else one
        for name, one in image_state().items()
    }
    torch.save({"state_dict": state, "config": config or config_of()}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`last.ckpt` of a run, `motion.safetensors` made of it, and `one.ckpt`, `two.ckpt` to put it into."""
    folder = tmp_path_factory.mktemp("temporal")
    write_temporal(read_checkpoint(trained(folder / "last.ckpt", **SCHEDULE)), folder / "motion.safetensors")
    for seed, name in enumerate(("one", "two")):
        fine_tune(folder / f"{name}.ckpt", seed)
    return folder


def test_what_the_file_says(folder):
    motion = read_checkpoint(folder / "motion.safetensors")
    assert (motion.kind, motion.config) == ("temporal", None)
    assert_same(motion.tensors, {name: one for name, one in video_state().items() if ".temporal." in name})
    words = {name: value for name, value in motion.metadata.items() if name not in ("noise", "unet", BASE_IDENTITY)}
    assert words == {
        "format": "pt", "kind": "temporal", "timesteps": "500", "linear_start": "0.00085", "linear_end": "0.012",
        "parameterization": "v", "zero_terminal_snr": "true", "known_frames": "null", "scale_factor": "0.18215",
        "frames": "7", "strides": "[1, 2]", "fps": "12.5", "size": "[16, 16]",
    }  # fmt: skip
    assert json.loads(motion.metadata["noise"]) == SCHEDULE["noise"]
    assert json.loads(motion.metadata["unet"]) == UNET
    assert motion.metadata[BASE_IDENTITY] == identity(part(image_state(), UNET_PREFIX))
    assert motion.metadata[BASE_IDENTITY] == base_identity(read_checkpoint(folder / "last.ckpt"))


def test_averages_are_what_is_written(tmp_path):
    tensors, _ = temporal_part(read_checkpoint(trained(tmp_path / "last.ckpt", averages=True)))
    state = video_state()
    assert_same(tensors, {name: one + 1 for name, one in state.items() if ".temporal." in name})


@torch.no_grad()
def test_plugged_in_equals_merged_bit_for_bit(folder, tmp_path):
    x, context = torch.randn(1, 5, 4, 8, 8), torch.randn(1, 7, 16)
    outputs = []
    for name in ("one", "two"):
        merged = load_with_temporal(folder / f"{name}.ckpt", folder / "motion.safetensors")
        assert f"motion.safetensors was trained on other image weights than those of {folder / name}" in merged.warning
        for suffix in ("ckpt", "safetensors"):
            write_full(merged.checkpoint, tmp_path / f"{name}.{suffix}")
            again = read_checkpoint(tmp_path / f"{name}.{suffix}")
            assert again.config == merged.checkpoint.config
            found = [load_unet(one).eval()(x, torch.tensor([400]), context) for one in (merged.checkpoint, again)]
            assert torch.equal(*found)
        outputs.append(found[0])
    assert not torch.equal(*outputs)


def test_a_clip_of_plugged_in_layers_is_that_of_the_merged_file(folder, tmp_path):
    merged = load_with_temporal(folder / "one.ckpt", folder / "motion.safetensors").checkpoint
    write_full(merged, tmp_path / "merged.safetensors")
    settings = ClipSettings(prompt="a road", frames=3, height=16, width=16, fps=10.0, steps=2, scale=1.0)
    clips = []
    for checkpoint in (merged, tmp_path / "merged.safetensors"):
        generator = ClipGenerator(checkpoint)
        generator.read_prompts(["a road", ""])
        clips.append(generator.generate(settings, [3])[0])
    assert (clips[0] == clips[1]).all() and clips[0].std() > 1


def test_put_back_into_its_own_base_it_is_what_it_was(folder, tmp_path):
    torch.save({"state_dict": image_state(), "config": CONFIG}, tmp_path / "base.ckpt")
    for base in (tmp_path / "base.ckpt", folder / "last.ckpt"):  # a base's own temporal layers make room
        merged = load_with_temporal(base, folder / "motion.safetensors")
        assert merged.warning is None
        assert_same(merged.checkpoint.tensors, video_state())
    params = merged.checkpoint.config["model"]["params"]
    assert {word: params[word] for word in SCHEDULE} == SCHEDULE
    assert {name: merged.checkpoint.config[name] for name in CLIPS} == CLIPS
    generator = ClipGenerator(merged.checkpoint)
    assert (generator.schedule.parameterization, generator.schedule.num_timesteps) == ("v", 500)
    assert (generator.training.frames, generator.training.size) == (7, (16, 16))


@pytest.mark.parametrize("base", ["safetensors", "half", "inpainting"])
def test_bases_of_other_kinds(folder, tmp_path, base):
    state = image_state()
    if base == "half":
        state = {name: one.half() if one.is_floating_point() else one for name, one in state.items()}
    if base == "inpainting":
        state = {name: one for name, one in state.items() if not name.startswith(UNET_PREFIX)} | inpainting_state()
    merged = load_with_temporal(write_safetensors(state, tmp_path / "base.safetensors"), folder / "motion.safetensors")
    assert (merged.warning is None) == (base != "half")
    unet = load_unet(merged.checkpoint)
    assert unet.in_channels == 4
    assert_same(image_weights(unet), part(state if base == "half" else image_state(), UNET_PREFIX))


@pytest.mark.parametrize("fill", [{}, {"fill": "zeros"}, {"fill": "blend"}])
def test_a_network_that_is_told_more(tmp_path, fill):
    known_frames = {"mixture": {"first": 1}} | fill
    last = trained(tmp_path / "last.ckpt", TOLD, known_frames=known_frames)
    write_temporal(read_checkpoint(last), tmp_path / "motion.safetensors")
    merged = load_with_temporal(fine_tune(tmp_path / "one.ckpt", 0), tmp_path / "motion.safetensors").checkpoint
    unet = load_unet(merged)
    assert (unet.takes_known_frames, unet.has_fps_embedding, unet.has_known_level) == (True, True, True)
    for checkpoint in (merged, written(last, tmp_path / "full.ckpt"), written(merged, tmp_path / "merged.safetensors")):
        assert checkpoint.config["model"]["params"]["known_frames"] == known_frames
    temporal = {name: one for name, one in unet.state_dict().items() if ".temporal." in name}
    assert_same(temporal, {n: one for n, one in load_unet(last).state_dict().items() if ".temporal." in n})


@pytest.mark.parametrize(
    ("trainable", "groups"),
    [
        ({"temporal": 1e-4, "convolutions": True, "time_embed": 1e-5}, "time_embed, convolutions"),
        ({"temporal": True, "output_blocks.1": 1e-5}, "output_blocks.1"),
        ({"temporal": True, "convolutions": False}, None),
        ({"temporal": 1e-4, "input_blocks.0.0.temporal": 1e-5}, None),
        (None, None),
    ],
)
def test_more_than_temporal_layers_was_trained(tmp_path, trainable, groups):
    checkpoint = read_checkpoint(trained(tmp_path / "last.ckpt", trainable=trainable))
    if groups is None:
        assert temporal_part(checkpoint)[0]
        return
    with pytest.raises(CheckpointError, match=rf"found that {groups} were trained as well .*: --format full"):
        temporal_part(checkpoint)


def test_an_image_model_has_nothing_to_give(tmp_path):
    path = write_safetensors(inpainting_state(), tmp_path / "image.safetensors")
    with pytest.raises(CheckpointError, match="expected a network with temporal layers, found an image model"):
        temporal_part(read_checkpoint(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model_channels": 64}, r"with model_channels 32, not 64, as .*wide.ckpt has. Take a base of the shape"),
        ({"context_dim": 24}, r"with context_dim 16, not 24"),
        ({"attention_resolutions": [1, 2]}, r"with attention_resolutions \[2\], not \[2, 1\], as"),
        ({"out_channels": 3, "in_channels": 3}, r"with other image layers, as"),
    ],
)
def test_a_base_of_another_shape(folder, tmp_path, words, message):
    state = {UNET_PREFIX + name: one for name, one in UNetModel(**UNET | words).state_dict().items()}
    base = write_bare(state, tmp_path / "wide.ckpt")
    with pytest.raises(CheckpointError, match=message):
        load_with_temporal(base, folder / "motion.safetensors")


def test_the_two_in_the_wrong_places(folder):
    last, motion = folder / "last.ckpt", folder / "motion.safetensors"
    with pytest.raises(CheckpointError, match=r"last.ckpt: expected a file of temporal layers alone"):
        load_with_temporal(last, last)
    message = r"motion.safetensors: expected a whole UNet, found temporal layers alone.*--base IMAGE_MODEL --temporal"
    with pytest.raises(CheckpointError, match=message):
        load_with_temporal(motion, motion)
    for load in (load_unet, ClipGenerator):
        with pytest.raises(CheckpointError, match=message):
            load(motion)


def test_a_torn_file(folder, tmp_path):
    from safetensors.torch import save_file  # noqa: PLC0415

    motion = read_checkpoint(folder / "motion.safetensors")
    tensors = dict(motion.tensors)
    del tensors[UNET_PREFIX + "out.2.temporal.bias"]
    save_file(tensors, tmp_path / "torn.safetensors", motion.metadata)
    with pytest.raises(CheckpointError, match=r"torn.safetensors: .* 1 missing: out.2.temporal.bias"):
        load_with_temporal(folder / "one.ckpt", tmp_path / "torn.safetensors")
    for unet, error, message in (
        ("null", CheckpointError, r"odd.safetensors: expected the words of its network in the metadata \(unet\)"),
        ("5", ConfigError, "odd.safetensors, unet: expected a mapping, found 5"),
        ('{"model_channels": "x"}', UserError, "needs in_channels"),
    ):
        save_file(dict(motion.tensors), tmp_path / "odd.safetensors", {**motion.metadata, "unet": unet})
        with pytest.raises(error, match=message):
            load_with_temporal(folder / "one.ckpt", tmp_path / "odd.safetensors")


def test_what_a_base_says_of_its_latents_counts(folder, tmp_path):
    config = config_of(scale_factor=0.5)
    merged = load_with_temporal(fine_tune(tmp_path / "other.ckpt", 0, config), folder / "motion.safetensors")
    assert ClipGenerator(merged.checkpoint).scale_factor == 0.5
    merged = load_with_temporal(write_bare(image_state(), tmp_path / "bare.ckpt"), folder / "motion.safetensors")
    assert merged.checkpoint.config["model"]["params"]["scale_factor"] == 0.18215


def test_a_base_with_averages(folder, tmp_path):
    state = image_state()
    names = average_names(part(state, UNET_PREFIX))
    averages = {names[name]: one + 1 for name, one in part(state, UNET_PREFIX).items()}
    merged = load_with_temporal(write_bare(state | averages, tmp_path / "ema.ckpt"), folder / "motion.safetensors")
    found = {name: one for name, one in unet_tensors(merged.checkpoint).items() if ".temporal." not in name}
    assert_same(found, {name: one + 1 for name, one in part(state, UNET_PREFIX).items()})
