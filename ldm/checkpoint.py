"""Stable Diffusion v1's weights into our networks, and back under the names the world knows.

`load_unet` is the one door for every kind of file and folder; the encoders come from the same single file. Nothing is
loaded loosely: each tensor of the file must have its place and each place its tensor, temporal layers excepted.
How files are read is in `checkpoint_reading`, what tensors are called in `checkpoint_names`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ldm.checkpoint_config import FIRST_STAGE, TEXT, UNET
from ldm.checkpoint_names import (
    AVERAGE_COUNTERS,
    AVERAGE_PREFIX,
    FIRST_STAGE_PREFIX,
    POSITION_IDS,
    TEXT_PREFIX,
    UNET_PREFIX,
    average_names,
)
from ldm.checkpoint_reading import (
    Checkpoint,
    CheckpointError,
    account,
    first_stage_tensors,
    part_tensors,
    read_checkpoint,
    refuse_linear_projections,
    text_tensors,
    unet_words,
)
from ldm.config import build, load_config
from ldm.config_values import ConfigError, fits, mapping_at
from ldm.models.diffusion.schedule import NoiseSchedule
from ldm.modules.encoders import CLIPTextEmbedder, KLFirstStage, position_ids
from ldm.modules.unet import UNetModel

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "encoder_tensors",
    "first_stage_tensors",
    "full_state_dict",
    "identity",
    "latent_scale",
    "load_encoders",
    "load_first_stage",
    "load_first_stage_of",
    "load_text_encoder",
    "load_text_encoder_of",
    "load_unet",
    "load_weights",
    "read_checkpoint",
    "text_tensors",
    "unet_tensors",
]

UNET_PATH = "model.params.unet_config"
FIRST_STAGE_PATH = "model.params.first_stage_config"
TEXT_PATH = "model.params.cond_stage_config"
# What a file without a config holds: Stable Diffusion v1's own encoders.
SD_V1_FIRST_STAGE = {
    "target": FIRST_STAGE,
    "params": {
        "embed_dim": 4,
        "ddconfig": {
            "z_channels": 4,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 128,
            "ch_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
        },
    },
}
SD_V1_SCALE = 0.18215
SD_V1_TEXT = {"target": TEXT, "params": {}}

Config = str | Path | DictConfig | Mapping[str, Any]


def is_temporal(name: str) -> bool:
    """True for the tensors that make a video network of an image network, which an image checkpoint lacks."""
    return ".temporal." in name


def load_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    where: str,
    may_miss: Callable[[str], bool] = is_temporal,
) -> None:
    """Copy tensors into a module, in the module's dtype, after accounting for every name and shape.

    where: what is filled and from where, for the message of the `CheckpointError` that lists what does not fit.
    may_miss: says of a name whether the module may keep its own value; temporal layers may.
    """
    account(module.state_dict(), tensors, where=where, may_miss=may_miss)
    module.load_state_dict(tensors, strict=False)  # what may be missing was settled a line above


def load_unet(path: str | Path | Checkpoint, config: Config | None = None, use_average: bool = True) -> UNetModel:
    """The video UNet with the weights of any checkpoint file or diffusers folder, float32 on the CPU.

    path: of the file or folder; or one that is already read.
    config: the path of a YAML file, or a whole config, or its `unet_config` node, or the bare words of `UNetModel`.
        None: the config inside the checkpoint; where there is none, words read from the shapes of its tensors.
    use_average: take the running average of each weight where the file holds one.

    Temporal layers that the file lacks start as they always do, changing nothing. Raises `CheckpointError`.
    """
    checkpoint = _opened(path)
    tensors = unet_tensors(checkpoint, use_average)
    refuse_linear_projections(tensors, checkpoint.path)
    unet = build(unet_node(checkpoint, config), UNET_PATH)
    has_time = any(is_temporal(name) for name in tensors)
    may_miss = (lambda name: False) if has_time else is_temporal
    load_weights(unet, tensors, where=f"UNet from {checkpoint.path}", may_miss=may_miss)
    return unet


def unet_node(checkpoint: Checkpoint, config: Config | None = None) -> dict[str, Any]:
    """Target and params of the UNet: those of `config`, as in `load_unet`, or the checkpoint's own, or from shapes."""
    if config is None:
        if node := _own_node(checkpoint, "unet_config"):
            return node
        return _node_of_words(unet_words(unet_tensors(checkpoint), checkpoint.num_heads or 8, str(checkpoint.path)))
    if isinstance(config, str | Path):
        config = load_config([config])
    config = _plain(config)
    if "model" in config:
        return _model_params(config, "unet_config")["unet_config"]
    return config if "target" in config else _node_of_words(config)


def unet_tensors(checkpoint: Checkpoint, use_average: bool = True) -> dict[str, Tensor]:
    """The UNet's tensors, names relative to `model.diffusion_model.`; averages in place of weights that have one."""
    tensors = part_tensors(checkpoint, UNET_PREFIX, "UNet (model.diffusion_model.*)")
    averages = average_names(tensors)
    strangers = {name for name in checkpoint.tensors if name.startswith(AVERAGE_PREFIX)}
    strangers -= set(averages.values()) | set(AVERAGE_COUNTERS)
    if strangers:
        raise CheckpointError(
            f"{checkpoint.path}: {len(strangers)} averaged tensors belong to no weight of its UNet, such as "
            f"{min(strangers)}. Take the original file, or one without averages."
        )
    if not use_average:
        return tensors
    return {name: checkpoint.tensors.get(averages[name], tensor) for name, tensor in tensors.items()}


def load_first_stage(source: Checkpoint | str | Path, config_node: Mapping[str, Any] | None = None) -> KLFirstStage:
    """The image autoencoder from a checkpoint, frozen, in evaluation mode.

    config_node: its `first_stage_config`; None: that of the checkpoint, or Stable Diffusion v1's where it has none.
    """
    checkpoint = _opened(source)
    node = _plain(config_node) or _own_node(checkpoint, "first_stage_config") or copy.deepcopy(SD_V1_FIRST_STAGE)
    first_stage = build(_without_weights(node), FIRST_STAGE_PATH)
    first_stage.load_compvis_state_dict(first_stage_tensors(checkpoint), where=f"first stage from {checkpoint.path}")
    return first_stage.requires_grad_(False).eval()


def outline_first_stage(config_node: Mapping[str, Any]) -> KLFirstStage:
    """The image autoencoder that a `first_stage_config` describes, without memory or weights: for its sizes."""
    with torch.device("meta"):
        return build(_without_weights(config_node), FIRST_STAGE_PATH)


def load_text_encoder(
    source: Checkpoint | str | Path, config_node: Mapping[str, Any] | None = None
) -> CLIPTextEmbedder:
    """The text encoder from a checkpoint, frozen, with its tokenizer found.

    config_node: its `cond_stage_config`; None: that of the checkpoint, or Stable Diffusion v1's where it has none. A
        diffusers folder's own tokenizer is used unless the config names another.
    """
    checkpoint = _opened(source)
    node = _plain(config_node) or _own_node(checkpoint, "cond_stage_config") or copy.deepcopy(SD_V1_TEXT)
    node = _without_weights(node)
    if checkpoint.kind == "diffusers" and (checkpoint.path / "tokenizer").is_dir():
        node["params"].setdefault("tokenizer", str(checkpoint.path))
    encoder = build(node, TEXT_PATH)
    encoder.load_compvis_state_dict(text_tensors(checkpoint), where=f"text encoder from {checkpoint.path}")
    _ = encoder.tokenizer  # missing, it should say so now and not after an hour of encoding video
    return encoder


def load_first_stage_of(config: DictConfig | Mapping[str, Any]) -> KLFirstStage:
    """The image autoencoder of a video config, from its own `ckpt_path` or else from `model.params.ckpt_path`."""
    params = _model_params(config, "first_stage_config")
    return load_first_stage(_source(params, "first_stage_config"), params["first_stage_config"])


def load_text_encoder_of(config: DictConfig | Mapping[str, Any]) -> CLIPTextEmbedder:
    """The text encoder of a video config, from its own `ckpt_path` or else from `model.params.ckpt_path`.

    One with a `random_seed` and no path of its own is made from that seed.
    """
    params = _model_params(config, "cond_stage_config")
    node = params["cond_stage_config"]
    if not _is_random(node):
        return load_text_encoder(_source(params, "cond_stage_config"), node)
    text_encoder = build(node, TEXT_PATH)
    _ = text_encoder.tokenizer
    return text_encoder


def load_encoders(config: DictConfig | Mapping[str, Any]) -> tuple[KLFirstStage, CLIPTextEmbedder]:
    """Both encoders of a video config."""
    return load_first_stage_of(config), load_text_encoder_of(config)


def encoder_tensors(config: DictConfig | Mapping[str, Any]) -> dict[str, Tensor]:
    """The encoders' tensors under their full CompVis names, to be put into a training checkpoint.

    They are taken from where `load_encoders` takes them and checked as strictly, but no autoencoder is built and the
    tensors stay mapped to their file.
    """
    params = _model_params(config)
    tensors = first_stage_tensors(_opened(_source(params, "first_stage_config")))
    expected = outline_first_stage(params["first_stage_config"]).compvis_state_dict()
    account(expected, tensors, where=f"first stage from {_source(params, 'first_stage_config')}")
    node = params["cond_stage_config"]
    if _is_random(node):
        text = build(node, TEXT_PATH).compvis_state_dict()
    else:
        text = text_tensors(_opened(_source(params, "cond_stage_config")))
        num_positions = text["text_model.embeddings.position_embedding.weight"].shape[0]
        text[POSITION_IDS] = position_ids(num_positions)
    return _prefixed(FIRST_STAGE_PREFIX, tensors) | _prefixed(TEXT_PREFIX, text)


def latent_scale(config: DictConfig | Mapping[str, Any]) -> float:
    """What the first stage's samples are multiplied by to become the network's latents.

    `model.params.scale_factor` if the config gives one, 0.18215 if it does not speak of it; if it says null, the number
    that was measured when the first stage was trained, from its checkpoint.
    """
    params = _model_params(config, "first_stage_config")
    scale = params.get("scale_factor", SD_V1_SCALE)
    if scale is not None:
        if not fits(scale, float) or not 0 < scale < float("inf"):
            raise ConfigError(f"model.params.scale_factor: expected a number above 0 or null, found {scale!r}")
        return float(scale)
    path = _source(params, "first_stage_config")
    scale = read_checkpoint(path).scale_factor
    if scale is None:
        raise CheckpointError(
            f"model.params.scale_factor: expected a number, since {path} does not say how its latents are scaled; set "
            f"{SD_V1_SCALE} for Stable Diffusion v1's autoencoder"
        )
    return scale


def full_state_dict(
    unet: UNetModel, first_stage: KLFirstStage, text_encoder: CLIPTextEmbedder, schedule: NoiseSchedule
) -> dict[str, Tensor]:
    """Every tensor of a Stable Diffusion checkpoint under CompVis's names: v1's 1143, and the temporal ones besides."""
    return (
        schedule.compvis_buffers()
        | _prefixed(UNET_PREFIX, unet.state_dict())
        | _prefixed(FIRST_STAGE_PREFIX, first_stage.compvis_state_dict())
        | _prefixed(TEXT_PREFIX, text_encoder.compvis_state_dict())
    )


def identity(tensors: Mapping[str, Tensor]) -> str:
    """A sha256 that tells whether two sets of weights are the same: names in order and values as float32, in hex.

    The same from a file and from the module it filled (`compvis_state_dict`), in fp16 or fp32; token positions, which
    only some files hold, do not count.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not name.endswith("position_ids"):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _node_of_words(words: Mapping[str, Any]) -> dict[str, Any]:
    return {"target": UNET, "params": dict(words)}


def _opened(source: Checkpoint | str | Path) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else read_checkpoint(source)


def _plain(config: DictConfig | Mapping[str, Any] | None) -> Any:
    """Resolved plain containers, ours to change."""
    if isinstance(config, DictConfig):
        return OmegaConf.to_container(config, resolve=True)
    return copy.deepcopy(config)


def _own_node(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    """The node of the config inside the checkpoint, where there is one."""
    config = _plain(checkpoint.config)
    return config and config["model"]["params"].get(name)


def _model_params(config: DictConfig | Mapping[str, Any], *needed: str) -> dict[str, Any]:
    model = mapping_at("model", _plain(config).get("model"))
    params = mapping_at("model.params", model.get("params"))
    for name in needed or ("first_stage_config", "cond_stage_config"):
        if not isinstance(params.get(name), Mapping):
            raise CheckpointError(
                f"model.params.{name}: expected a node with target and params, found none. Add it to the config."
            )
    return params


def _without_weights(node: Mapping[str, Any]) -> dict[str, Any]:
    """The node without the words that say where weights come from: they come from elsewhere."""
    words = (node.get("params") or {}).items()
    return {**node, "params": {word: value for word, value in words if word not in ("ckpt_path", "random_seed")}}


def _is_random(node: Mapping[str, Any]) -> bool:
    params = node.get("params") or {}
    return params.get("random_seed") is not None and params.get("ckpt_path") is None


def _source(params: Mapping[str, Any], part: str) -> str:
    """Where a config says that the weights of a part are."""
    path = (params[part].get("params") or {}).get("ckpt_path") or params.get("ckpt_path")
    if path is None:
        raise CheckpointError(
            f"model.params.{part}: expected the path of its weights in params.ckpt_path or in model.params.ckpt_path, "
            "found neither. Set one of them."
        )
    return path


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}
