"""Checkpoints out: one file of everything under CompVis's names, or of temporal layers alone; whole or not at all.

Folders in diffusers' layout are written by `checkpoint.diffusers`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint import check_unet, unet_node, unet_tensors
from ldm.checkpoint.encoders import (
    SD_V1_FIRST_STAGE,
    SD_V1_TEXT,
    build_text_encoder,
    fits_first_stage,
    fits_text_encoder,
    has_temporal_decoder,
    load_first_stage,
    load_temporal_decoder,
    prefixed,
    temporal_decoder_node,
    temporal_decoder_tensors,
)
from ldm.checkpoint.files import few
from ldm.checkpoint.layouts import CONFIG, WEIGHTS, bundle_files, is_bundle, sha256_of
from ldm.checkpoint.names import (
    FIRST_STAGE_PREFIX,
    SCHEDULE_NAMES,
    TEMPORAL_DECODER_PREFIX,
    TEXT_PREFIX,
    UNET_PREFIX,
    Kind,
)
from ldm.checkpoint.reading import (
    CLASSES,
    DECODER_PLACE,
    Checkpoint,
    CheckpointError,
    first_stage_tensors,
    text_tensors,
)
from ldm.checkpoint.temporal import CLIP_WORDS, MODEL, MODEL_WORDS, temporal_part
from ldm.errors import UserError
from ldm.files import replacing
from ldm.modules.temporal import is_temporal

SUFFIXES = {
    "full": (".ckpt", ".safetensors"), "temporal": (".safetensors",), "diffusers": (), "author": (), "bundle": ()
}  # fmt: skip
# What a folder written here may hold.
FOLDER_PARTS = {"unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"}


def write_full(checkpoint: Checkpoint, path: Path, half: bool = False) -> None:
    """Everything the checkpoint holds, averages too, and its config; to a `.ckpt` or `.safetensors`.

    half: float16 in place of float32. In a safetensors file the config is JSON in the metadata.
    """
    config = full_config(checkpoint)
    tensors = halved(checkpoint.tensors, checkpoint.path) if half else checkpoint.tensors
    check_room(path, tensors)
    with replacing(path) as partial:
        if path.suffix == ".safetensors":
            save_tensors(tensors, partial, {"config": json.dumps(config)})
        else:
            torch.save({"state_dict": dict(tensors), "config": config}, partial)


def write_temporal(checkpoint: Checkpoint, path: Path, half: bool = False) -> None:
    """The temporal layers alone, see `temporal_part`, to a `.safetensors`."""
    tensors, metadata = temporal_part(checkpoint)
    tensors = halved(tensors, checkpoint.path) if half else tensors
    check_room(path, tensors)
    with replacing(path) as partial:
        save_tensors(tensors, partial, metadata)


def full_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's own config without paths; for one without, what its tensors and its kind tell.

    The encoders of such a one are in it where they are Stable Diffusion v1's.
    """
    if (config := checkpoint.config) is not None:
        return config
    params = {**MODEL_WORDS, "unet_config": unet_node(checkpoint)}
    if checkpoint.scale_factor is not None:
        params["scale_factor"] = checkpoint.scale_factor
    if fits_first_stage(checkpoint, SD_V1_FIRST_STAGE):
        params["first_stage_config"] = copy.deepcopy(SD_V1_FIRST_STAGE)
    if fits_text_encoder(checkpoint, SD_V1_TEXT):
        params["cond_stage_config"] = copy.deepcopy(SD_V1_TEXT)
    return {"model": {"target": MODEL, "params": params}}


def halved(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The tensors with float16 in place of float32, those of the noise schedule excepted."""
    result = {
        name: tensor.half() if tensor.dtype == torch.float32 and name not in SCHEDULE_NAMES else tensor
        for name, tensor in tensors.items()
    }
    lost = [name for name, tensor in result.items() if not (tensor.isfinite() | ~tensors[name].isfinite()).all()]
    if lost:
        raise CheckpointError(f"{where}: {few(lost)} hold numbers too large for float16. Leave out --half.")
    return result


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file. "format" in its metadata tells other libraries that it is PyTorch's."""
    seen, own = set(), {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        is_alone = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        own[name] = tensor if is_alone else tensor.contiguous().clone()
    save_file(own, path, {"format": "pt", **metadata})


def check_room(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `UserError` where the disk has no room for the tensors; the folder of `path` is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{path}: expected room for {needed / 1e9:.2f} GB, found {free / 1e9:.2f} GB free on that disk; free some "
            "space, choose another place, or write half the size with --half"
        )


def check_output(path: Path, form: str, inputs: Sequence[Path], overwrite: bool) -> None:
    """Raise `UserError` for a place that a checkpoint of the kind `form` cannot or should not be written to."""
    suffixes = SUFFIXES[form]
    if suffixes and path.suffix not in suffixes:
        raise UserError(f"--out: expected a file name ending in {' or '.join(suffixes)} for {form}, found {path}")
    if not suffixes and path.suffix in SUFFIXES["full"]:
        raise UserError(f"--out: expected the name of a folder for {form}, found {path}; leave out {path.suffix}")
    resolved = path.resolve()
    for given in (one.resolve() for one in inputs):
        if resolved == given or given in resolved.parents or resolved in given.parents:
            raise UserError(f"--out: expected another place than the input's, found {path}; choose another name")
    if not os.path.lexists(path):
        return
    if path.is_dir() == bool(suffixes):
        kinds = ("a folder", "a file") if suffixes else ("a file", "a folder")
        raise UserError(f"--out: expected {kinds[1]} or nothing yet, found {kinds[0]}, {path}; choose another name")
    if _is_taken(path, form) and not overwrite:
        raise UserError(f"--out: expected a new name, found {path}, which exists; choose another, or add --overwrite")


def _is_taken(path: Path, form: str) -> bool:
    """Whether anything would be replaced; raises `UserError` where that could not be of the kind `form`."""
    if form == "bundle":
        return is_bundle(path)  # other files of the folder are left alone
    others = sorted({entry.name for entry in path.iterdir()} - FOLDER_PARTS) if path.is_dir() else []
    if others:
        raise UserError(
            f"--out: expected a new folder or one of diffusers' layout, found {path} with {few(others)} in it; choose "
            "another"
        )
    return path.is_file() or any(path.iterdir())


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` that takes its name when the block ends well and vanishes if it does not.

    What stood at `path` before stays until then.
    """
    partial, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


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

    sampling: defaults of sampling, merged onto those in the checkpoint's config; the caller checks them.
    text, decoder: checkpoints to take the text encoder and the autoencoder from; None: the same. That autoencoder makes
        the same latents: all but its decoder is what it was.
    temporal_decoder: a checkpoint to take the temporal layers of the decoder from; None: the same, if it has them and
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
    result = replace(
        checkpoint, tensors=halved(tensors, checkpoint.path), own_config=config, kind=Kind.OURS, metadata={}
    )
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
    return {**result, "sampling": {**(config.get("sampling") or {}), **sampling}}


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
