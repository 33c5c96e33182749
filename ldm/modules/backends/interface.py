"""What a back end of attention is, and what its choice depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """An attention to compute: `num_rows` (batch x heads) independent matrices of num_queries x num_keys weights."""

    device: torch.device
    dtype: torch.dtype
    num_rows: int
    num_queries: int
    num_keys: int
    dim: int  # channels of a head
    is_masked: bool = False


class Frames(NamedTuple):
    """Temporal attention: the frames of each pixel attend to each other. Queries, keys, values: `(b t) n (heads d)`.

    max_period: of the rotation by position, see `temporal.rotate_by_position`; 0: none.
    radius, sees_first: a frame sees frames at most `radius` away, and the first one of the clip; -1: all.
    """

    num_frames: int
    num_heads: int
    max_period: float
    radius: int = -1
    sees_first: bool = False

    def case(self, q: Tensor) -> Case:
        """The case of these queries."""
        num_rows, dim = q.shape[0] // self.num_frames * q.shape[1] * self.num_heads, q.shape[2] // self.num_heads
        return Case(q.device, q.dtype, num_rows, self.num_frames, self.num_frames, dim, self.radius >= 0)


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    run: (q, k, v, mask), as `attend`; with `over_frames` (q, k, v, `Frames`) -> `(b t) n (heads d)`.
    why_not: the reason why it cannot compute a case, or with None any case on this machine; None where it can.
    supports: whether "auto" takes it for a case; the first entry of the registry wins.
    takes_mask: whether it can leave keys out.
    is_option: whether a config may name it.
    """

    run: Callable[..., Tensor]
    why_not: Callable[[Case | None], str | None] = lambda case: None
    supports: Callable[[Case], bool] = lambda case: False
    over_frames: bool = False
    takes_mask: bool = True
    is_option: bool = True
