"""What the shapes of a UNet's tensors tell: the words it was built from, and whether it takes known frames.

A network that takes known frames has more input channels than its image model: 9 for 4, as in the public inpainting
checkpoint. Others store the weights of all 9 in one tensor; we keep those of the image model apart from the rest, and
this is where the one becomes the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.files import CheckpointError
from ldm.checkpoint.names import UNetLayout

FIRST, LAST = "input_blocks.0.0.weight", "out.2.weight"
KNOWN = "conditioning.temporal.known.weight"


def split_known(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's tensors, CompVis names, with the input channels of known frames in a tensor of their own.

    They are the last out + 1 of 2 * out + 1, as in Stable Diffusion's inpainting checkpoint. Any other UNet's tensors,
    and those of one that is split already, come back as they are.
    """
    tensors = dict(tensors)
    if FIRST in tensors and LAST in tensors and KNOWN not in tensors:
        num_latents = tensors[LAST].shape[0]
        if tensors[FIRST].shape[1] == 2 * num_latents + 1:
            first = tensors[FIRST]
            tensors[FIRST], tensors[KNOWN] = first[:, :num_latents].contiguous(), first[:, num_latents:].contiguous()
    return tensors


def join_known(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite of `split_known`."""
    tensors = dict(tensors)
    if KNOWN in tensors:
        tensors[FIRST] = torch.cat([tensors[FIRST], tensors.pop(KNOWN)], dim=1)
    return tensors


def infer_unet_kwargs(
    tensors: Mapping[str, Tensor],
    num_heads: int = 8,
    where: str = "UNet",
    spelled: Callable[[Collection[str]], Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """The arguments of `UNetModel` that the shapes of its tensors, CompVis names, tell; heads they do not tell.

    where, spelled: for the message about a tensor that is not there, see `account`.
    """

    def shape(name: str) -> torch.Size:
        if name not in tensors:
            shown = name if spelled is None else spelled([*tensors, name])[name]
            raise CheckpointError(
                f"{where}: expected a UNet of Stable Diffusion v1, found one without {shown}. Give its config."
            )
        return tensors[name].shape

    layout = UNetLayout.of_compvis(tensors)
    model_channels, in_channels = shape(FIRST)[:2]
    levels = range(layout.num_levels)
    widths = [shape(f"{layout.first_block(level)}.out_layers.3.weight")[0] for level in levels]
    depth = sum(name.startswith("middle_block.1.") and name.endswith(".attn2.to_k.weight") for name in tensors)
    words = {
        "in_channels": in_channels + (tensors[KNOWN].shape[1] if KNOWN in tensors else 0),
        "out_channels": shape(LAST)[0],
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
    has_convolutions, has_attention = (
        any(name.endswith(f".temporal.{last}") for name in tensors) for last in ("weight", "to_q.weight")
    )
    if has_convolutions and not has_attention:
        words["temporal_attention"] = False
    elif has_attention and not has_convolutions:
        words["temporal_kernel_size"] = None
    if has_convolutions and "input_blocks.0.0.temporal.bias" not in tensors:
        words["temporal_changes_only"] = True
    elif has_attention and not any(name.endswith(".temporal.to_out.bias") for name in tensors):
        words["temporal_changes_only"] = True
    for word, name in (("fps_embedding", "fps"), ("known_level_embedding", "known_level")):
        if f"conditioning.temporal.{name}.0.weight" in tensors:
            words[word] = True
    return words


def refuse_linear_projections(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise `CheckpointError` for a UNet of Stable Diffusion 2 or SDXL, CompVis names."""
    for name, tensor in tensors.items():
        if name.endswith(".proj_in.weight") and tensor.ndim == 2:
            raise CheckpointError(
                f"{path}: expected a UNet of Stable Diffusion v1, whose projections are 1x1 convolutions, found linear "
                f"ones ({name} {list(tensor.shape)}), as in Stable Diffusion 2 and SDXL. These are not read."
            )
