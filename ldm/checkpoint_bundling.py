"""A trained checkpoint -> a bundle, the folder of small files that `checkpoint_bundle` describes.

The averages of the weights take the place of the weights, everything is float16, and of the config stays what sampling
needs. A bundle that is too large for a repository is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm.checkpoint import check_unet, unet_tensors
from ldm.checkpoint_bundle import CONFIG, WEIGHTS, bundle_files, is_bundle, sha256_of
from ldm.checkpoint_config import CLASSES, DECODER_PLACE
from ldm.checkpoint_decoder import (
    has_temporal_decoder,
    load_temporal_decoder,
    temporal_decoder_node,
    temporal_decoder_tensors,
)
from ldm.checkpoint_encoders import build_text_encoder, load_first_stage, prefixed
from ldm.checkpoint_names import (
    FIRST_STAGE_PREFIX,
    TEMPORAL_DECODER_PREFIX,
    TEXT_PREFIX,
    UNET_PREFIX,
    is_temporal,
)
from ldm.checkpoint_reading import Checkpoint, CheckpointError, first_stage_tensors, text_tensors
from ldm.checkpoint_temporal import CLIP_WORDS, MODEL, MODEL_WORDS
from ldm.checkpoint_writing import check_room, full_config, halved, save_tensors
from ldm.clip_settings import sampling_defaults
from ldm.errors import UserError

MAX_FILE, MAX_TOTAL = 16_000_000, 48_000_000  # bytes
MAX_IMAGE_PART = 15_000_000  # of the UNet's image weights in one file
ENTRY = 200  # at most so many bytes say what a tensor is called and where it is
SOURCES = ("ckpt_path", "random_seed", "tokenizer")  # words of networks that say where they come from
HEADER = "# A bundled model: what sampling needs to know. Written by scripts/convert.py --format bundle.\n"


def bundled(
    checkpoint: Checkpoint,
    sampling: Mapping[str, Any],
    text: Checkpoint | None = None,
    decoder: Checkpoint | None = None,
    temporal_decoder: Checkpoint | None = None,
) -> Checkpoint:
    """What of a checkpoint goes into a bundle: float16 weights, and a config without paths.

    sampling: defaults of sampling, on top of those in the checkpoint's config, see `sampling_defaults`.
    text, decoder: checkpoints to take the text encoder and the autoencoder from; None: the same. That autoencoder makes
        the same latents: all but its decoder is what it was.
    temporal_decoder: a checkpoint to take the layers over time of the decoder from; None: the same, if it has them and
        its own decoder, which they were trained with.

    Raises `CheckpointError` unless every tensor of all networks is there and fits.
    """
    config = bundle_config(full_config(checkpoint), sampling)
    source = text or checkpoint
    tensors = prefixed(UNET_PREFIX, unet_tensors(checkpoint))
    first_stage = first_stage_tensors(checkpoint)
    tensors |= prefixed(FIRST_STAGE_PREFIX, first_stage if decoder is None else _redecoded(first_stage, decoder))
    tensors |= prefixed(TEXT_PREFIX, text_tensors(source))
    own = checkpoint if decoder is None and has_temporal_decoder(checkpoint) else None
    over_time = temporal_decoder or own
    if over_time is not None:
        tensors |= prefixed(TEMPORAL_DECODER_PREFIX, temporal_decoder_tensors(over_time))
        config["model"]["params"][DECODER_PLACE] = _without_sources(temporal_decoder_node(over_time))
    result = replace(checkpoint, tensors=halved(tensors, checkpoint.path), own_config=config, kind="ours", metadata={})
    check_unet(result)
    load_first_stage(result)
    if over_time is not None:
        load_temporal_decoder(replace(result, path=over_time.path), first_stage_tensors(result))
    build_text_encoder(replace(result, path=source.path))  # whose name the message is to have
    return result


def _redecoded(first_stage: Mapping[str, Tensor], decoder: Checkpoint) -> Mapping[str, Tensor]:
    """The tensors of the autoencoder in `decoder`; raises CheckpointError unless it encodes as `first_stage` does."""
    found = first_stage_tensors(decoder)
    for name, tensor in first_stage.items():
        if name.startswith(("encoder.", "quant_conv.")) and not (name in found and torch.equal(found[name], tensor)):
            raise CheckpointError(
                f"{decoder.path}: expected the autoencoder of the checkpoint with nothing but another decoder, found "
                f"another {name}; train it with decoder_only, from the one that prepared the clips"
            )
    return found


def bundle_config(config: Mapping[str, Any], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The words of a whole config that sampling reads: networks, schedule, clips, and its own defaults."""
    params = config["model"]["params"]
    words = {word: params.get(word, default) for word, default in MODEL_WORDS.items()}
    for place in CLASSES:
        if place == DECODER_PLACE:
            continue  # which comes from a training of its own
        if not isinstance(params.get(place), Mapping):
            raise CheckpointError(
                f"model.params.{place}: expected a node with target and params in the checkpoint's config, found "
                "none; a bundle has all three networks. Give a checkpoint of a training run."
            )
        words[place] = _without_sources(params[place])
    result: dict[str, Any] = {"model": {"target": MODEL, "params": words}}
    for first, *steps, last in CLIP_WORDS.values():
        found = config.get(first) or {}
        for step in steps:
            found = found.get(step) or {}
        if last in found:
            place = result.setdefault(first, {})
            for step in steps:
                place = place.setdefault(step, {})
            place[last] = found[last]
    sampling = {**(config.get("sampling") or {}), **sampling}
    return {**result, "sampling": sampling_defaults({"sampling": sampling})}


def _without_sources(node: Mapping[str, Any]) -> dict[str, Any]:
    inner = {word: value for word, value in node["params"].items() if word not in SOURCES}
    return {"target": node["target"], "params": inner}


def write_bundle(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what `bundled` gave; other files of the folder stay as they are, but count where they are weights.

    Raises `UserError` where a file or all of them would be too large. New files appear one by one, the config last: a
    bundle half written over another is found out by its sha256 sums.
    """
    files = {f"{name}.safetensors": part for name, part in _parts(checkpoint.tensors)}
    old = {path.name for path in bundle_files(folder)} if is_bundle(folder) else set()
    kept = [path for path in folder.glob("*.safetensors") if path.name not in old | set(files)]
    _check_sizes(files, folder, sum(path.stat().st_size for path in kept))
    check_room(folder / CONFIG, checkpoint.tensors)
    partials = {name: folder / f".{name}.partial" for name in (*files, CONFIG)}
    try:
        for name, part in files.items():
            save_tensors(part, partials[name], {})
        weights = {name: sha256_of(partials[name]) for name in files}
        text = yaml.safe_dump({**checkpoint.own_config, WEIGHTS: weights}, sort_keys=False, default_flow_style=None)
        partials[CONFIG].write_text(HEADER + text, encoding="utf-8")
        for name, partial in partials.items():
            os.replace(partial, folder / name)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
    for name in old - set(partials):
        (folder / name).unlink(missing_ok=True)


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Names of files, without suffix, and what is in them."""
    image, others = [{}], {"autoencoder": {}, "text_encoder": {}, "temporal": {}, "temporal_decoder": {}}
    for name, tensor in tensors.items():
        if name.startswith(FIRST_STAGE_PREFIX):
            others["autoencoder"][name] = tensor
        elif name.startswith(TEXT_PREFIX):
            others["text_encoder"][name] = tensor
        elif name.startswith(TEMPORAL_DECODER_PREFIX):
            others["temporal_decoder"][name] = tensor
        elif is_temporal(name):
            others["temporal"][name] = tensor
        else:
            if image[-1] and _num_bytes(image[-1]) + tensor.nbytes > MAX_IMAGE_PART:
                image.append({})
            image[-1][name] = tensor
    yield from ((name, part) for name, part in others.items() if part)
    yield from ((f"unet-{number}", part) for number, part in enumerate(image, start=1))


def _check_sizes(files: Mapping[str, Mapping[str, Tensor]], folder: Path, kept: int) -> None:
    for name, part in files.items():
        if (size := _num_bytes(part)) >= MAX_FILE:
            raise UserError(
                f"{folder / name}: expected less than {MAX_FILE / 1e6:.0f} MB, as much as a bundle may have in one "
                f"file, found {size / 1e6:.1f} MB; write a smaller model, or another format"
            )
    total = sum(map(_num_bytes, files.values())) + kept
    if total >= MAX_TOTAL:
        beside = f", {kept / 1e6:.1f} MB of it weights that are there already" if kept else ""
        raise UserError(
            f"{folder}: expected less than {MAX_TOTAL / 1e6:.0f} MB of weights in a bundle, found "
            f"{total / 1e6:.1f} MB{beside}; write a smaller model, or another format"
        )


def _num_bytes(part: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes + ENTRY for tensor in part.values())
