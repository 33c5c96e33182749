"""What the forward pass keeps for the backward pass: checkpointing, inputs in host memory, a feed-forward in chunks.

Checkpointing (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost") is torch's non-reentrant one: it works
with frozen parameters and under autocast, and every trained parameter gets its gradient.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import UserError

MAX_LEAVING = 2  # inputs whose GPU memory is held until their copy to the host is complete

Run = Callable[..., Tensor]  # (block, x, other inputs of the block) -> output of the block


def run_directly(block: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """Call the block and keep everything its backward pass needs."""
    return block(x, *rest)


def run_again(
    block: Callable[..., Tensor], x: Tensor, *rest: Any, is_random: bool = False, memory: HostMemory | None = None
) -> Tensor:
    """Call the block, keep only its inputs, and call it again in the backward pass.

    is_random: the block draws random numbers, which are then repeated.  memory: holds `x` meanwhile; None: its device.
    """
    if not torch.is_grad_enabled():
        return block(x, *rest)
    if memory is None:
        return checkpoint(block, x, *rest, use_reentrant=False, preserve_rng_state=is_random)
    kept = memory.keep(x)
    return checkpoint(lambda *rest: block(kept.take(), *rest), *rest, use_reentrant=False, preserve_rng_state=is_random)


def choose_runs(blocks: Sequence[nn.Module], use_checkpoint: bool | int, inputs_on_host: bool) -> dict[nn.Module, Run]:
    """How to run each block: all of them again in the backward pass, none, or the first `use_checkpoint`.

    Inputs on the host cost no GPU memory, so with `inputs_on_host` a block that has parts runs each of them again.
    """
    memory = HostMemory() if inputs_on_host else None
    num_chosen = len(blocks) * use_checkpoint if isinstance(use_checkpoint, bool) else use_checkpoint
    runs: dict[nn.Module, Run] = dict.fromkeys(blocks, run_directly)
    for block in blocks[:num_chosen]:
        is_random = any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in block.modules())
        runs[block] = partial(run_again, is_random=is_random, memory=memory)
        if inputs_on_host and hasattr(block, "run_parts_by"):
            block.run_parts_by(runs[block])
            runs[block] = run_directly
    return runs


def check_memory_options(
    use_checkpoint: bool | int, feed_forward_frames: int | None, inputs_on_host: bool, num_blocks: int
) -> None:
    """Raise `UserError` for values that a network of `num_blocks` blocks cannot have, alone or together."""
    is_number = isinstance(use_checkpoint, int) and not isinstance(use_checkpoint, bool)
    if not isinstance(use_checkpoint, int) or (is_number and not 1 <= use_checkpoint <= num_blocks):
        raise UserError(
            f"use_checkpoint: expected true (all blocks), false (none) or how many of the network's {num_blocks} "
            f"blocks, the first ones, found {use_checkpoint!r}"
        )
    if feed_forward_frames is not None and (
        isinstance(feed_forward_frames, bool) or not isinstance(feed_forward_frames, int) or feed_forward_frames < 1
    ):
        raise UserError(
            "feed_forward_frames: expected the number of frames per call of the feed-forward, at least 1, or null for "
            f"all of them, found {feed_forward_frames!r}"
        )
    if not isinstance(inputs_on_host, bool):
        raise UserError(f"inputs_on_host: expected true or false, found {inputs_on_host!r}")
    if inputs_on_host and not use_checkpoint:
        raise UserError(
            "inputs_on_host: expected false with use_checkpoint: false, where blocks keep much more than their inputs, "
            "found true; set use_checkpoint: true, or leave inputs_on_host out"
        )


class HostMemory:
    """Keeps inputs of blocks on the host until the backward pass takes them; a copy of this object is empty."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._latest: weakref.ref[HostCopy] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> HostMemory:
        return HostMemory()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return HostMemory, ()

    def keep(self, x: Tensor) -> HostCopy:
        """Begin to copy `x` to the host. The first `take` returns `x` itself, later ones the copy."""
        copy = HostCopy(self, x, self._latest)
        self._latest = weakref.ref(copy)
        return copy

    def stream(self, x: Tensor) -> torch.cuda.Stream | None:
        """The copy stream of real tensors on a GPU, None for others."""
        if not x.is_cuda or hasattr(x, "fake_mode"):
            return None
        if x.device not in self._streams:
            self._streams[x.device] = torch.cuda.Stream(x.device)
        return self._streams[x.device]

    def send(self, x: Tensor) -> Tensor:
        """An asynchronous copy of `x` on the host, with the same strides."""
        stream = self.stream(x)
        if stream is None:
            return torch.empty_like(x, device="cpu").copy_(x)
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            host.copy_(x, non_blocking=True)
        # GPU memory is freed in stream order: later work waits for the earlier copies. Tensor.record_stream would free
        # it when the host notices, much later.
        self._leaving.append((x, stream.record_event()))
        self._free(MAX_LEAVING)
        return host

    def bring(self, host: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy of `host` on the device, and the event after which it is complete."""
        x = torch.empty_like(host, device=device)
        stream = self.stream(x)
        if stream is None:
            return x.copy_(host), None
        self._free(0)
        stream.wait_stream(torch.cuda.current_stream(device))  # for earlier work in this memory
        with torch.cuda.stream(stream):
            x.copy_(host, non_blocking=True)
        return x, stream.record_event()

    def _free(self, num_left: int) -> None:
        while len(self._leaving) > num_left:
            x, copied = self._leaving.popleft()
            torch.cuda.current_stream(x.device).wait_event(copied)


class HostCopy:
    """One input on the host, linked to the one kept before it, which the backward pass needs next."""

    def __init__(self, memory: HostMemory, x: Tensor, previous: weakref.ref[HostCopy] | None) -> None:
        self._memory, self._previous = memory, previous
        self._device, self._has_gradient = x.device, x.requires_grad
        self._original: Tensor | None = x
        self._host = memory.send(x.detach())
        self._fetched: tuple[Tensor, torch.cuda.Event | None] | None = None

    def take(self) -> Tensor:
        """The input on its device. From the second time on it also prefetches the one kept before it."""
        if self._original is not None:
            x, self._original = self._original, None
            return x
        self.prefetch()
        (x, copied), self._fetched = self._fetched, None
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        previous = self._previous and self._previous()
        if previous is not None:
            previous.prefetch()
        return x.requires_grad_(self._has_gradient)

    def prefetch(self) -> None:
        """Begin to copy it to its device, unless that has begun."""
        if self._fetched is None:
            self._fetched = self._memory.bring(self._host, self._device)


def in_chunks(function: Callable[[Tensor], Tensor], weights: Sequence[Tensor], x: Tensor, num_rows: int) -> Tensor:
    """`function(x)`, `num_rows` rows (of the first dimension) at a time in the forward and backward pass.

    function: treats each row by itself and keeps the shape; the backward pass computes each chunk again, so its
        intermediate results exist for one chunk only.
    weights: every weight of `function` that may be trained. Their gradients are summed in float32 or wider, and differ
        from those of `function(x)` by the order of sums.
    """
    if not torch.is_grad_enabled():
        return function(x)
    return _InChunks.apply(function, num_rows, x, *weights)


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], num_rows: int, x: Tensor, *weights: Tensor) -> Tensor:
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
                for options in ctx.autocast:
                    stack.enter_context(torch.autocast(**options, cache_enabled=False))
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
    """Arguments of `torch.autocast` that restore its present state, for a device and for the CPU."""
    kinds = [kind for kind in dict.fromkeys((device, "cpu")) if torch.amp.is_autocast_available(kind)]
    return [
        {"device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        for kind in kinds
    ]
