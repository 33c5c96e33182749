"""Folders in the layout of diffusers -> tensors under CompVis's names: pipelines, and single parts of them.

The author's later release comes in that layout too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldm.checkpoint.files import CheckpointError, read_file
from ldm.checkpoint.names import (
    CLASS_NAME,
    FIRST_STAGE_PREFIX,
    TEXT_PREFIX,
    UNET_PREFIX,
    Kind,
    unet_from_diffusers,
    unet_from_release,
)
from ldm.config.untrusted import checked_text
from ldm.files import parse_json
from ldm.modules.state_dicts import as_convolution, few, first_stage_from_diffusers, text_name

WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
MAX_HEADS = 256
# Folder of each part, and what its config may call it.
PARTS = {
    "unet": ("UNet2DConditionModel", CLASS_NAME),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
}


@dataclass
class FolderContents:
    """What a folder holds; see `Checkpoint`, whose fields these are."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    kind: Kind = Kind.DIFFUSERS
    num_heads: int | None = None
    scale_factor: float | None = None


def read_folder(folder: Path) -> FolderContents:
    """A diffusers pipeline, all of it or some of its parts, or the folder of one part; raises `CheckpointError`."""
    folders = {part: folder / part for part in PARTS if (folder / part).is_dir()}
    if not folders and (folder / "config.json").is_file():
        kind = _read_json(folder / "config.json").get("_class_name", "CLIPTextModel")
        folders = {part: folder for part, names in PARTS.items() if kind in names}
    if not folders:
        raise CheckpointError(
            f"{folder}: expected a diffusers folder with unet/, vae/ or text_encoder/ in it, found "
            f"{few(sorted(entry.name for entry in folder.iterdir())) or 'nothing'}. Give the folder that holds "
            "them, or a checkpoint file."
        )
    contents = FolderContents()
    for part, part_folder in folders.items():
        config = _read_part_config(part, part_folder)
        is_release = config.get("_class_name") == CLASS_NAME
        contents.tensors |= compvis_tensors("author" if is_release else part, _read_weights(part, part_folder))
        if is_release:
            contents.kind = Kind.AUTHOR
        if part == "unet":
            contents.num_heads = _num_heads(config, part_folder / "config.json")
        elif part == "vae" and type(scale := config.get("scaling_factor")) in (int, float):
            contents.scale_factor = float(scale)
    return contents


def compvis_tensors(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full CompVis names for the tensors of one part.

    part: "unet", "vae", "text_encoder" in diffusers' names, "author" for the release's UNet, or "compvis vae".
    """
    if part in ("unet", "author"):
        names = unet_from_release(tensors) if part == "author" else unet_from_diffusers(tensors)
        return {UNET_PREFIX + names[name]: tensor for name, tensor in tensors.items()}
    if part == "text_encoder":
        return {TEXT_PREFIX + text_name(name): tensor for name, tensor in tensors.items()}
    names = {name: name for name in tensors} if part == "compvis vae" else first_stage_from_diffusers(tensors)
    return {FIRST_STAGE_PREFIX + names[name]: as_convolution(names[name], value) for name, value in tensors.items()}


def _read_weights(part: str, folder: Path) -> dict[str, Tensor]:
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise CheckpointError(
            f"{folder}: expected the weights in {WEIGHT_FILES[part == 'text_encoder']}, found no such file. "
            "Download the folder again."
        )
    contents = read_file(weights)
    state = contents.get("state_dict", contents)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{weights}: expected 'state_dict' to be a dict of tensors, found {type(state).__name__}")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _read_part_config(part: str, folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: expected the {part}'s config, found no such file. Download the folder again.")
    config = _read_json(path)
    found = config.get("_class_name", PARTS[part][0])
    if found not in PARTS[part]:
        raise CheckpointError(
            f"{path}: expected _class_name {' or '.join(PARTS[part])}, found {found}. Only parts of Stable Diffusion "
            "v1 are read."
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        contents = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, found something else ({error}). Download it again.") from None
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(contents).__name__}. Download it again.")
    return contents


def _num_heads(config: Mapping[str, Any], path: Path) -> int:
    """The number of heads, which diffusers calls `attention_head_dim`; raises for other families of UNets."""
    expected = {
        "use_linear_projection": False,
        "class_embed_type": None,
        "addition_embed_type": None,
        "resnet_time_scale_shift": "default",
        "act_fn": "silu",
    }
    for word, value in expected.items():
        if config.get(word, value) != value:
            raise CheckpointError(
                f"{path}: expected {word} = {json.dumps(value)}, as in Stable Diffusion v1, found "
                f"{json.dumps(config[word])}. Other families, such as SD 2 and SDXL, are not read."
            )
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    if type(heads) is not int or not 0 < heads <= MAX_HEADS:
        raise CheckpointError(f"{path}: expected one number of attention heads for all levels, found {heads}.")
    return heads


CONFIG = "config.yaml"
WEIGHTS = "weights"  # the section of the config that lists the files
BUNDLED = Path(__file__).resolve().parents[2] / "models" / "drive"  # the model that comes with the project
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
