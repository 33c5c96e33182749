"""Attention of each frame to the frames around it, whose work and memory grow with the clip's length, not its square.

Beltagy et al. 2020, "Longformer" (section 3.1, sliding window; the first frame is its global token), in blocks: as many
queries as the window has frames share the keys that any of them sees. Shapes as in `temporal.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ldm.errors import UserError
from ldm.modules.attention_backends import MASKED_BACKENDS, attend


@dataclass(frozen=True)
class Window:
    """What a frame sees: `num_frames`, odd, with itself in the middle, and the clip's first frame if `sees_first`."""

    num_frames: int
    sees_first: bool

    @property
    def radius(self) -> int:
        return self.num_frames // 2


def check_window(local: int | None, sees_first: bool, backend: str) -> Window | None:
    """The window of these words of the config, None for all frames; raises `UserError`."""
    where = "unet_config.params.temporal_attention"
    if local is None:
        if sees_first:
            raise UserError(f"{where}.sees_first: means nothing without {where}.local; every frame sees the first one")
        return None
    if isinstance(local, bool) or not isinstance(local, int) or local < 1 or local % 2 == 0:
        raise UserError(
            f"{where}.local: expected an odd number of frames (as many before as after) or null, found {local!r}"
        )
    if backend not in MASKED_BACKENDS:
        raise UserError(
            f"{where}.local: expected attention_backend to be one of {', '.join(MASKED_BACKENDS)}, which can leave "
            f"frames out, found '{backend}'"
        )
    return Window(local, sees_first)


def attend_locally(q: Tensor, k: Tensor, v: Tensor, window: Window, backend: str = "sdpa") -> Tensor:
    """`attend` where each frame sees `window`: `b heads t d` three times -> `b heads t d`."""
    num_frames, num_heads, size = q.shape[-2], q.shape[1], window.num_frames
    num_blocks = -(-num_frames // size)
    surplus = num_blocks * size - num_frames
    queries = rearrange(F.pad(q, (0, 0, 0, surplus)), "b heads (n i) d -> b (heads n) i d", n=num_blocks)
    keys, values = (_around_blocks(x, window, surplus) for x in (k, v))
    mask = repeat(_seen(num_frames, num_blocks, window, q.device), "n i j -> 1 (heads n) i j", heads=num_heads)
    out = attend(queries, keys, values, backend, mask)
    return rearrange(out, "b (heads n) i d -> b heads (n i) d", n=num_blocks)[..., :num_frames, :]


def _around_blocks(x: Tensor, window: Window, surplus: int) -> Tensor:
    """The frames that each block of queries may see, `b heads t d` -> `b (heads n) j d`: those from `radius` before
    its first to `radius` after its last, zeros beyond the clip, and at the end the clip's first frame if it is seen."""
    radius, size = window.radius, window.num_frames
    padded = F.pad(x, (0, 0, radius, radius + surplus))
    around = rearrange(padded.unfold(-2, size + 2 * radius, size), "b heads n d j -> b heads n j d")
    if window.sees_first:
        first = repeat(x[..., :1, :], "b heads 1 d -> b heads n 1 d", n=around.shape[2])
        around = torch.cat([around, first], dim=-2)
    return rearrange(around, "b heads n j d -> b (heads n) j d")


def _seen(num_frames: int, num_blocks: int, window: Window, device: torch.device) -> Tensor:
    """Which of a block's keys each of its queries sees: bool `n i j`."""
    radius, size = window.radius, window.num_frames
    starts = size * torch.arange(num_blocks, device=device)[:, None, None]
    query = starts + torch.arange(size, device=device)[:, None]
    key = starts - radius + torch.arange(size + 2 * radius, device=device)
    is_near = (key - query).abs() <= radius
    # Queries beyond the clip's end are cut off later; they see something all the same, or their softmax has no sum.
    seen = is_near & (key >= 0) & ((key < num_frames) | (query >= num_frames))
    if window.sees_first:
        seen = torch.cat([seen, query > radius], dim=-1)  # nearer ones see it already
    return seen
