"""Temporal layers alone: a small file of what was trained, which plugs into any image model of the same shape.

Where only temporal layers were trained, they are the whole result of a run. Such a file holds them, or their averages;
its metadata say how they were trained and on which image weights. `checkpoint.writing` writes it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint import has_temporal_layers, identity, is_temporal, outline_unet, unet_node, unet_tensors
from ldm.checkpoint.encoders import SD_V1_FIRST_STAGE, SD_V1_SCALE, SD_V1_TEXT, opened, prefixed
from ldm.checkpoint.names import AVERAGE_PREFIX, UNET_PREFIX, Kind
from ldm.checkpoint.reading import (
    DECODER_PLACE,
    UNET,
    Checkpoint,
    CheckpointError,
    part_tensors,
)
from ldm.checkpoint.shapes import infer_unet_kwargs
from ldm.config.schema import mapping_at
from ldm.files import parse_json
from ldm.modules.state_dicts import account
from ldm.optim.parameter_groups import ParameterGroups

MODEL = "ldm.models.diffusion.ddpm.LatentVideoDiffusion"
# Words of the model that say what its network's output means, and their values where a config is silent.
MODEL_WORDS = {
    "timesteps": 1000,
    "linear_start": 0.00085,
    "linear_end": 0.012,
    "parameterization": "eps",
    "zero_terminal_snr": False,
    "noise": None,
    "known_frames": None,
    "scale_factor": SD_V1_SCALE,
}
# Words of the clips: where they are in a config.
CLIP_WORDS = {
    "frames": ("data", "params", "frames"),
    "strides": ("data", "params", "strides"),
    "fps": ("prepare", "fps"),
    "size": ("prepare", "size"),
}
BASE_IDENTITY = "base_sha256"
# Words of the network that are about how it runs, not about its weights.
RUNNING = ("use_checkpoint", "feed_forward_frames", "inputs_on_host", "attention_backend", "dropout")
SHAPE_WORDS = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "context_dim")


@dataclass(frozen=True)
class Merged:
    """An image model with the temporal layers of another in it; `warning` says so if they were trained on another."""

    checkpoint: Checkpoint
    warning: str | None


def base_identity(checkpoint: Checkpoint) -> str:
    """The `identity` of the image weights of the checkpoint's UNet."""
    return identity(_image_part(unet_tensors(checkpoint)))


def temporal_part(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The temporal tensors of a checkpoint under their full names, and the metadata of a file of them.

    Raises `CheckpointError` where there are none, and where image weights were trained too, by the checkpoint's config.
    """
    tensors = unet_tensors(checkpoint)
    if not has_temporal_layers(tensors):
        raise CheckpointError(
            f"{checkpoint.path}: expected a network with temporal layers, found an image model, which has none to "
            "write. Give the checkpoint of a video model."
        )
    node = unet_node(checkpoint)
    _refuse_trained_image_weights(checkpoint, node)
    config = checkpoint.config or {}
    params = config.get("model", {}).get("params", {})
    words = {word: params.get(word, default) for word, default in MODEL_WORDS.items()}
    words |= {word: _at(config, path) for word, path in CLIP_WORDS.items()}
    words["unet"] = {word: value for word, value in node["params"].items() if word not in RUNNING}
    metadata = {"format": "pt", "kind": str(Kind.TEMPORAL), BASE_IDENTITY: identity(_image_part(tensors))}
    metadata |= {word: value if isinstance(value, str) else json.dumps(value) for word, value in words.items()}
    return prefixed(UNET_PREFIX, {name: tensor for name, tensor in tensors.items() if is_temporal(name)}), metadata


def load_with_temporal(base: Checkpoint | Path | str, temporal: Checkpoint | Path | str) -> Merged:
    """An image model, of any kind that is read, with the temporal layers of a file of them; merged in memory.

    base: its own temporal layers, where it has any, make room.
    temporal: a file as `temporal_part` describes it; the schedule, the clips and the network are as it says, the
        encoders those of the base. Raises `CheckpointError` where the two do not fit.
    """
    base, temporal = opened(base), opened(temporal)
    if temporal.kind is not Kind.TEMPORAL:
        raise CheckpointError(
            f"{temporal.path}: expected a file of temporal layers alone, as scripts/convert.py --format temporal "
            "writes, found another checkpoint. Give it by itself, without a base."
        )
    words = {word: _parsed(temporal.metadata[word]) for word in temporal.metadata}
    image = _image_part(unet_tensors(base))
    layers = part_tensors(temporal, UNET_PREFIX, "temporal layers of a UNet")
    _check_fit(base, temporal, mapping_at(f"{temporal.path}, unet", words.get("unet")), image, layers)
    others = {
        name: tensor for name, tensor in base.tensors.items() if not name.startswith((UNET_PREFIX, AVERAGE_PREFIX))
    }
    checkpoint = Checkpoint(
        base.path,
        others | prefixed(UNET_PREFIX, image | layers),
        own_config=_merged_config(base, words),
        kind=Kind.DIFFUSERS if base.kind is Kind.AUTHOR else base.kind,
        scale_factor=base.scale_factor,
    )
    warning, found = None, identity(image)
    if found != words.get(BASE_IDENTITY):
        warning = (
            f"{temporal.path} was trained on other image weights than those of {base.path} (sha256 "
            f"{str(words.get(BASE_IDENTITY))[:12]}, found {found[:12]}): look at what comes out. The same weights in "
            "another precision count as others"
        )
    return Merged(checkpoint, warning)


def _image_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not is_temporal(name)}


def _refuse_trained_image_weights(checkpoint: Checkpoint, node: Mapping[str, Any]) -> None:
    if checkpoint.config is None:
        return  # unknown
    trainable = checkpoint.config["model"]["params"].get("trainable")
    trainable = {"temporal": True} if trainable is None else mapping_at("model.params.trainable", trainable)
    groups = ParameterGroups(outline_unet(node), trainable)
    others = [
        group.name
        for group in groups.groups
        if group.is_trained and not all(is_temporal(name) for name, _ in group.parameters)
    ]
    if others:
        raise CheckpointError(
            f"{checkpoint.path}: expected a model of which nothing but temporal layers was trained, found that "
            f"{', '.join(others)} were trained as well (model.params.trainable), which temporal layers alone would "
            "lack. Write all of it: --format full"
        )


def _check_fit(
    base: Checkpoint,
    temporal: Checkpoint,
    words: Mapping[str, Any],
    image: Mapping[str, Tensor],
    layers: Mapping[str, Tensor],
) -> None:
    """Raise `CheckpointError` unless the network of the metadata has the base's image part and the file's layers."""
    if not words:
        raise CheckpointError(
            f"{temporal.path}: expected the words of its network in the metadata (unet), found none. Write the file "
            "again with scripts/convert.py --format temporal."
        )
    outline = outline_unet({"target": UNET, "params": dict(words)}).state_dict()
    expected = _image_part(outline)
    if {name: tensor.shape for name, tensor in expected.items()} != {name: one.shape for name, one in image.items()}:
        found = infer_unet_kwargs(image, where=str(base.path))
        differing = [
            f"{word} {words[word]}, not {found[word]}"
            for word in SHAPE_WORDS
            if word in words and _in_order(word, words[word]) != _in_order(word, found[word])
        ]
        raise CheckpointError(
            f"{temporal.path}: expected to be put into a network with {'; '.join(differing) or 'other image layers'}, "
            f"as {base.path} has. Take a base of the shape it was trained on."
        )
    account({name: tensor for name, tensor in outline.items() if is_temporal(name)}, layers, where=str(temporal.path))


def _in_order(word: str, value: Any) -> Any:
    return sorted(value) if word == "attention_resolutions" else value


def _merged_config(base: Checkpoint, words: Mapping[str, Any]) -> dict[str, Any]:
    """A config for the base's encoders and the temporal file's network, schedule and clips."""
    params = (base.config or {}).get("model", {}).get("params", {})
    merged = {word: words.get(word, default) for word, default in MODEL_WORDS.items()}
    if params.get("scale_factor") is not None or base.scale_factor is not None:
        merged["scale_factor"] = params.get("scale_factor") or base.scale_factor
    merged["unet_config"] = {"target": UNET, "params": dict(words["unet"])}
    merged["first_stage_config"] = params.get("first_stage_config") or copy.deepcopy(SD_V1_FIRST_STAGE)
    merged["cond_stage_config"] = params.get("cond_stage_config") or copy.deepcopy(SD_V1_TEXT)
    if params.get(DECODER_PLACE):
        merged[DECODER_PLACE] = params[DECODER_PLACE]
    config: dict[str, Any] = {"model": {"target": MODEL, "params": merged}}
    for word, path in CLIP_WORDS.items():
        if words.get(word) is not None:
            place = config
            for step in path[:-1]:
                place = place.setdefault(step, {})
            place[path[-1]] = words[word]
    return config


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    found: Any = config
    for step in path:
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def _parsed(text: str) -> Any:
    """What a word of the metadata stands for: JSON, or a string as it is."""
    try:
        return parse_json(text)
    except ValueError:
        return text
