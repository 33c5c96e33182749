"""Temporal attention as a torch custom op (Triton): supported devices and shapes.

Autograd, fake tensors (memory counts without a GPU), the operation counter and torch.compile see one operator with
known shapes and cost. The kernels are in `triton_kernel`, which imports triton when they first run.
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

from ldm.modules.backends.interface import Case, Frames

MAX_FRAMES, MAX_DIM = 64, 256  # one tile; heads of Stable Diffusion have 40, 80 and 160 channels
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILES = 7  # halves of queries, keys, ... in shared memory in the backward kernel, as compiled for sm_86 and sm_90
_SHARED_MEMORY = 99 * 1024  # bytes of a program on the smallest supported GPUs, the RTX 30 and 40 series


def run(q: Tensor, k: Tensor, v: Tensor, frames: Frames) -> Tensor:
    """Attention over the frames that `Frames` describes; tensors of any strides."""
    return temporal_attention(q, k, v, *frames)


def supports(case: Case) -> bool:
    return case.device.type == "cuda" and why_not(case) is None


def why_not(case: Case | None) -> str | None:
    """The reason why the kernels cannot compute a case, or with None any case here; None where they can.

    Triton's interpreter (TRITON_INTERPRET=1) runs them on a CPU, slowly, for tests.
    """
    if not is_installed():
        return "triton is not installed; pip install triton on a machine with an NVIDIA GPU"
    if case is None:
        return None
    device, num_frames, dim = case.device, case.num_keys, case.dim
    block, padded = (max(16, 1 << (size - 1).bit_length()) for size in (num_frames, dim // 2))
    needed, available = _TILES * block * padded * case.dtype.itemsize, _shared_memory(device)
    reasons = {
        f"the tensors are on '{device.type}', the kernel is for NVIDIA GPUs": device.type != "cuda"
        and os.environ.get("TRITON_INTERPRET") != "1",
        f"the tensors are {case.dtype}": case.dtype not in _DTYPES,
        f"there are {num_frames} frames, the kernel takes at most {MAX_FRAMES}": num_frames > MAX_FRAMES,
        f"heads have {dim} channels, the kernel takes an even number of at most {MAX_DIM}": dim > MAX_DIM or dim % 2,
        f"it needs {needed} bytes of shared memory for {num_frames} frames and heads of {dim} channels in "
        f"{case.dtype}, the GPU has {available}": needed > available,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda" or not torch.cuda.is_available():
        return _SHARED_MEMORY
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", _SHARED_MEMORY)


@torch.library.custom_op("video_sd::temporal_attention", mutates_args=())
def temporal_attention(
    q: Tensor, k: Tensor, v: Tensor, num_frames: int, num_heads: int, max_period: float, radius: int, sees_first: bool
) -> Tensor:
    from ldm.modules.backends.triton_kernel import launch_forward  # noqa: PLC0415 - needs triton

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
    """Gradients of q, k and v from that of the output."""
    from ldm.modules.backends.triton_kernel import launch_backward  # noqa: PLC0415 - needs triton

    return launch_backward(grad, q, k, v, (num_frames, num_heads, _log2(max_period), radius, sees_first))


@temporal_attention.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@temporal_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.numbers = inputs[3:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = temporal_attention_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return (*gradients, *(None for _ in ctx.numbers))


temporal_attention.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.video_sd.temporal_attention)
def _flop(q_shape: torch.Size, k_shape: Any, v_shape: Any, num_frames: int, *_: Any, out_shape: Any = None) -> int:
    """Two products: queries with keys, weights with values."""
    return 4 * math.prod(q_shape) * num_frames


@register_flop_formula(torch.ops.video_sd.temporal_attention_backward)
def _flop_backward(
    grad_shape: Any, q_shape: torch.Size, k_shape: Any, v_shape: Any, num_frames: int, *_: Any, out_shape: Any = None
) -> int:
    """Five products: the weights again, their gradient and the three gradients; as torch counts fused attention."""
    return 10 * math.prod(q_shape) * num_frames


def _log2(period: float) -> float:
    return math.log2(period) if period else 0.0
