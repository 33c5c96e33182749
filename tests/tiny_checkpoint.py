"""A Stable Diffusion checkpoint of a few megabytes in every form that the real one comes in."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint import full_state_dict
from ldm.diffusion.schedule import NoiseSchedule
from ldm.modules.encoders import CLIPTextEmbedder, KLFirstStage
from ldm.modules.unet import UNetModel
from tests.conftest import fill_by_rule

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 4,
    "context_dim": 16,
}
DDCONFIG = {"z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = {
    "model": {
        "base_learning_rate": 1e-4,
        "target": "ldm.models.diffusion.ddpm.LatentVideoDiffusion",
        "params": {
            "ckpt_path": None,
            "scale_factor": 0.18215,
            "unet_config": {"target": "ldm.modules.unet.UNetModel", "params": UNET},
            "first_stage_config": {
                "target": "ldm.modules.encoders.KLFirstStage",
                "params": {"ddconfig": DDCONFIG, "embed_dim": 4},
            },
            "cond_stage_config": {
                "target": "ldm.modules.encoders.CLIPTextEmbedder",
                "params": {"text_config": TEXT},
            },
        },
    }
}


@cache
def _state() -> dict[str, Tensor]:
    parts = UNetModel(**UNET), KLFirstStage(DDCONFIG, 4), CLIPTextEmbedder(TEXT, random_seed=3)
    state = full_state_dict(*parts, NoiseSchedule())
    ruled = fill_by_rule({name: value.shape for name, value in state.items() if name.startswith(("model.", "first_"))})
    return {name: tensor.detach().clone() for name, tensor in (state | ruled).items()}


def video_state() -> dict[str, Tensor]:
    """Every tensor of the tiny video model, CompVis names; temporal layers are far from their neutral start."""
    return dict(_state())


def image_state() -> dict[str, Tensor]:
    """Every tensor of the tiny image model: what a tiny sd-v1-4.ckpt holds."""
    return {name: tensor for name, tensor in _state().items() if ".temporal." not in name}


class _OldNumpyPickler(pickle._Pickler):
    """Writes numpy scalars as numpy 1 did, under `numpy.core`."""

    def save_global(self, obj: object, name: str | None = None) -> None:
        if getattr(obj, "__module__", "") == "numpy._core.multiarray":
            self.write(f"cnumpy.core.multiarray\n{obj.__name__}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)


_OLD_PICKLE = SimpleNamespace(__name__="pickle", Pickler=_OldNumpyPickler, dump=pickle.dump)


def save_as_public(state: dict[str, Tensor], path: Path, **options: bool) -> Path:
    """Write what Lightning 1.4 wrote: a pickle that names its ModelCheckpoint class and numpy scalars."""
    from pytorch_lightning.callbacks import ModelCheckpoint  # noqa: PLC0415 - slow, and few tests want it

    contents = {
        "epoch": 12,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {ModelCheckpoint: {"best_model_score": np.float32(0.25), "monitor": "val/loss_simple_ema"}},
        "lr_schedulers": [{"last_lr": [np.float64(1e-4)]}],
    }
    torch.save(contents, path, pickle_module=_OLD_PICKLE, **options)
    return path


def write_zip(state: dict[str, Tensor], path: Path) -> Path:
    return save_as_public(state, path)


def write_legacy(state: dict[str, Tensor], path: Path) -> Path:
    return save_as_public(state, path, _use_new_zipfile_serialization=False)


def write_safetensors(state: dict[str, Tensor], path: Path) -> Path:
    save_file(state, path)
    return path


def write_bare(state: dict[str, Tensor], path: Path) -> Path:
    torch.save(state, path)
    return path


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one part, names relative to it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names with the same values, whatever their dtypes."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name].float(), tensor.float()), name


def image_weights(unet: UNetModel) -> dict[str, Tensor]:
    """The UNet's tensors without the temporal ones."""
    return {name: tensor for name, tensor in unet.state_dict().items() if ".temporal." not in name}


def config_for(path: Path, **changes: object) -> dict:
    """The tiny video config with its weights at `path`."""
    config = copy.deepcopy(CONFIG)
    config["model"]["params"] |= {"ckpt_path": str(path)} | changes
    return config
