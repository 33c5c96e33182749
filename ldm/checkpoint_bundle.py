"""A small model as a folder of small files: a config, and weights in float16 that a repository can carry.

    config.yaml                 networks, schedule, clips, how to sample, and the sha256 of each file of weights
    autoencoder.safetensors     the first stage
    text_encoder.safetensors    CLIP's text half
    unet-1.safetensors, ...     the image weights of the UNet, in as many files as they need
    temporal.safetensors        its layers over time
    temporal_decoder.safetensors   those of the first stage's decoder, where it has some

All tensors have their full CompVis names. Other files beside them, such as a README, are nobody's business here. How
such folders are written is told in `checkpoint_bundling`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldm.checkpoint_files import CheckpointError, few, read_file
from ldm.config_text import checked_text

CONFIG = "config.yaml"
WEIGHTS = "weights"  # the section of the config that lists the files
BUNDLED = Path(__file__).resolve().parents[1] / "models" / "drive"  # the model that comes with the project
AGAIN = "Get the whole folder again."


def is_bundle(folder: Path) -> bool:
    """Whether the folder claims to be a bundle: it has a config of its own."""
    return (folder / CONFIG).is_file()


def read_bundle(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a bundle under their full names, and its config; raises `CheckpointError`.

    Every file of weights must be there and be the one that the config was written for.
    """
    config = _read_config(folder / CONFIG)
    tensors: dict[str, Tensor] = {}
    for name, sha256 in _listed(config.pop(WEIGHTS), folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: expected weights, as {CONFIG} says, found no such file. {AGAIN}")
        if (found := sha256_of(path)) != sha256:
            raise CheckpointError(
                f"{path}: expected the weights that {CONFIG} was written for, sha256 {sha256}, found sha256 {found} "
                f"({path.stat().st_size:,} bytes): damaged, or of another bundle. {AGAIN}"
            )
        part = read_file(path)["state_dict"]
        if twice := sorted(set(part) & set(tensors)):
            raise CheckpointError(f"{path}: expected each tensor in one file, found {few(twice)} in two. {AGAIN}")
        tensors |= part
    return tensors, config


def bundle_files(folder: Path) -> list[Path]:
    """The files that a bundle is made of, its config first; raises `CheckpointError` where that cannot be read."""
    listed = _listed(_read_config(folder / CONFIG)[WEIGHTS], folder)
    return [folder / CONFIG, *(folder / name for name in listed)]


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(checked_text(path))
    except (yaml.YAMLError, ValueError) as error:
        raise CheckpointError(f"{path}: expected YAML, found something else ({error}). {AGAIN}") from None
    missing = [word for word in ("model", WEIGHTS) if not isinstance(config, Mapping) or word not in config]
    if missing:
        raise CheckpointError(
            f"{path}: expected the config of a bundle, as scripts/convert.py --format bundle writes, found one without "
            f"{' and '.join(missing)}. Give a checkpoint file or another folder."
        )
    return dict(config)


def _listed(weights: Any, folder: Path) -> dict[str, str]:
    """File names and their sha256; names of files in other folders are refused."""
    is_sound = isinstance(weights, Mapping) and all(
        isinstance(name, str) and name == Path(name).name and name.endswith(".safetensors") and isinstance(value, str)
        for name, value in weights.items()
    )
    if not is_sound:
        raise CheckpointError(
            f"{folder / CONFIG}: expected at {WEIGHTS} the names of .safetensors files in this folder, each with its "
            f"sha256, found {weights!r}. {AGAIN}"
        )
    return dict(weights)
