"""Checkpoints out: one file of everything under CompVis's names, or of temporal layers alone; whole or not at all.

Folders in diffusers' layout are written by `checkpoint_export`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.atomic import replacing
from ldm.checkpoint import unet_node
from ldm.checkpoint_bundle import is_bundle
from ldm.checkpoint_encoders import SD_V1_FIRST_STAGE, SD_V1_TEXT, fits_first_stage, fits_text_encoder
from ldm.checkpoint_files import few
from ldm.checkpoint_names import SCHEDULE_NAMES
from ldm.checkpoint_reading import Checkpoint, CheckpointError
from ldm.checkpoint_temporal import MODEL, MODEL_WORDS, temporal_part
from ldm.errors import UserError

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
