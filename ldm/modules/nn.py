"""The small parts every block of the UNet is made of: timestep embedding, zero start, convolutions laid in memory."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


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
