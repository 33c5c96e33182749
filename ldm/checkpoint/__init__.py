"""Stable Diffusion v1's weights into our networks, and back under the names the world knows.

`load_unet` is the one door for every kind of file and folder; the encoders come from the same single file, by way of
`encoders`. Nothing is loaded loosely: each tensor of the file must have its place and each place its tensor,
temporal layers excepted. How files are read is in `reading`, what tensors are called in `names`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ldm.checkpoint import names as checkpoint_author
from ldm.checkpoint.encoders import (
    SD_V1_FIRST_STAGE,
    SD_V1_SCALE,
    encoder_tensors,
    latent_scale,
    load_encoders,
    load_first_stage,
    load_first_stage_of,
    load_text_encoder,
    load_text_encoder_of,
    model_params,
    opened,
    outline_first_stage,
    own_node,
    plain,
    prefixed,
)
from ldm.checkpoint.names import (
    AVERAGE_COUNTERS,
    AVERAGE_PREFIX,
    FIRST_STAGE_PREFIX,
    TEXT_PREFIX,
    UNET_PREFIX,
    Kind,
    average_names,
)
from ldm.checkpoint.reading import (
    UNET,
    Checkpoint,
    CheckpointError,
    first_stage_tensors,
    identity,
    part_tensors,
    read_checkpoint,
    text_tensors,
)
from ldm.checkpoint.shapes import infer_unet_kwargs, refuse_linear_projections, split_known
from ldm.config import build, load_config
from ldm.diffusion.schedule import NoiseSchedule
from ldm.modules.encoders import CLIPTextEmbedder, FirstStage
from ldm.modules.state_dicts import account
from ldm.modules.temporal import is_temporal
from ldm.modules.unet import UNetModel

__all__ = [
    "SD_V1_FIRST_STAGE",
    "SD_V1_SCALE",
    "Checkpoint",
    "CheckpointError",
    "check_unet",
    "encoder_tensors",
    "fill_unet",
    "first_stage_tensors",
    "full_state_dict",
    "has_temporal_layers",
    "identity",
    "is_temporal",
    "latent_scale",
    "load_encoders",
    "load_first_stage",
    "load_first_stage_of",
    "load_text_encoder",
    "load_text_encoder_of",
    "load_unet",
    "load_weights",
    "outline_first_stage",
    "outline_unet",
    "read_checkpoint",
    "text_tensors",
    "unet_node",
    "unet_tensors",
]

UNET_PATH = "model.params.unet_config"
# What a network may be conditioned on: prefix of its tensors, what it is, and the `UNetModel` option that enables it.
CONDITIONS = {
    "conditioning.temporal.known.": ("known frames", "in_channels to 2 * out_channels + 1"),
    "conditioning.temporal.fps.": ("the frame rate", "fps_embedding to true"),
    "conditioning.temporal.known_level.": ("the noise on known frames", "known_level_embedding to true"),
}

Config = str | Path | DictConfig | Mapping[str, Any]


def has_temporal_layers(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a UNet's tensors include temporal layers; further input channels, as for inpainting, do not count."""
    return any(is_temporal(name) and _condition(name) is None for name in tensors)


def load_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    where: str,
    may_miss: Callable[[str], bool] | None = None,
    spelled: Callable[[Any], Mapping[str, str]] | None = None,
) -> None:
    """Copy tensors into a module, in the module's dtype, after accounting for every name and shape.

    where: what is filled and from where, for the message of the `CheckpointError` that lists what does not fit.
    may_miss: says of a name whether the module may keep its own value. None: the temporal layers may if none of them is
        there, and so may each of the conditions, such as known frames.
    spelled: see `account`.
    """
    _account(module.state_dict(), tensors, where, may_miss, spelled)
    module.load_state_dict(tensors, strict=False)  # what may be missing was settled a line above


def load_unet(path: str | Path | Checkpoint, config: Config | None = None, use_average: bool = True) -> UNetModel:
    """The video UNet with the weights of any checkpoint file or diffusers folder, float32 on the CPU.

    path: of the file or folder; or one that is already read.
    config: the path of a YAML file, or a whole config, or its `unet_config` node, or the bare words of `UNetModel`.
        None: the config inside the checkpoint; where there is none, words read from the shapes of its tensors.
    use_average: take the running average of each weight where the file holds one.

    Temporal layers that the file lacks start as they always do, changing nothing. Raises `CheckpointError`.
    """
    checkpoint = opened(path)
    refuse_linear_projections(unet_tensors(checkpoint, use_average), checkpoint.path)
    node, is_its_own = unet_node(checkpoint, config), config is None and checkpoint.own_config is not None
    _account_unet(outline_unet(node), checkpoint, use_average, is_its_own)  # before memory is taken for it
    unet = build(node, UNET_PATH)
    fill_unet(unet, checkpoint, use_average, is_its_own)
    return unet


def fill_unet(unet: UNetModel, checkpoint: Checkpoint, use_average: bool = True, is_its_own: bool = False) -> None:
    """Put the weights of a checkpoint into a network; as in `load_unet`.

    is_its_own: the network was built from the checkpoint's config; the file then holds all of its temporal layers and
        conditions, or none of them.
    """
    unet.load_state_dict(_account_unet(unet, checkpoint, use_average, is_its_own), strict=False)  # accounted for


def _account_unet(unet: UNetModel, checkpoint: Checkpoint, use_average: bool, is_its_own: bool) -> dict[str, Tensor]:
    """The tensors of a checkpoint for this network, which it may be an outline of; raises `CheckpointError`."""
    where = f"UNet from {checkpoint.path}"
    if checkpoint.kind is Kind.AUTHOR and not _is_as_released(unet):
        raise CheckpointError(
            f"{where}: expected a network with norm_over_clip: true and temporal_attention: {{positions: false}}, as "
            "the author's release has it, found a config of another. Set both in unet_config.params."
        )
    tensors = unet_tensors(checkpoint, use_average)
    _account(unet.state_dict(), tensors, where, _may_miss(tensors, is_its_own), checkpoint.spelled)
    return tensors


def check_unet(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` unless the UNet's tensors, and their averages, are those `load_unet` would load."""
    refuse_linear_projections(unet_tensors(checkpoint), checkpoint.path)
    expected = outline_unet(unet_node(checkpoint)).state_dict()
    for use_average in (False, True):
        tensors = unet_tensors(checkpoint, use_average)
        may_miss = _may_miss(tensors, is_its_own=checkpoint.own_config is not None)
        _account(expected, tensors, f"UNet from {checkpoint.path}", may_miss, checkpoint.spelled)


def outline_unet(node: Mapping[str, Any]) -> UNetModel:
    """The network of a node with target and params, on the meta device: names and shapes without values."""
    with torch.device("meta"):
        return build(node, UNET_PATH)


def unet_node(checkpoint: Checkpoint, config: Config | None = None) -> dict[str, Any]:
    """Target and params of the UNet: those of `config`, as in `load_unet`, or the checkpoint's own, or from shapes."""
    if config is None:
        if node := own_node(checkpoint, "unet_config"):
            return node
        words = infer_unet_kwargs(
            unet_tensors(checkpoint), checkpoint.num_heads or 8, str(checkpoint.path), checkpoint.spelled
        )
        return _unet_node(words | (checkpoint_author.RELEASE_KWARGS if checkpoint.kind is Kind.AUTHOR else {}))
    if isinstance(config, str | Path):
        config = load_config([config])
    config = plain(config)
    if "model" in config:
        return model_params(config, "unet_config")["unet_config"]
    return config if "target" in config else _unet_node(config)


def unet_tensors(checkpoint: Checkpoint, use_average: bool = True) -> dict[str, Tensor]:
    """The UNet's tensors, names relative to `model.diffusion_model.`; averages in place of weights that have one.

    Weights of the input channels of known frames are apart, as in `split_known`.
    """
    if checkpoint.kind is Kind.TEMPORAL:
        raise CheckpointError(
            f"{checkpoint.path}: expected a whole UNet, found temporal layers alone. Give the image model that they "
            f"are to be put into as well: --base IMAGE_MODEL --temporal {checkpoint.path}"
        )
    tensors = part_tensors(checkpoint, UNET_PREFIX, "UNet (model.diffusion_model.*)")
    averages = average_names(tensors)
    strangers = {name for name in checkpoint.tensors if name.startswith(AVERAGE_PREFIX)}
    strangers -= set(averages.values()) | set(AVERAGE_COUNTERS)
    if strangers:
        raise CheckpointError(
            f"{checkpoint.path}: {len(strangers)} averaged tensors belong to no weight of its UNet, such as "
            f"{min(strangers)}. Take the original file, or one without averages."
        )
    if use_average:
        tensors = {name: checkpoint.tensors.get(averages[name], tensor) for name, tensor in tensors.items()}
    return split_known(tensors)


def full_state_dict(
    unet: UNetModel, first_stage: FirstStage, text_encoder: CLIPTextEmbedder, schedule: NoiseSchedule
) -> dict[str, Tensor]:
    """Every tensor of a Stable Diffusion checkpoint under CompVis's names: v1's 1143, and the temporal ones besides."""
    return (
        schedule.compvis_buffers()
        | prefixed(UNET_PREFIX, unet.state_dict())
        | prefixed(FIRST_STAGE_PREFIX, first_stage.compvis_state_dict())
        | prefixed(TEXT_PREFIX, text_encoder.compvis_state_dict())
    )


def _account(
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    where: str,
    may_miss: Callable[[str], bool] | None,
    spelled: Callable[[Any], Mapping[str, str]] | None,
) -> None:
    """What `load_weights` does before it copies."""
    for prefix, (what, option) in CONDITIONS.items():
        if any(name.startswith(prefix) for name in set(tensors) - set(expected)):
            raise CheckpointError(
                f"{where}: expected a network conditioned on {what}, as the one in the file, found a config "
                f"without it. Set unet_config.params.{option}, or use other weights."
            )
    if may_miss is None:
        there = {_group(name) for name in tensors}

        def may_miss(name: str) -> bool:
            return is_temporal(name) and _group(name) not in there

    account(expected, tensors, where=where, may_miss=may_miss, spelled=spelled)


def _may_miss(tensors: Mapping[str, Tensor], is_its_own: bool) -> Callable[[str], bool] | None:
    """Names that may be missing: none if it has temporal layers for its own config, else as `load_weights`."""
    return (lambda name: False) if is_its_own and has_temporal_layers(tensors) else None


def _unet_node(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {"target": UNET, "params": dict(kwargs)}


def _condition(name: str) -> str | None:
    return next((prefix for prefix in CONDITIONS if name.startswith(prefix)), None)


def _group(name: str) -> str | None:
    """Temporal tensors that come together or not at all; None for those of the image network."""
    return (_condition(name) or "layers") if is_temporal(name) else None


def _is_as_released(unet: UNetModel) -> bool:
    return unet.norm_over_clip and not any(getattr(module, "positions", False) for module in unet.modules())
