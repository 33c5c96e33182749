"""Every kind of file and folder that Stable Diffusion v1's weights come in -> one dict of tensors, CompVis names.

Whole models, single parts and bare state dicts, in CompVis's or diffusers' naming. How files are opened safely is in
`files`, folders are in `layouts`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.files import CheckpointError, read_file
from ldm.checkpoint.layouts import compvis_tensors, is_bundle, read_bundle, read_folder
from ldm.checkpoint.names import (
    AVERAGE_PREFIX,
    FIRST_STAGE_PREFIX,
    OPTIONAL_NAMES,
    SCHEDULE_NAMES,
    TEMPORAL_DECODER_PREFIX,
    TEXT_PREFIX,
    UNET_PREFIX,
    Kind,
    is_release,
)
from ldm.config.schema import ConfigError, check_sizes, mapping_at
from ldm.config.untrusted import check_plain
from ldm.files import parse_json
from ldm.modules.state_dicts import POSITION_IDS, few, text_name

UNET = "ldm.modules.unet.UNetModel"
FIRST_STAGE = "ldm.modules.encoders.KLFirstStage"
VQ_FIRST_STAGE = "ldm.modules.encoders.VQFirstStage"
TEXT = "ldm.modules.encoders.CLIPTextEmbedder"
TEMPORAL_DECODER = "ldm.modules.temporal_decoder.TemporalDecoder"
DECODER_PLACE = "temporal_decoder_config"  # the one network that a model may do without
CLASSES = {
    "unet_config": (UNET,),
    "first_stage_config": (FIRST_STAGE, VQ_FIRST_STAGE),
    "cond_stage_config": (TEXT,),
    DECODER_PLACE: (TEMPORAL_DECODER,),
}
PATHS = ("ckpt_path", "tokenizer")


def confined(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config found in the file `where`, without paths; `ConfigError` where a network is of a class not ours."""
    try:
        check_plain(config)
    except ValueError as error:
        raise ConfigError(f"{where}: expected the config of a network, found what is none: {error}") from None
    model = mapping_at(f"{where}, model", config.get("model"))
    params = _without_paths(mapping_at(f"{where}, model.params", model.get("params")))
    for place, targets in CLASSES.items():
        if params.get(place) is not None:
            path = f"{where}, model.params.{place}"
            node = mapping_at(path, params[place])
            if node.get("target") not in targets:
                raise ConfigError(
                    f"{path}.target: expected {' or '.join(targets)}, all that the config inside such a file may name "
                    f"here, found {node.get('target')!r}; nothing was built. Give your own config with --config"
                )
            check_sizes(node.get("params"), f"{path}.params", is_network=True)
            params[place] = {"target": node["target"], "params": _without_paths(mapping_at(path, node.get("params")))}
    return {**config, "model": {**model, "params": params}}


def _without_paths(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key not in PATHS}


@dataclass
class Checkpoint:
    """The contents of a checkpoint.

    path: where it was read from.
    tensors: every tensor under its full CompVis name (`model.diffusion_model.*`, ...), on the CPU, in the file's dtype.
    own_config: the whole resolved config of the run that wrote it, as the file has it, None where it has none. Take
        `config` instead.
    kind: see `Kind`; a checkpoint of ours has a config.
    num_heads: attention heads of the UNet where a diffusers config says so; CompVis files never do.
    scale_factor: what its first stage's latents are multiplied by, where the file says so.
    metadata: the strings in a safetensors file.
    """

    path: Path
    tensors: dict[str, Tensor]
    own_config: Mapping[str, Any] | None = None
    kind: Kind = Kind.COMPVIS
    num_heads: int | None = None
    scale_factor: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any] | None:
        """The file's config, confined to what an untrusted one may say; raises `ConfigError` where it says more."""
        return None if self.own_config is None else confined(self.own_config, str(self.path))

    def spelled(self, names: Collection[str]) -> dict[str, str]:
        """Each name of a UNet, relative to `model.diffusion_model.`, -> how this file spells it."""
        return self.kind.spelled(names)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a `.ckpt`, a `.safetensors` (recognised by content, not by suffix), a diffusers folder or a bundle.

    A file may hold a whole model, only its UNet, first stage or text encoder, or a bare state dict of one of them in
    CompVis's or diffusers' naming. Raises `CheckpointError`.
    """
    path = Path(path)
    if path.is_dir() and is_bundle(path):
        tensors, config = read_bundle(path)
        return Checkpoint(path, _with_prefixes(tensors, path)[0], own_config=config, kind=Kind.OURS)
    if path.is_dir():
        found = read_folder(path)
        return Checkpoint(
            path, found.tensors, kind=found.kind, num_heads=found.num_heads, scale_factor=found.scale_factor
        )
    if not path.exists():
        raise CheckpointError(
            f"{path}: expected a checkpoint (.ckpt, .safetensors, or a diffusers folder), found no such file or "
            "folder. Check the path."
        )
    contents = read_file(path)
    state, metadata = contents.get("state_dict", contents), contents.get("metadata")
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: expected 'state_dict' to be a dict of tensors, found {type(state).__name__}")
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    tensors, kind = _with_prefixes(tensors, path)
    strings = metadata.items() if isinstance(metadata, Mapping) else ()
    metadata = {name: value for name, value in strings if isinstance(value, str)}
    config = contents.get("config", _config_in(metadata))
    if isinstance(config, Mapping) and "model" in config:
        kind = Kind.OURS
    elif metadata.get("kind") == Kind.TEMPORAL:
        kind = Kind.TEMPORAL
    scale = state.get("scale_factor", contents.get("scale_factor"))  # CompVis with scale_by_std; our autoencoder
    return Checkpoint(
        path,
        tensors,
        own_config=config if kind is Kind.OURS else None,
        kind=kind,
        scale_factor=_scale(scale, path),
        metadata=metadata,
    )


def first_stage_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The image autoencoder's tensors, names relative to `first_stage_model.`, without those of a training loss."""
    tensors = part_tensors(checkpoint, FIRST_STAGE_PREFIX, "image autoencoder (first_stage_model.*)")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("loss.")}


def text_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The text encoder's tensors, names relative to `cond_stage_model.transformer.` and spelt `text_model.*`."""
    tensors = part_tensors(checkpoint, TEXT_PREFIX, "CLIP text encoder (cond_stage_model.transformer.*)")
    return {name: tensor for name, tensor in tensors.items() if name != POSITION_IDS}


def part_tensors(checkpoint: Checkpoint, prefix: str, part: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it; a checkpoint without any is a `CheckpointError`."""
    tensors = {
        name.removeprefix(prefix): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(prefix)
    }
    if not tensors:
        raise CheckpointError(
            f"{checkpoint.path}: expected the {part}, found none of its tensors among {len(checkpoint.tensors)}, such "
            f"as {few(list(checkpoint.tensors))}. Give a checkpoint that holds it."
        )
    return tensors


def _scale(found: Any, path: Path) -> float | None:
    """A scale factor as a number; None where there is none."""
    if not isinstance(found, int | float | Tensor):
        return None
    number = float(found) if not isinstance(found, Tensor) or found.numel() == 1 else 0.0
    if not 0 < number < float("inf"):
        raise CheckpointError(f"{path}: expected one scale_factor above 0, found {str(found)[:80]}. Take another file.")
    return number


def _config_in(metadata: Mapping[str, str]) -> Any:
    """The config that a safetensors file of ours holds as JSON; None for files of others, who may say anything."""
    try:
        return parse_json(metadata.get("config", "null"))
    except ValueError:
        return None


def _with_prefixes(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], Kind]:
    """Full CompVis names from those of any file, and its kind; a name of no Stable Diffusion v1 file is an error."""
    known = (UNET_PREFIX, FIRST_STAGE_PREFIX, "cond_stage_model.", AVERAGE_PREFIX, TEMPORAL_DECODER_PREFIX)
    if any(name.startswith(known) for name in tensors):
        strangers = [
            name for name in tensors if not name.startswith(known) and name not in SCHEDULE_NAMES + OPTIONAL_NAMES
        ]
        if strangers:
            raise CheckpointError(
                f"{path}: {len(strangers)} of {len(tensors)} tensors belong to no part of Stable Diffusion v1: "
                f"{few(strangers)}. Remove them, or take the original model."
            )
        return {_text_spelling(name): tensor for name, tensor in tensors.items()}, Kind.COMPVIS
    if "time_embed.0.weight" in tensors:
        return {UNET_PREFIX + name: tensor for name, tensor in tensors.items()}, Kind.COMPVIS
    if "encoder.conv_in.weight" in tensors or "decoder.conv_in.weight" in tensors:
        is_compvis = any(name.startswith(("encoder.down.", "decoder.up.")) for name in tensors)
        kind = Kind.COMPVIS if is_compvis else Kind.DIFFUSERS
        return compvis_tensors("compvis vae" if is_compvis else "vae", tensors), kind
    if is_release(tensors):
        return compvis_tensors("author", tensors), Kind.AUTHOR
    if "time_embedding.linear_1.weight" in tensors:
        return compvis_tensors("unet", tensors), Kind.DIFFUSERS
    if any(text_name(name) == "text_model.embeddings.token_embedding.weight" for name in tensors):
        return compvis_tensors("text_encoder", tensors), Kind.DIFFUSERS
    raise CheckpointError(
        f"{path}: expected the weights of Stable Diffusion v1 or of a part of it, found {len(tensors)} tensors of "
        f"another model{': ' + few(list(tensors)) if tensors else ''}. Check that it is the file you meant."
    )


def _text_spelling(name: str) -> str:
    if not name.startswith(TEXT_PREFIX):
        return name
    return TEXT_PREFIX + text_name(name.removeprefix(TEXT_PREFIX))


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
