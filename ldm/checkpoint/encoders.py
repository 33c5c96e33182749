"""The encoders of Stable Diffusion v1 out of checkpoints, and what a config says of where they come from.

Each comes from the one file that holds everything, or from a file of its own. The UNet is the business of `checkpoint`,
which also hands on what is here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ldm.checkpoint.names import FIRST_STAGE_PREFIX, TEMPORAL_DECODER_PREFIX, TEXT_PREFIX
from ldm.checkpoint.reading import (
    DECODER_PLACE,
    FIRST_STAGE,
    TEXT,
    Checkpoint,
    CheckpointError,
    first_stage_tensors,
    identity,
    part_tensors,
    read_checkpoint,
    text_tensors,
)
from ldm.config import build
from ldm.config.schema import ConfigError, fits, mapping_at
from ldm.modules.encoders import CLIPTextEmbedder, FirstStage, position_ids
from ldm.modules.state_dicts import POSITION_IDS, account, text_name
from ldm.modules.temporal_decoder import TemporalDecoder

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


def load_first_stage(source: Checkpoint | str | Path, config_node: Mapping[str, Any] | None = None) -> FirstStage:
    """The image autoencoder from a checkpoint, frozen, in evaluation mode.

    config_node: its `first_stage_config`; None: that of the checkpoint, or Stable Diffusion v1's where it has none.
    """
    checkpoint = opened(source)
    node = plain(config_node) or own_node(checkpoint, "first_stage_config") or copy.deepcopy(SD_V1_FIRST_STAGE)
    expected = outline_first_stage(node).compvis_state_dict()  # before memory is taken for it
    account(expected, first_stage_tensors(checkpoint), where=f"first stage from {checkpoint.path}")
    first_stage = build(_without_weights(node), FIRST_STAGE_PATH)
    fill_encoder(first_stage, checkpoint)
    return first_stage.requires_grad_(False).eval()


def fill_encoder(encoder: FirstStage | CLIPTextEmbedder, source: Checkpoint | str | Path) -> Checkpoint:
    """Copy the weights of a checkpoint into an encoder; returns the checkpoint. Raises `CheckpointError`."""
    checkpoint = opened(source)
    is_text = isinstance(encoder, CLIPTextEmbedder)
    tensors, part = (text_tensors, "text encoder") if is_text else (first_stage_tensors, "first stage")
    encoder.load_compvis_state_dict(tensors(checkpoint), where=f"{part} from {checkpoint.path}")
    return checkpoint


def outline_first_stage(config_node: Mapping[str, Any]) -> FirstStage:
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
    checkpoint = opened(source)
    encoder = build_text_encoder(checkpoint, config_node)
    _ = encoder.tokenizer  # missing, it should say so now and not after an hour of encoding video
    return encoder


def build_text_encoder(checkpoint: Checkpoint, config_node: Mapping[str, Any] | None = None) -> CLIPTextEmbedder:
    """As `load_text_encoder`, but the tokenizer is not looked for."""
    node = plain(config_node) or own_node(checkpoint, "cond_stage_config") or copy.deepcopy(SD_V1_TEXT)
    node = _without_weights(node)
    if checkpoint.kind.has_folder and (checkpoint.path / "tokenizer").is_dir():
        node["params"].setdefault("tokenizer", str(checkpoint.path))
    with torch.device("meta"):  # before memory is taken for it
        expected = build(node, TEXT_PATH).compvis_state_dict()
    expected.pop(POSITION_IDS, None)
    found = {text_name(name): tensor for name, tensor in text_tensors(checkpoint).items()}
    account(expected, found, where=f"text encoder from {checkpoint.path}")
    encoder = build(node, TEXT_PATH)
    fill_encoder(encoder, checkpoint)
    return encoder


def fits_first_stage(checkpoint: Checkpoint, config_node: Mapping[str, Any]) -> bool:
    """Whether the checkpoint holds the image autoencoder that a `first_stage_config` describes."""
    if not _holds(checkpoint, FIRST_STAGE_PREFIX):
        return False
    return _fits(outline_first_stage(config_node).compvis_state_dict(), first_stage_tensors(checkpoint))


def fits_text_encoder(checkpoint: Checkpoint, config_node: Mapping[str, Any]) -> bool:
    """Whether the checkpoint holds the text encoder that a `cond_stage_config` describes."""
    if not _holds(checkpoint, TEXT_PREFIX):
        return False
    with torch.device("meta"):
        expected = build(_without_weights(config_node), TEXT_PATH).compvis_state_dict()
    return _fits(expected, {POSITION_IDS: expected[POSITION_IDS]} | text_tensors(checkpoint))


def load_first_stage_of(config: DictConfig | Mapping[str, Any]) -> FirstStage:
    """The image autoencoder of a video config, from its own `ckpt_path` or, if unset, from `model.params.ckpt_path`."""
    params = model_params(config, "first_stage_config")
    return load_first_stage(_source(params, "first_stage_config"), params["first_stage_config"])


def load_text_encoder_of(config: DictConfig | Mapping[str, Any]) -> CLIPTextEmbedder:
    """The text encoder of a video config, from its own `ckpt_path` or, without one, from `model.params.ckpt_path`.

    One with a `random_seed` and no path of its own is made from that seed.
    """
    params = model_params(config, "cond_stage_config")
    node = params["cond_stage_config"]
    if not _is_random(node):
        return load_text_encoder(_source(params, "cond_stage_config"), node)
    text_encoder = build(node, TEXT_PATH)
    _ = text_encoder.tokenizer
    return text_encoder


def load_encoders(config: DictConfig | Mapping[str, Any]) -> tuple[FirstStage, CLIPTextEmbedder]:
    """Both encoders of a video config."""
    return load_first_stage_of(config), load_text_encoder_of(config)


def encoder_tensors(config: DictConfig | Mapping[str, Any]) -> dict[str, Tensor]:
    """The encoders' tensors under their full CompVis names, to be put into a training checkpoint.

    They are taken from where `load_encoders` takes them and checked as strictly, but no autoencoder is built and the
    tensors stay mapped to their file.
    """
    params = model_params(config)
    tensors = first_stage_tensors(opened(_source(params, "first_stage_config")))
    expected = outline_first_stage(params["first_stage_config"]).compvis_state_dict()
    account(expected, tensors, where=f"first stage from {_source(params, 'first_stage_config')}")
    node = params["cond_stage_config"]
    if _is_random(node):
        text = build(node, TEXT_PATH).compvis_state_dict()
    else:
        text = text_tensors(opened(_source(params, "cond_stage_config")))
        num_positions = text["text_model.embeddings.position_embedding.weight"].shape[0]
        text[POSITION_IDS] = position_ids(num_positions)
    return prefixed(FIRST_STAGE_PREFIX, tensors) | prefixed(TEXT_PREFIX, text)


def latent_scale(config: DictConfig | Mapping[str, Any]) -> float:
    """What the first stage's samples are multiplied by to become the network's latents.

    `model.params.scale_factor` if the config gives one, 0.18215 if it does not speak of it; if it says null, the number
    that was measured when the first stage was trained, from its checkpoint.
    """
    params = model_params(config, "first_stage_config")
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


def opened(source: Checkpoint | str | Path) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else read_checkpoint(source)


def plain(config: DictConfig | Mapping[str, Any] | None) -> Any:
    """Resolved plain containers, ours to change."""
    if isinstance(config, DictConfig):
        return OmegaConf.to_container(config, resolve=True)
    return copy.deepcopy(config)


def own_node(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    """The node of the config inside the checkpoint, where there is one."""
    config = plain(checkpoint.config)
    return config and config["model"]["params"].get(name)


def model_params(config: DictConfig | Mapping[str, Any], *needed: str) -> dict[str, Any]:
    model = mapping_at("model", plain(config).get("model"))
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


def _holds(checkpoint: Checkpoint, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in checkpoint.tensors)


def _fits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> bool:
    shapes = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (expected, found))
    return next(shapes) == next(shapes)


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


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


DECODER_PATH = f"model.params.{DECODER_PLACE}"
DECODING = ("decoder.", "post_quant_conv.", "quantize.")  # what of an image autoencoder decodes


def has_temporal_decoder(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint holds one."""
    return any(name.startswith(TEMPORAL_DECODER_PREFIX) for name in checkpoint.tensors)


def temporal_decoder_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Its tensors, names relative to `temporal_decoder.`; `CheckpointError` where there are none."""
    return part_tensors(checkpoint, TEMPORAL_DECODER_PREFIX, "temporal decoder (temporal_decoder.*)")


def temporal_decoder_node(checkpoint: Checkpoint) -> dict[str, Any]:
    """The `temporal_decoder_config` inside the checkpoint; `CheckpointError` where there is none."""
    node = own_node(checkpoint, DECODER_PLACE)
    if node is None:
        raise CheckpointError(
            f"{checkpoint.path}: expected {DECODER_PATH} in the config of a checkpoint with a temporal decoder, found "
            "none. Take the file that its training wrote."
        )
    return node


def load_temporal_decoder(source: Checkpoint | str | Path, first_stage: Mapping[str, Tensor]) -> TemporalDecoder:
    """The temporal decoder of a checkpoint, frozen, in evaluation mode, float32.

    first_stage: the tensors of the image autoencoder whose latents it is to decode. Raises `CheckpointError` where
    tensors are missing, unexpected or of other shapes, and where it was trained with another image decoder.
    """
    checkpoint = opened(source)
    tensors, node = temporal_decoder_tensors(checkpoint), plain(temporal_decoder_node(checkpoint))
    where = f"temporal decoder from {checkpoint.path}"
    try:
        with torch.device("meta"):
            outline = build(node, DECODER_PATH)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    account(outline.state_dict(), tensors, where=where)
    decoder = build(node, DECODER_PATH)
    decoder.load_state_dict(tensors)
    if not torch.equal(decoder.made_for, digest_of(first_stage)):
        raise CheckpointError(
            f"{where}: expected one that was trained with this image autoencoder, found one that was trained with "
            "another decoder of pictures. Take the autoencoder that its training started from, or leave it out."
        )
    return decoder.requires_grad_(False).eval()


def digest_of(first_stage: Mapping[str, Tensor]) -> Tensor:
    """What `TemporalDecoder.made_for` says of an image autoencoder: a sha256 of what decodes in it, 32 bytes, uint8.

    Of its weights as float16, in which bundles carry them.
    """
    decoding = {name: tensor.half() for name, tensor in first_stage.items() if name.startswith(DECODING)}
    return torch.tensor(list(bytes.fromhex(identity(decoding))), dtype=torch.uint8)
