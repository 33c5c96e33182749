"""The author's later release at a few megabytes, in every form it may come in."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint.names import CLASS_NAME, RELEASE_KWARGS, unet_to_release
from ldm.checkpoint.shapes import join_known
from ldm.modules.unet import UNetModel
from tests.conftest import fill_by_rule
from tests.tiny_checkpoint import write_safetensors

FULL = {
    "in_channels": 9,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": 2,
    "attention_resolutions": [4, 2, 1],
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "transformer_depth": 1,
    "context_dim": 768,
    "temporal_kernel_size": 3,
}
TINY = FULL | RELEASE_KWARGS | {"model_channels": 32, "context_dim": 24}


@cache
def _state(in_channels: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        state = join_known(UNetModel(**TINY | {"in_channels": in_channels}).state_dict())
    names = unet_to_release(state)
    return fill_by_rule({names[name]: tensor.shape for name, tensor in state.items()})


def release_state(in_channels: int) -> dict[str, Tensor]:
    """The weights of the recorded clips, under the release's own names."""
    return dict(_state(in_channels))


def write_folder(state: dict[str, Tensor], folder: Path, **changes: object) -> Path:
    """The folder of a UNet as the release has it; returns that of the whole release."""
    (folder / "unet").mkdir(parents=True)
    config = {"_class_name": CLASS_NAME, "attention_head_dim": 8} | changes
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    write_safetensors(state, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return folder
