"""The small parts every block of the UNet is made of: timestep embedding, zero start, convolutions laid in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoids of the diffusion step, cosines first (DDPM, after Vaswani et al. 2017): `b` -> float32 `b dim`.

    Timesteps may be fractional. An odd `dim` ends in a zero.
    """
    half = dim // 2
    halves = torch.arange(half, dtype=torch.float32, device=timesteps.device)  # from the CPU they would be waited for
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * halves / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def angles_of_frames(num_frames: int, dim: int, max_period: float, device: torch.device | None = None) -> Tensor:
    """By how much each pair of channels of each frame is rotated (RoFormer, Su et al. 2021): float32 `t dim/2`."""
    frequencies = max_period ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    return torch.arange(num_frames, dtype=torch.float32, device=device)[:, None] * frequencies


def at_each_pixel(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of one pixel as the linear layer it is: `b c h w` -> `b c' h w`, channels last if `x` is."""
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def is_smaller_than_kernel(x: Tensor, kernel: Tensor) -> bool:
    """Whether activations that lie channels last had better be copied to lie like the kernel, and the result back.

    On a processor a convolution else copies the kernel, and its gradient, which for small maps is more.
    """
    return not x.is_cuda and kernel.is_contiguous() and kernel.numel() > x.numel()


def use_channels_last(network: nn.Module) -> None:
    """Lay the kernels of `network` in memory as its activations lie, channels last: names, shapes, values stay.

    A convolution over channels-last activations would else copy its kernel at every call, and its gradient back.
    Kernels of one pixel lie so either way. That of a 1-D convolution is laid for the 2-D one with a width of 1.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.weight[0, 0].numel() > 1:
            rows = rearrange(layer.weight.data, "o i ... -> o ... i").contiguous()
            layer.weight.data = rearrange(rows, "o ... i -> o i ...")


def zeroed(module: nn.Module) -> nn.Module:
    """Set every parameter of `module` to zero and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


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


class AttentionProjections(nn.Module):
    """Owns `to_q`, `to_k` and `to_v`, linear layers without bias, which its subclass makes."""

    joined: Tensor | None = None  # the weights of all three, or of keys and values if these are made of something else

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x`, `b n c`, keys and values of `context`, `b m d`; None: of x."""
        of_x = x if context is None else context
        if self.joined is None:
            return self.to_q(x), self.to_k(of_x), self.to_v(of_x)
        if context is None:
            return F.linear(x, self.joined).chunk(3, dim=-1)
        keys_and_values = self.joined[-2 * self.to_k.out_features :]
        return self.to_q(x), *F.linear(of_x, keys_and_values).chunk(2, dim=-1)

    def join(self) -> None:
        """Lay the weights side by side; they must not be trained, and moving or converting them undoes it."""
        layers = [self.to_q, self.to_k, self.to_v]
        if any(layer.weight.requires_grad for layer in layers):
            raise ValueError("weights that are trained stay apart: the optimiser knows them one by one")
        if self.to_q.in_features != self.to_k.in_features:
            layers = layers[1:]
        joined = torch.cat([layer.weight.detach() for layer in layers])
        parts = joined.split([layer.out_features for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            layer.weight.data = part
        self.joined = joined

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.joined = None
        return super()._apply(fn, recurse)


def join_projections(network: nn.Module) -> int:
    """Join those of every attention in a frozen network, in place; returns in how many."""
    attentions = [layer for layer in network.modules() if isinstance(layer, AttentionProjections)]
    for layer in attentions:
        layer.join()
    return len(attentions)
