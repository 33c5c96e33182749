"""Temporal attention over few frames on a CPU: sums of products of whole maps instead of one matrix product per pixel.

For 5 frames and heads of 8 channels the call of a matrix product takes longer than the product. Here pixels lie last in
memory, `b t heads d n`, and each step is one operation over all of them. The work grows with the square of the frames.
Computed in float32 for every input type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.modules.backends.interface import Case, Frames
from ldm.modules.nn import angles_of_frames

MAX_FRAMES = 8
MAX_WORK = 160  # frames x channels of a head; above, matrix products are as fast
MIN_ROWS = 512  # pixels x heads x clips; below, the overhead of the steps is larger than their work


def supports(case: Case) -> bool:
    """Whether this is the faster way, as measured on CPUs with AVX-512."""
    if case.device.type != "cpu" or case.is_masked or not 2 <= case.num_keys <= MAX_FRAMES:
        return False
    return case.num_rows >= MIN_ROWS and case.num_keys * case.dim <= MAX_WORK


def run(q: Tensor, k: Tensor, v: Tensor, frames: Frames) -> Tensor:
    """Attention over all frames of a clip, see `Frames`."""
    return _FewFrames.apply(q, k, v, frames.num_frames, frames.num_heads, frames.max_period)


class _FewFrames(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, num_frames: int, num_heads: int, max_period: float
    ) -> Tensor:
        ctx.dtype = q.dtype
        q, k, v = (_to_maps(x, num_frames, num_heads) for x in (q, k, v))
        ctx.angles = None
        if max_period:
            angles = angles_of_frames(num_frames, q.shape[3], max_period)[:, None, :, None]  # t 1 d/2 1
            ctx.angles = angles.cos(), angles.sin()
        q, k = (_rotate(x, ctx.angles) for x in (q, k))
        logits = torch.stack([(q[:, i, None] * k).sum(3) for i in range(num_frames)], dim=1)  # b i j heads n
        weights = logits.mul_(q.shape[3] ** -0.5).softmax(dim=2)
        out = torch.empty_like(v)
        for i in range(num_frames):
            torch.sum(weights[:, i, :, :, None] * v, 1, out=out[:, i])
        ctx.save_for_backward(q, k, v, weights)
        return _to_tokens(out, ctx.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        num_frames, num_heads, scale = q.shape[1], q.shape[2], q.shape[3] ** -0.5
        gradient = _to_maps(gradient, num_frames, num_heads)
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i in range(num_frames):
            here, weight = gradient[:, i, None], weights[:, i]
            of_weight = (here * v).sum(3)
            of_v.addcmul_(weight[:, :, :, None], here)
            of_logit = (weight * (of_weight - (weight * of_weight).sum(1, keepdim=True))).mul_(scale)[:, :, :, None]
            torch.sum(of_logit * k, 1, out=of_q[:, i])
            of_k.addcmul_(of_logit, q[:, i, None])
        of_q, of_k = (_rotate(x, ctx.angles, sign=-1) for x in (of_q, of_k))
        return *(_to_tokens(x, ctx.dtype) for x in (of_q, of_k, of_v)), None, None, None


def _to_maps(x: Tensor, num_frames: int, num_heads: int) -> Tensor:
    """`(b t) n (heads d)` -> float32 `b t heads d n`, contiguous."""
    num_tokens = x.shape[1]
    return x.float().transpose(1, 2).contiguous().view(-1, num_frames, num_heads, x.shape[2] // num_heads, num_tokens)


def _to_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`b t heads d n`, contiguous -> `(b t) n (heads d)`, contiguous."""
    b, num_frames, num_heads, dim, num_tokens = x.shape
    return x.view(b * num_frames, num_heads * dim, num_tokens).transpose(1, 2).contiguous().to(dtype)


def _rotate(x: Tensor, angles: tuple[Tensor, Tensor] | None, sign: int = 1) -> Tensor:
    """`temporal.rotate_by_position`, or its inverse with sign -1: `b t heads d n` -> the same."""
    if angles is None:
        return x
    (cosine, sine), half = angles, x.shape[3] // 2
    out, first, second = torch.empty_like(x), x[:, :, :, :half], x[:, :, :, half:]
    torch.mul(first, cosine, out=out[:, :, :, :half]).addcmul_(second, sine, value=-sign)
    torch.mul(second, cosine, out=out[:, :, :, half:]).addcmul_(first, sine, value=sign)
    return out
