"""Attention over frames as one operator of torch, computed by the kernels in `temporal_kernel`: who can have it.

An operator, so that autograd, fake tensors (counting memory without a GPU), the counter of operations and
torch.compile know what it gives, gets and costs. Triton is imported when it first runs. Shapes as in `temporal.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ldm.errors import UserError

MAX_FRAMES, MAX_DIM = 64, 256  # what fits one tile; head dimensions of Stable Diffusion are 40, 80, 160
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILES = 7  # halves of queries, keys, ... in shared memory in the backward kernel, as compiled for sm_86 and sm_90
_SHARED_MEMORY = 99 * 1024  # bytes that a program has on the smallest cards in question, the RTX 30 and 40 series


@torch.library.custom_op("video_sd::temporal_attention", mutates_args=())
def temporal_attention(
    q: Tensor, k: Tensor, v: Tensor, num_frames: int, num_heads: int, max_period: float, radius: int, sees_first: bool
) -> Tensor:
    """Each pixel's frames attend to each other: `(b t) n (heads d)` three times, of any strides -> the same.

    max_period: of the rotation by position, see `temporal.rotate_by_position`; 0: none.
    radius, sees_first: a frame sees those at most so far from it, and the clip's first one; -1: all.
    """
    from ldm.modules.backends.triton_kernel import launch_forward  # noqa: PLC0415 - asks for triton

    return launch_forward(q, k, v, (num_frames, num_heads, _log2(max_period), radius, sees_first))


@torch.library.custom_op("video_sd::temporal_attention_backward", mutates_args=())
def temporal_attention_backward(  # noqa: PLR0913, PLR0917 - operators take no structures
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_frames: int,
    num_heads: int,
    max_period: float,
    radius: int,
    sees_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of what came out."""
    from ldm.modules.backends.triton_kernel import launch_backward  # noqa: PLC0415 - asks for triton

    return launch_backward(grad, q, k, v, (num_frames, num_heads, _log2(max_period), radius, sees_first))


@temporal_attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@temporal_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.numbers = inputs[3:]


def _give_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = temporal_attention_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return (*gradients, *(None for _ in ctx.numbers))


temporal_attention.register_autograd(_give_back, setup_context=_keep)


@register_flop_formula(torch.ops.video_sd.temporal_attention)
def _flop(q_shape: torch.Size, k_shape: Any, v_shape: Any, num_frames: int, *_: Any, out_shape: Any = None) -> int:
    """Two products, of queries with keys and of weights with values."""
    return 4 * math.prod(q_shape) * num_frames


@register_flop_formula(torch.ops.video_sd.temporal_attention_backward)
def _flop_back(
    grad_shape: Any, q_shape: torch.Size, k_shape: Any, v_shape: Any, num_frames: int, *_: Any, out_shape: Any = None
) -> int:
    """Five: the weights again, theirs and the three gradients; as torch counts its own fused attention."""
    return 10 * math.prod(q_shape) * num_frames


def is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not(device: torch.device, dtype: torch.dtype, num_frames: int, dim: int) -> str | None:
    """Why the kernels cannot take heads of `dim` channels over `num_frames` frames; None where they can.

    Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU, slowly, for tests.
    """
    block, padded = (max(16, 1 << (size - 1).bit_length()) for size in (num_frames, dim // 2))
    needed, there = _TILES * block * padded * dtype.itemsize, _shared_memory(device)
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    is_elsewhere = device.type != "cuda" and not is_interpreted
    reasons = {
        "triton is not installed (pip install triton)": not is_installed(),
        f"the tensors are on '{device.type}', the kernel is for NVIDIA GPUs": is_elsewhere,
        f"the tensors are {dtype}": dtype not in _DTYPES,
        f"there are {num_frames} frames, the kernel takes {MAX_FRAMES} at most": num_frames > MAX_FRAMES,
        f"heads have {dim} channels, the kernel takes even numbers of them up to {MAX_DIM}": dim > MAX_DIM or dim % 2,
        f"it needs {needed} bytes of shared memory for {num_frames} frames and heads of {dim} channels in {dtype}, the "
        f"card has {there}": needed > there,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return _SHARED_MEMORY
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", _SHARED_MEMORY)


def check_fused(device: torch.device, dtype: torch.dtype, num_frames: int, dim: int) -> None:
    """Raise `UserError` where `why_not` has an answer."""
    reason = why_not(device, dtype, num_frames, dim)
    if reason:
        raise UserError(f"attention_backend: 'triton' cannot be used here: {reason}; use 'auto', 'sdpa' or 'math'")


def _log2(period: float) -> float:
    return math.log2(period) if period else 0.0
