"""A function of single rows, a few of them at a time, that keeps nothing but its input for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor


def in_chunks(function: Callable[[Tensor], Tensor], weights: Sequence[Tensor], x: Tensor, num_rows: int) -> Tensor:
    """`function(x)` for a function that treats each row of `x` (its first dimension) alone and keeps its shape.

    Forward and backward go through it `num_rows` at a time, the backward computes each part again, so that what the
    function makes on its way exists for one part only. weights: all that `function` uses and that may be trained; their
    gradients are summed in float32 at least, and differ from those of `function(x)` by the order of sums.
    """
    if not torch.is_grad_enabled():
        return function(x)
    return _InChunks.apply(function, num_rows, x, *weights)


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[[Tensor], Tensor], num_rows: int, x: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.function, ctx.num_rows = function, num_rows
        ctx.autocast = _autocast_of(x.device.type)
        ctx.save_for_backward(x, *weights)
        parts = x.split(num_rows)
        first = function(parts[0])
        out = first.new_empty(x.shape)
        out[:num_rows] = first
        for start, part in zip(range(num_rows, len(x), num_rows), parts[1:], strict=True):
            out[start : start + num_rows] = function(part)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        of_x, *of_weights = ctx.needs_input_grad[2:]
        trained = [weight for weight, is_needed in zip(weights, of_weights, strict=True) if is_needed]
        gradient_of_x = torch.empty_like(x) if of_x else None
        sums: list[Tensor] = []
        for start in range(0, len(x), ctx.num_rows):
            rows = slice(start, start + ctx.num_rows)
            with torch.enable_grad(), ExitStack() as stack:
                for words in ctx.autocast:
                    stack.enter_context(torch.autocast(**words, cache_enabled=False))
                part = x[rows].detach().requires_grad_(of_x)
                out = ctx.function(part)
            found = torch.autograd.grad(out, [part, *trained] if of_x else trained, gradient[rows])
            if of_x:
                gradient_of_x[rows], *found = found
            sums = sums or [torch.zeros_like(one, dtype=torch.promote_types(one.dtype, torch.float32)) for one in found]
            for total, one in zip(sums, found, strict=True):
                total.add_(one)
        totals = (total.to(weight.dtype) for total, weight in zip(sums, trained, strict=True))
        return None, None, gradient_of_x, *(next(totals) if is_needed else None for is_needed in of_weights)


def _autocast_of(device: str) -> list[dict[str, Any]]:
    """What `torch.autocast` is to be told so that it is again as it is now, for a device and for the processor."""
    kinds = [kind for kind in dict.fromkeys((device, "cpu")) if torch.amp.is_autocast_available(kind)]
    return [
        {"device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        for kind in kinds
    ]
