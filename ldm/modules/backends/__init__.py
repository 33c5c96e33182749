"""Softmax attention, and the registry of back ends that compute it.

To add a back end, add an entry to `BACKENDS`; `attention_backend` of a config names it, or "auto" takes the first entry
that supports the case.

triton      temporal attention by our own kernel: NVIDIA GPU, up to 64 frames; for other attention as auto
(few_frames temporal attention on a CPU; only by auto)
math        two matrix products and a softmax, for short rows
sdpa        torch's own, which picks a kernel for the device (the default)
flash_attn  the flash-attn package: NVIDIA GPU, float16 or bfloat16
xformers    the xformers package: NVIDIA GPU
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError
from ldm.modules.backends import few_frames, triton_op
from ldm.modules.backends.interface import Backend, Case

_MAX_CUDA_ROWS = 65_535  # the fused CUDA kernels launch one block row per (batch, head)
_MAX_CPU_WEIGHTS = 2**22  # 16 MiB of float32; larger blocks are returned to the system and cleared again each time


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa", mask: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(d)) v: `b heads n d`, `b heads m d`, `b heads m d` -> `b heads n d`.

    mask: bool, broadcast to `b heads n m`, True where a query sees a key.

    Raises `UserError` when the back end cannot run on these tensors.
    """
    num_rows = q.shape[0] * q.shape[1]
    case = Case(q.device, q.dtype, num_rows, q.shape[2], k.shape[2], q.shape[3], mask is not None)
    chosen = choose(backend, case)
    assert mask is None or chosen.takes_mask, f"the back end {backend} takes no mask"
    return in_parts(chosen.run, q, k, v, mask, num_launches(q.shape[0], q.shape[1]) if q.is_cuda else 1)


def choose(name: str, case: Case, over_frames: bool = False) -> Backend | None:
    """The back end that an `attention_backend` stands for. Raises `UserError` where the named one cannot run.

    over_frames: one that computes temporal attention as a whole; None: there is none, attend row by row.
    """
    named = BACKENDS.get(name)
    if named is None or (named.over_frames and not over_frames):
        return next((one for one in BACKENDS.values() if one.over_frames == over_frames and one.supports(case)), None)
    if named.over_frames != over_frames:
        return None
    _check(name, named.why_not(case))
    return named


def check_backend(name: str) -> None:
    """Raise `UserError` if a config may not name this back end, or if it cannot run on this machine at all."""
    names = options()
    if name not in names:
        raise UserError(f"attention_backend: expected one of {', '.join(names)}, found '{name}'")
    if name in BACKENDS:
        _check(name, BACKENDS[name].why_not(None))


def options(takes_mask: bool = False) -> list[str]:
    """The values of `attention_backend`; takes_mask: only those that can leave keys out."""
    return [*(name for name, one in BACKENDS.items() if one.is_option and one.takes_mask >= takes_mask), "auto"]


@contextmanager
def choosing_for_gpu() -> Iterator[None]:
    """Within it "auto" takes the Triton kernel on any device, to count its memory on tensors without values."""
    plain = BACKENDS["triton"]
    BACKENDS["triton"] = replace(plain, supports=lambda case: case.num_keys <= triton_op.MAX_FRAMES)
    try:
        yield
    finally:
        BACKENDS["triton"] = plain


def _check(name: str, reason: str | None) -> None:
    if reason is not None:
        raise UserError(f"attention_backend: '{name}' cannot be used here: {reason}; or use 'auto', 'sdpa' or 'math'")


def num_launches(batch: int, num_heads: int) -> int:
    """Number of even parts of a batch of which none has more rows than a fused CUDA kernel takes."""
    return math.ceil(batch / (_MAX_CUDA_ROWS // num_heads))


def in_parts(
    run: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, num_parts: int
) -> Tensor:
    """`run(q, k, v, mask)`, for `num_parts` parts of the batch in turn."""
    if num_parts == 1:
        return run(q, k, v, mask)
    parts = zip(*(x.chunk(num_parts) for x in (q, k, v)), strict=True)
    return torch.cat([run(*part, mask) for part in parts])


def _math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    num_weights = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    num_parts = 1 if q.is_cuda else min(q.shape[0], math.ceil(num_weights / _MAX_CPU_WEIGHTS))
    return in_parts(_products, q, k, v, mask, num_parts)


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return torch.matmul(logits.softmax(dim=-1, dtype=torch.float32).to(v.dtype), v)


def products_are_faster(case: Case) -> bool:
    """Whether two products and a softmax beat fused attention.

    Measured on CPUs, forward and backward, with one thread and two: in bfloat16 fused attention takes 2 to 12 times as
    long up to 256 keys; in float32 1 to 1.6 times for heads below 16 channels, the width of a register, and about as
    long or longer up to 80 keys for others. Many weights go to SDPA, which does not store them.
    On a GPU fused attention works on tiles of 64 and more, whatever the length of a row.
    """
    if case.device.type != "cpu":
        return max(case.num_queries, case.num_keys) <= 16
    if case.dtype not in (torch.float32, torch.float64):
        max_keys, max_weights = 256, 2**18
    else:
        max_keys, max_weights = (256, 2**17) if case.dim < 16 else (80, 2**15)
    return case.num_keys <= max_keys and case.num_queries * case.num_keys <= max_weights


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _from_package(module: str, function: str, only_half: bool) -> Backend:
    """A back end of another package; only_half: it needs float16 or bfloat16."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return getattr(importlib.import_module(module), function)(q, k, v).transpose(1, 2)

    def why_not(case: Case | None) -> str | None:
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            return f"its package cannot be imported ({error}); pip install '.[gpu]' on a machine with an NVIDIA GPU"
        if case is not None and case.device.type != "cuda":
            return f"it needs an NVIDIA GPU, the tensors are on '{case.device.type}'"
        if case is not None and only_half and case.dtype not in (torch.float16, torch.bfloat16):
            return f"it needs float16 or bfloat16, the tensors are {case.dtype}; train with precision bf16-mixed"
        return None

    return Backend(run, why_not, takes_mask=False)


BACKENDS: dict[str, Backend] = {
    "triton": Backend(triton_op.run, triton_op.why_not, triton_op.supports, over_frames=True),
    "few_frames": Backend(few_frames.run, supports=few_frames.supports, over_frames=True, is_option=False),
    "math": Backend(_math, supports=products_are_faster),
    "sdpa": Backend(_sdpa, supports=lambda case: True),
    "flash_attn": _from_package("flash_attn", "flash_attn_func", only_half=True),
    "xformers": _from_package("xformers.ops", "memory_efficient_attention", only_half=False),
}
