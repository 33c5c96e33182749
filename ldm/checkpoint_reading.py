"""Every kind of file and folder that Stable Diffusion v1's weights come in -> one dict of tensors, CompVis names.

Whole models, single parts and bare state dicts, in CompVis's or diffusers' naming. How files are opened safely is in
`checkpoint_files`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint_config import confined
from ldm.checkpoint_files import CheckpointError, few, read_file
from ldm.checkpoint_names import (
    AVERAGE_PREFIX,
    FIRST_STAGE_PREFIX,
    OPTIONAL_NAMES,
    POSITION_IDS,
    SCHEDULE_NAMES,
    TEXT_PREFIX,
    UNET_PREFIX,
    UNetLayout,
    first_stage_from_diffusers,
    is_first_stage_attention_weight,
    text_name,
    unet_from_diffusers,
)

WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}


@dataclass
class Checkpoint:
    """The contents of a checkpoint.

    path: where it was read from.
    tensors: every tensor under its full CompVis name (`model.diffusion_model.*`, ...), on the CPU, in the file's dtype.
    own_config: the whole resolved config of the run that wrote it, as the file has it, None where it has none. Take
        `config` instead.
    kind: "ours" (it has a config), "compvis" or "diffusers".
    num_heads: attention heads of the UNet where a diffusers config says so; CompVis files never do.
    scale_factor: what its first stage's latents are multiplied by, where the file says so.
    """

    path: Path
    tensors: dict[str, Tensor]
    own_config: Mapping[str, Any] | None = None
    kind: str = "compvis"
    num_heads: int | None = None
    scale_factor: float | None = None

    @property
    def config(self) -> dict[str, Any] | None:
        """The file's config, confined to what a stranger's may say; raises `ConfigError` where it says more."""
        return None if self.own_config is None else confined(self.own_config, str(self.path))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Open a `.ckpt`, a `.safetensors` (told apart by content, not by suffix) or a diffusers folder.

    A file may hold a whole model, only its UNet, first stage or text encoder, or a bare state dict of one of them in
    CompVis's or diffusers' naming. Raises `CheckpointError`.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: expected a checkpoint (.ckpt, .safetensors, or a diffusers folder), found no such file or "
            "folder. Check the path."
        )
    contents = read_file(path)
    config = contents.get("config")
    is_ours = isinstance(config, Mapping) and "model" in config
    state = contents.get("state_dict", contents)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: expected 'state_dict' to be a dict of tensors, found {type(state).__name__}")
    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    tensors = _with_prefixes(tensors, path)
    scale = state.get("scale_factor", contents.get("scale_factor"))  # CompVis with scale_by_std; our autoencoder
    return Checkpoint(
        path,
        tensors,
        own_config=config if is_ours else None,
        kind="ours" if is_ours else "compvis",
        scale_factor=float(scale) if isinstance(scale, int | float | Tensor) else None,
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


def unet_words(tensors: Mapping[str, Tensor], num_heads: int = 8, where: str = "UNet") -> dict[str, Any]:
    """The arguments of `UNetModel` that the shapes of its tensors, CompVis names, tell; heads they do not tell."""

    def shape(name: str) -> torch.Size:
        if name not in tensors:
            raise CheckpointError(
                f"{where}: expected a UNet of Stable Diffusion v1, found one without {name}. Give its config."
            )
        return tensors[name].shape

    layout = UNetLayout.of_compvis(tensors)
    model_channels, in_channels = shape("input_blocks.0.0.weight")[:2]
    levels = range(layout.num_levels)
    widths = [shape(f"{layout.first_block(level)}.out_layers.3.weight")[0] for level in levels]
    depth = sum(name.startswith("middle_block.1.") and name.endswith(".attn2.to_k.weight") for name in tensors)
    words = {
        "in_channels": in_channels,
        "out_channels": shape("out.2.weight")[0],
        "model_channels": model_channels,
        "num_res_blocks": layout.num_res_blocks,
        "attention_resolutions": [2**level for level in sorted(layout.attention_levels, reverse=True)],
        "channel_mult": [width // model_channels for width in widths],
        "num_heads": num_heads,
        "transformer_depth": depth,
        "context_dim": shape("middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
    }
    if "input_blocks.0.0.temporal.weight" in tensors:
        words["temporal_kernel_size"] = shape("input_blocks.0.0.temporal.weight")[-1]
    return words


def refuse_linear_projections(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise `CheckpointError` for a UNet of Stable Diffusion 2 or SDXL, CompVis names."""
    for name, tensor in tensors.items():
        if name.endswith(".proj_in.weight") and tensor.ndim == 2:
            raise CheckpointError(
                f"{path}: expected a UNet of Stable Diffusion v1, whose projections are 1x1 convolutions, found linear "
                f"ones ({name} {list(tensor.shape)}), as in Stable Diffusion 2 and SDXL. These are not read."
            )


def account(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    *,
    where: str,
    may_miss: Callable[[str], bool] = lambda name: False,
) -> None:
    """Compare names and shapes; a `CheckpointError` lists what is missing, what is unexpected and what does not fit.

    where: what is being filled and from where, for the message.
    may_miss: says of an expected name that it need not be there.
    """
    missing = [name for name in expected if name not in found and not may_miss(name)]
    unexpected = [name for name in found if name not in expected]
    shapes = [
        f"{name} (expected {list(tensor.shape)}, found {list(found[name].shape)})"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    counts = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    problems = [f"{len(names)} {word}: {few(names)}" for word, names in counts if names]
    if problems:
        raise CheckpointError(
            f"{where}: the tensors in the file are not those of the network ({len(expected)} expected, {len(found)} "
            f"found); {'; '.join(problems)}. Check that the file and the config belong together."
        )


def _with_prefixes(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Full CompVis names from those of any file; a name that belongs to no Stable Diffusion v1 file is an error."""
    known = (UNET_PREFIX, FIRST_STAGE_PREFIX, "cond_stage_model.", AVERAGE_PREFIX)
    if any(name.startswith(known) for name in tensors):
        strangers = [
            name for name in tensors if not name.startswith(known) and name not in SCHEDULE_NAMES + OPTIONAL_NAMES
        ]
        if strangers:
            raise CheckpointError(
                f"{path}: {len(strangers)} of {len(tensors)} tensors belong to no part of Stable Diffusion v1: "
                f"{few(strangers)}. Remove them, or take the original model."
            )
        return {_text_spelling(name): tensor for name, tensor in tensors.items()}
    if "time_embed.0.weight" in tensors:
        return {UNET_PREFIX + name: tensor for name, tensor in tensors.items()}
    if "encoder.conv_in.weight" in tensors or "decoder.conv_in.weight" in tensors:
        is_compvis = any(name.startswith(("encoder.down.", "decoder.up.")) for name in tensors)
        return _compvis_tensors("compvis vae" if is_compvis else "vae", tensors)
    if "time_embedding.linear_1.weight" in tensors:
        return _compvis_tensors("unet", tensors)
    if any(text_name(name) == "text_model.embeddings.token_embedding.weight" for name in tensors):
        return _compvis_tensors("text_encoder", tensors)
    raise CheckpointError(
        f"{path}: expected the weights of Stable Diffusion v1 or of a part of it, found {len(tensors)} tensors of "
        f"another model{': ' + few(list(tensors)) if tensors else ''}. Check that it is the file you meant."
    )


def _text_spelling(name: str) -> str:
    if not name.startswith(TEXT_PREFIX):
        return name
    return TEXT_PREFIX + text_name(name.removeprefix(TEXT_PREFIX))


def _compvis_tensors(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Full CompVis names for the tensors of one part of a diffusers pipeline."""
    if part == "unet":
        names = unet_from_diffusers(tensors)
        return {UNET_PREFIX + names[name]: tensor for name, tensor in tensors.items()}
    if part == "text_encoder":
        return {TEXT_PREFIX + text_name(name): tensor for name, tensor in tensors.items()}
    names = {name: name for name in tensors} if part == "compvis vae" else first_stage_from_diffusers(tensors)
    return {FIRST_STAGE_PREFIX + names[name]: as_convolution(names[name], value) for name, value in tensors.items()}


def as_convolution(name: str, tensor: Tensor) -> Tensor:
    """A weight of the first stage's attention in CompVis's form, a 1x1 convolution; any other tensor as it is."""
    is_linear = is_first_stage_attention_weight(name) and tensor.ndim == 2
    return tensor[..., None, None] if is_linear else tensor


def _read_folder(folder: Path) -> Checkpoint:
    """A diffusers pipeline, all of it or some of its parts, or the folder of one part."""
    folders = {part: folder / part for part in PARTS if (folder / part).is_dir()}
    if not folders and (folder / "config.json").is_file():
        kind = _read_json(folder / "config.json").get("_class_name", "CLIPTextModel")
        folders = {part: folder for part, name in PARTS.items() if name == kind}
    if not folders:
        raise CheckpointError(
            f"{folder}: expected a diffusers folder with unet/, vae/ or text_encoder/ in it, found "
            f"{few(sorted(entry.name for entry in folder.iterdir())) or 'nothing'}. Give the folder that holds "
            "them, or a checkpoint file."
        )
    checkpoint = Checkpoint(folder, {}, kind="diffusers")
    for part, part_folder in folders.items():
        config = _read_part_config(part, part_folder)
        weights = next((part_folder / name for name in WEIGHT_FILES if (part_folder / name).is_file()), None)
        if weights is None:
            raise CheckpointError(
                f"{part_folder}: expected the weights in {WEIGHT_FILES[part == 'text_encoder']}, found no such file. "
                "Download the folder again."
            )
        tensors = {name: value for name, value in read_file(weights).items() if isinstance(value, Tensor)}
        checkpoint.tensors |= _compvis_tensors(part, tensors)
        if part == "unet":
            checkpoint.num_heads = _num_heads(config, part_folder / "config.json")
    return checkpoint


def _read_part_config(part: str, folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: expected the {part}'s config, found no such file. Download the folder again.")
    config = _read_json(path)
    found = config.get("_class_name", PARTS[part])
    if found != PARTS[part]:
        raise CheckpointError(
            f"{path}: expected _class_name {PARTS[part]}, found {found}. Only parts of Stable Diffusion v1 are read."
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
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
    if not isinstance(heads, int):
        raise CheckpointError(f"{path}: expected one number of attention heads for all levels, found {heads}.")
    return heads
