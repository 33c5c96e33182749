"""The small parts every block of the UNet is made of: timestep embedding, group norm, zero start."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoids of the diffusion step, cosines first (DDPM, after Vaswani et al. 2017): `b` -> float32 `b dim`.

    Timesteps may be fractional. An odd `dim` ends in a zero.
    """
    half = dim // 2
    halves = torch.arange(half, dtype=torch.float32, device=timesteps.device)  # from the CPU they would be waited for
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * halves / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


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
        if x.device.type == "cpu":
            out = out - self._group_means(out)
        weight, bias = (self.weight.float(), self.bias.float()) if half else (self.weight, self.bias)
        return F.group_norm(out, self.num_groups, weight, bias, self.eps).to(x.dtype)

    @torch.no_grad()
    def _group_means(self, x: Tensor) -> Tensor:
        """Means per clip and group, `b c 1 1`, to take off first: group norm does not depend on them.

        torch's channels-last kernel for CPUs computes the variance as E[x^2] - E[x]^2, which loses four digits on a
        group whose values are nearly alike.
        """
        means = reduce(x, "b c h w -> b c", "mean")  # over pixels first, the fast direction in channels-last memory
        means = reduce(means, "b (g c) -> b g", "mean", g=self.num_groups)
        return repeat(means, "b g -> b (g c) 1 1", c=self.num_channels // self.num_groups)


def at_each_pixel(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of one pixel as the linear layer it is: `b c h w` -> `b c' h w`, channels last if `x` is."""
    out = F.linear(rearrange(x, "b c h w -> b h w c"), conv.weight.flatten(1), conv.bias)
    return rearrange(out, "b h w c -> b c h w")


def is_smaller_than_kernel(x: Tensor, kernel: Tensor) -> bool:
    """Whether activations that lie channels last had better be copied to lie like the kernel, and the result back.

    On a processor a convolution else copies the kernel, and its gradient, which for small maps is more.
    """
    return not x.is_cuda and kernel.is_contiguous() and kernel.numel() > x.numel()


def lay_channels_last(network: nn.Module) -> None:
    """Lay the kernels of `network` in memory as its activations lie, channels last: names, shapes, values stay.

    A convolution over channels-last activations would else copy its kernel at every call, and its gradient back.
    Kernels of one pixel lie so either way. That of a 1-D convolution is laid for the 2-D one with a width of 1.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.weight[0, 0].numel() > 1:
            rows = rearrange(layer.weight.data, "o i ... -> o ... i").contiguous()
            layer.weight.data = rearrange(rows, "o ... i -> o i ...")


def lay_for_this_machine(network: nn.Module) -> None:
    """Lay kernels channels last where there is a card; a processor does as `is_smaller_than_kernel` says."""
    if torch.cuda.is_available():
        lay_channels_last(network)


def zeroed(module: nn.Module) -> nn.Module:
    """Set every parameter of `module` to zero and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
