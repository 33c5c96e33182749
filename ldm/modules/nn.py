"""Parts that UNet blocks share: timestep embedding, memory layout of convolutions, group norm, attention projections.

On a CPU, torch's channels-last group norm is slow for few channels per group, and its variance E[x^2] - E[x]^2 loses
four digits where the values of a group are nearly equal. `GroupNorm32` avoids both.
"""

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
    halves = torch.arange(half, dtype=torch.float32, device=timesteps.device)  # no copy from the CPU
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * halves / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def angles_of_frames(num_frames: int, dim: int, max_period: float, device: torch.device | None = None) -> Tensor:
    """Angles by which pairs of channels of each frame are rotated (RoFormer, Su et al. 2021): float32 `t dim/2`."""
    frequencies = max_period ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    return torch.arange(num_frames, dtype=torch.float32, device=device)[:, None] * frequencies


def at_each_pixel(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution as a linear layer: `b c h w` -> `b c' h w`, channels last if `x` is."""
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def is_smaller_than_kernel(x: Tensor, kernel: Tensor) -> bool:
    """Whether it is cheaper to copy channels-last activations to the layout of the kernel, and the result back.

    Otherwise a convolution on a CPU copies the kernel and its gradient.
    """
    return not x.is_cuda and kernel.is_contiguous() and kernel.numel() > x.numel()


def use_channels_last(network: nn.Module) -> None:
    """Store the kernels of `network` channels last, as its activations are; names, shapes and values are unchanged.

    Otherwise each convolution copies its kernel at every call, and its gradient back. 1x1 kernels are the same in both
    layouts; the kernel of a 1-D convolution is stored for a 2-D one of width 1.
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


# Groups of at most so many channels and at least so many pixels are faster by `NarrowGroups` than by torch, on a CPU.
MAX_NARROW_CHANNELS, MIN_NARROW_PIXELS = 4, 256


class GroupNorm32(nn.GroupNorm):
    """Group norm over 32 groups with statistics in float32 for half-precision inputs: `b c h w` -> same."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(32, channels, eps=eps)

    def forward(self, x: Tensor, num_frames: int | None = None) -> Tensor:
        """num_frames: take statistics over the frames of a clip, that many images; None: over each image."""
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
            is_last = out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
            is_narrow = out.shape[1] <= MAX_NARROW_CHANNELS * self.num_groups
            if is_last and is_narrow and out.shape[2] * out.shape[3] >= MIN_NARROW_PIXELS:
                return NarrowGroups.apply(out, weight, bias, self.num_groups, self.eps).to(x.dtype)
            out = out - group_means(out, self.num_groups)
        return F.group_norm(out, self.num_groups, weight, bias, self.eps).to(x.dtype)


@torch.no_grad()
def group_means(x: Tensor, num_groups: int) -> Tensor:
    """Means of each image and group, `b c h w` -> `b c 1 1`; subtracting them leaves the result of group norm."""
    means = reduce(x, "b c h w -> b c", "mean")  # over pixels first: fast in channels-last memory
    return rearrange(_over_groups(means, num_groups, "mean"), "b c -> b c 1 1")


class NarrowGroups(torch.autograd.Function):
    """Group norm (Wu and He 2018, eq. 1 to 6) of channels-last activations, by sums over pixels.

    The mean is subtracted twice, the second time for rounding, before squares are summed. With normalised values z and
    gradients g: dx = (weight g - mean of (weight g) - z mean of (weight g z)) / deviation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        rows = rearrange(x, "b c h w -> b (h w) c")
        num_values = rows.shape[1] * rows.shape[2] // num_groups
        centred = rows - _over_groups(rows.sum(1, keepdim=True), num_groups) / num_values
        centred -= _over_groups(centred.sum(1, keepdim=True), num_groups) / num_values
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
        num_values = rows.shape[1] * rows.shape[2] // ctx.num_groups
        constant, factor = -inverse * mean / num_values, -(inverse**3) * slope / num_values
        of_input = torch.addcmul(constant, rows, inverse * weight).addcmul_(centred, factor)
        of_weight, of_bias = (products * inverse).sum((0, 1)), sums.sum((0, 1))
        return rearrange(of_input, "b (h w) c -> b c h w", h=gradient.shape[2]), of_weight, of_bias, None, None


def _over_groups(by_channel: Tensor, num_groups: int, how: str = "sum") -> Tensor:
    """Sum or mean over the channels of each group, repeated for each channel: `... c` -> same."""
    of_group = reduce(by_channel, "... (g c) -> ... g", how, g=num_groups)
    return repeat(of_group, "... g -> ... (g c)", c=by_channel.shape[-1] // num_groups)


class AttentionProjections(nn.Module):
    """Owns the linear layers `to_q`, `to_k` and `to_v` without bias, which its subclass builds."""

    joined: Tensor | None = None  # the weights of all three, or of keys and values if these have another input

    def project(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries from `x`, `b n c`, keys and values from `context`, `b m d`; None: from x."""
        of_x = x if context is None else context
        if self.joined is None:
            return self.to_q(x), self.to_k(of_x), self.to_v(of_x)
        if context is None:
            return F.linear(x, self.joined).chunk(3, dim=-1)
        keys_and_values = self.joined[-2 * self.to_k.out_features :]
        return self.to_q(x), *F.linear(of_x, keys_and_values).chunk(2, dim=-1)

    def join(self) -> None:
        """Store the frozen weights side by side, for one product; moving or converting them undoes it."""
        layers = [self.to_q, self.to_k, self.to_v]
        if any(layer.weight.requires_grad for layer in layers):
            raise ValueError("projections with trained weights cannot be joined: the optimiser holds each by itself")
        if self.to_q.in_features != self.to_k.in_features:
            layers = layers[1:]
        joined = torch.cat([layer.weight.detach() for layer in layers])
        for layer, part in zip(layers, joined.split([layer.out_features for layer in layers]), strict=True):
            layer.weight.data = part
        self.joined = joined

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.joined = None
        return super()._apply(fn, recurse)


def join_projections(network: nn.Module) -> int:
    """Join the projections of every attention in a frozen network, in place; returns the number of attentions."""
    attentions = [layer for layer in network.modules() if isinstance(layer, AttentionProjections)]
    for layer in attentions:
        layer.join()
    return len(attentions)
