"""What the channels of known latents hold where nothing is known: a guess from the same place in other frames.

Zeros would do, and do where a place is known in no frame. But a network that is handed the blend of the known frames
need only learn in what a clip differs from it, and learns so much sooner; the mask says which is which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError

FILLS = ("blend", "zeros")


def fill_of_config(words: Mapping[str, Any] | None) -> str:
    """How a network trained with these `model.params.known_frames` has it, "blend" unless they say otherwise.

    None: "zeros", for a network that was trained elsewhere, such as the public inpainting one. Raises `UserError`.
    """
    fill = "zeros" if words is None else words.get("fill", "blend")
    if fill not in FILLS:
        raise UserError(f"model.params.known_frames.fill: expected one of {', '.join(FILLS)}, found {fill!r}")
    return fill


def filled(latents: Tensor, mask: Tensor, fill: str = "blend") -> Tensor:
    """Known latents, and between them the blend of those nearest in time, beyond them the nearest: `b t c h w`.

    mask: 1 where latents are not known, `b t 1 h w`; what `latents` holds there is not read. Images, without t, and
    places that no frame knows are 0 there. fill: "zeros" makes all places 0 that are not known.
    """
    is_known = mask == 0
    known = torch.where(is_known, latents, 0)
    if latents.ndim == 4 or fill == "zeros":
        return known
    before, since = _nearest(known, is_known, range(latents.shape[1]))
    after, until = _nearest(known, is_known, range(latents.shape[1] - 1, -1, -1))
    # Inverse distances as weights: the blend between two, the one there is beyond the last, 0 / tiny where none is.
    weight_before, weight_after = (1 / distance.clamp_min(1e-3) for distance in (since, until))
    weights = (weight_before + weight_after).clamp_min(1e-20)
    blend = (before * weight_before + after * weight_after) / weights
    return torch.where(is_known, latents, blend)


def _nearest(known: Tensor, is_known: Tensor, order: range) -> tuple[Tensor, Tensor]:
    """For each frame the last known latents in this order of frames and how many frames ago, infinity for never."""
    last, ago = torch.zeros_like(known[:, 0]), torch.full_like(known[:, 0, :1], torch.inf)
    nearest, distances = [], []
    for frame in order:
        last = torch.where(is_known[:, frame], known[:, frame], last)
        ago = torch.where(is_known[:, frame], 0, ago + 1)
        nearest.append(last)
        distances.append(ago)
    if order.step < 0:
        nearest, distances = nearest[::-1], distances[::-1]
    return torch.stack(nearest, dim=1), torch.stack(distances, dim=1)
