"""Names of Stable Diffusion v1 in both namings, against diffusers' own converters."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

from ldm.checkpoint.names import (
    FIRST_STAGE_PREFIX,
    UNET_PREFIX,
    UNetLayout,
    average_names,
    unet_from_diffusers,
)
from ldm.modules.state_dicts import as_convolution, first_stage_from_diffusers
from ldm.modules.unet import UNetModel
from tests.conftest import GOLDENS

TINY_LAYOUTS = [
    ((1, 2, 4, 4), 2, (4, 2, 1)),
    ((1, 2), 1, (2,)),
    ((1, 1, 2), 3, (1, 4)),
    ((1,), 1, (1,)),
]


@pytest.fixture(scope="module")
def sd_keys() -> dict:
    return json.loads((GOLDENS / "sd_v1_keys.json").read_text())


def relative(names, prefix):
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def numbered(names, prefix, shape):
    """A state dict in which each tensor says which one it is."""
    return {prefix + name: torch.full(shape, float(index)) for index, name in enumerate(names)}


def test_unet_names_are_those_of_diffusers_converter(sd_keys):
    names = relative(sd_keys["keys"], UNET_PREFIX)
    config = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
    oracle = convert_ldm_unet_checkpoint(numbered(names, UNET_PREFIX, (1,)), config)
    ours = unet_from_diffusers(oracle)
    assert len(set(ours.values())) == 686
    assert ours == {name: names[int(value)] for name, value in oracle.items()}


def test_first_stage_names_are_those_of_diffusers_converter(sd_keys):
    names = relative(sd_keys["keys"], FIRST_STAGE_PREFIX)
    config = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    oracle = convert_ldm_vae_checkpoint(numbered(names, FIRST_STAGE_PREFIX, (1, 1, 1, 1)), config)
    ours = first_stage_from_diffusers(oracle)
    assert len(set(ours.values())) == 248
    assert ours == {name: names[int(value.flatten()[0])] for name, value in oracle.items()}


@pytest.mark.parametrize(("channel_mult", "num_res_blocks", "attention"), TINY_LAYOUTS)
def test_any_layout_maps_onto_diffusers_network(channel_mult, num_res_blocks, attention):
    cross = [2**level in attention for level in range(len(channel_mult))]
    with torch.device("meta"):
        ours = UNetModel(4, 4, 32, num_res_blocks, attention, channel_mult, context_dim=24)
        theirs = UNet2DConditionModel(
            layers_per_block=num_res_blocks,
            block_out_channels=[32 * mult for mult in channel_mult],
            down_block_types=["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in cross],
            up_block_types=["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(cross)],
            cross_attention_dim=24,
            attention_head_dim=8,
        )
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    image = [name for name in shapes if ".temporal." not in name]
    expected = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert UNetLayout.of_compvis(image) == UNetLayout.of_diffusers(expected)
    names = unet_from_diffusers(expected)
    assert {names[other]: shape for other, shape in expected.items()} == {name: shapes[name] for name in image}
    temporal = "down_blocks.0.resnets.0.conv1.temporal.weight"
    assert unet_from_diffusers([*expected, temporal])[temporal] == "input_blocks.1.0.in_layers.2.temporal.weight"


def test_old_and_new_spelling_of_first_stage_attention():
    with torch.device("meta"):
        new = list(AutoencoderKL(block_out_channels=[32], down_block_types=["DownEncoderBlock2D"]).state_dict())
    spelling = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = new
    for word, other in spelling.items():
        old = [name.replace(f"attentions.0.{word}.", f"attentions.0.{other}.") for name in old]
    assert old != new
    assert list(first_stage_from_diffusers(old).values()) == list(first_stage_from_diffusers(new).values())
    linear = [
        name for name in first_stage_from_diffusers(new).values() if as_convolution(name, torch.ones(1, 1)).ndim == 4
    ]
    assert len(linear) == 8


def test_unknown_names_stay_for_the_accounting():
    assert unet_from_diffusers(["down_blocks.0.resnets.0.conv1.spatial_conv.bias", "nonsense.weight"]) == {
        "down_blocks.0.resnets.0.conv1.spatial_conv.bias": "input_blocks.1.0.in_layers.2.spatial_conv.bias",
        "nonsense.weight": "nonsense.weight",
    }


def test_average_names(sd_keys):
    ours = average_names(relative(sd_keys["keys"], UNET_PREFIX))
    assert {*ours.values(), "model_ema.decay", "model_ema.num_updates"} == set(sd_keys["ema_keys"])
