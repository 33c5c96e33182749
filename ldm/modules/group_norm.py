"""Group norm as SD v1 has it, over 32 groups with statistics in float32, exact and fast on a processor too."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NARROW = 4  # channels a group, up to which our own sums are faster on a CPU than torch's channels-last kernel ...
MANY_PIXELS = 256  # ... of so many pixels or more


class GroupNorm32(nn.GroupNorm):
    """Group norm over 32 groups whose statistics are taken in float32 for half-precision inputs: `b c h w` -> same."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(32, channels, eps=eps)

    def forward(self, x: Tensor, num_frames: int | None = None) -> Tensor:
        """`num_frames`: take the statistics over that many images at a time, the frames of a clip; None: over each."""
        if num_frames is not None:
            height = x.shape[-2]
            over_clip = self._normalised(rearrange(x, "(b t) c h w -> b c (t h) w", t=num_frames))
            return rearrange(over_clip, "b c (t h) w -> (b t) c h w", h=height)
        return self._normalised(x)

    def _normalised(self, x: Tensor) -> Tensor:
        half = x.dtype in (torch.float16, torch.bfloat16)
        out = x.float() if half else x
        weight, bias = (self.weight.float(), self.bias.float()) if half else (self.weight, self.bias)
        if x.device.type == "cpu":
            if self._is_slow(out):
                return NarrowGroups.apply(out, weight, bias, self.num_groups, self.eps).to(x.dtype)
            out = out - group_means(out, self.num_groups)
        return F.group_norm(out, self.num_groups, weight, bias, self.eps).to(x.dtype)

    def _is_slow(self, x: Tensor) -> bool:
        """Whether torch's kernel would take its time: on groups of few channels, channels last."""
        is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return is_last and x.shape[1] <= NARROW * self.num_groups and x.shape[2] * x.shape[3] >= MANY_PIXELS


@torch.no_grad()
def group_means(x: Tensor, num_groups: int) -> Tensor:
    """Means per image and group, `b c h w` -> `b c 1 1`, to take off first: group norm does not depend on them.

    torch's channels-last kernel for CPUs computes the variance as E[x^2] - E[x]^2, which loses four digits on a
    group whose values are nearly alike.
    """
    means = reduce(x, "b c h w -> b c", "mean")  # over pixels first, the fast direction in channels-last memory
    return rearrange(_over_groups(means, num_groups, "mean"), "b c -> b c 1 1")


class NarrowGroups(torch.autograd.Function):
    """Group norm (Wu and He 2018, eq. 1 to 6) of channels-last activations, by sums over pixels.

    Means are taken off, twice, before squares are summed up. Of values z, normalised, with gradients g:
    dx = weight g / deviation - (mean of weight g + z mean of (weight g z)) / deviation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        rows = rearrange(x, "b c h w -> b (h w) c")
        num_values = _values(rows, num_groups)
        centred = rows - _over_groups(rows.sum(1, keepdim=True), num_groups) / num_values
        centred -= _over_groups(centred.sum(1, keepdim=True), num_groups) / num_values  # what rounding has left
        squares = torch.linalg.vector_norm(centred, dim=1, keepdim=True).square()
        inverse = (_over_groups(squares, num_groups) / num_values + eps).rsqrt()
        ctx.save_for_backward(centred, inverse, weight)
        ctx.num_groups = num_groups
        out = torch.addcmul(bias, centred, inverse * weight)
        return rearrange(out, "b (h w) c -> b c h w", h=x.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        centred, inverse, weight = ctx.saved_tensors
        rows = rearrange(gradient, "b c h w -> b (h w) c")
        sums, products = (value.sum(1, keepdim=True) for value in (rows, rows * centred))  # `b 1 c`
        mean, slope = (_over_groups(value * weight, ctx.num_groups) for value in (sums, products))
        num_values = _values(rows, ctx.num_groups)
        constant, factor = -inverse * mean / num_values, -(inverse**3) * slope / num_values
        of_input = torch.addcmul(constant, rows, inverse * weight).addcmul_(centred, factor)
        of_weight, of_bias = (products * inverse).sum((0, 1)), sums.sum((0, 1))
        return rearrange(of_input, "b (h w) c -> b c h w", h=gradient.shape[2]), of_weight, of_bias, None, None


def _over_groups(by_channel: Tensor, num_groups: int, how: str = "sum") -> Tensor:
    """Sum or mean over the channels of each group, at each of them: `... c` -> same."""
    of_group = reduce(by_channel, "... (g c) -> ... g", how, g=num_groups)
    return repeat(of_group, "... g -> ... (g c)", c=by_channel.shape[-1] // num_groups)


def _values(rows: Tensor, num_groups: int) -> int:
    """How many values a group has of `b n c`."""
    return rows.shape[1] * rows.shape[2] // num_groups
