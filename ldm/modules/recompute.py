"""What of the forward pass is kept for the backward pass: with checkpointing, no more than the inputs of each block.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", by torch's non-reentrant checkpoint: it works with
frozen parameters and under autocast, and gives every trained parameter its gradient. The inputs themselves may wait in
host memory, see `host_inputs`.
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

MOST_ON_THE_WAY = 2  # inputs whose memory on the card is not free yet, for their copy may not have ended


class HostMemory:
    """Keeps tensors on the host until they are taken; a copy of this object starts empty."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._latest: weakref.ref[Waiting] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> HostMemory:
        return HostMemory()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return HostMemory, ()

    def keep(self, x: Tensor) -> Waiting:
        """Begin to copy `x` to the host. The first `take` gives `x` itself, later ones what was copied."""
        waiting = Waiting(self, x, self._latest)
        self._latest = weakref.ref(waiting)
        return waiting

    def stream(self, x: Tensor) -> torch.cuda.Stream | None:
        """The stream of the copies of real tensors on a card, None for all else."""
        if not x.is_cuda or hasattr(x, "fake_mode"):
            return None
        if x.device not in self._streams:
            self._streams[x.device] = torch.cuda.Stream(x.device)
        return self._streams[x.device]

    def send(self, x: Tensor) -> Tensor:
        """A copy of `x` on the host, which may still be under way; strides stay."""
        stream = self.stream(x)
        if stream is None:
            return torch.empty_like(x, device="cpu").copy_(x)
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            host.copy_(x, non_blocking=True)
        # The card's memory is given back in the order of its own work: what comes next waits for the copy before.
        # Tensor.record_stream would give it back when the host happens to notice, far behind.
        self._leaving.append((x, stream.record_event()))
        self._let_go(MOST_ON_THE_WAY)
        return host

    def bring(self, host: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy of `host` on the device, and the event after which it is whole."""
        x = torch.empty_like(host, device=device)
        stream = self.stream(x)
        if stream is None:
            return x.copy_(host), None
        self._let_go(0)
        stream.wait_stream(torch.cuda.current_stream(device))  # for whatever was in this memory before
        with torch.cuda.stream(stream):
            x.copy_(host, non_blocking=True)
        return x, stream.record_event()

    def _let_go(self, num_left: int) -> None:
        while len(self._leaving) > num_left:
            x, copied = self._leaving.popleft()
            torch.cuda.current_stream(x.device).wait_event(copied)


class Waiting:
    """One input on the host, and the way to the one that was kept before it, which the backward pass wants next."""

    def __init__(self, memory: HostMemory, x: Tensor, previous: weakref.ref[Waiting] | None) -> None:
        self._memory, self._previous = memory, previous
        self._device, self._has_gradient = x.device, x.requires_grad
        self._given: Tensor | None = x
        self._host = memory.send(x.detach())
        self._back: tuple[Tensor, torch.cuda.Event | None] | None = None

    def take(self) -> Tensor:
        """The input on its device. From the second time on, the one before it is called back as well."""
        if self._given is not None:
            x, self._given = self._given, None
            return x
        self.call_back()
        (x, copied), self._back = self._back, None
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        previous = self._previous and self._previous()
        if previous is not None:
            previous.call_back()
        return x.requires_grad_(self._has_gradient)

    def call_back(self) -> None:
        """Begin to copy it to its device, unless that has begun."""
        if self._back is None:
            self._back = self._memory.bring(self._host, self._device)


Run = Callable[..., Tensor]  # (block, x, whatever else the block takes) -> what the block makes of them


def run_directly(block: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """Call the block: all that its backward pass needs is kept."""
    return block(x, *rest)


def run_again(
    block: Callable[..., Tensor], x: Tensor, *rest: Any, is_random: bool = False, memory: HostMemory | None = None
) -> Tensor:
    """Call the block, keep its inputs alone, and call it once more in the backward pass.

    is_random: the block draws random numbers, which have to be the same then.  memory: where `x` waits meanwhile; None:
        where it is.
    """
    if not torch.is_grad_enabled():
        return block(x, *rest)
    if memory is None:
        return checkpoint(block, x, *rest, use_reentrant=False, preserve_rng_state=is_random)
    waiting = memory.keep(x)

    def on_what_waits(*rest: Any) -> Tensor:
        return block(waiting.take(), *rest)

    return checkpoint(on_what_waits, *rest, use_reentrant=False, preserve_rng_state=is_random)


def check_memory_words(
    use_checkpoint: bool | int, feed_forward_frames: int | None, inputs_on_host: bool, num_blocks: int
) -> None:
    """Raise `UserError` for values that a network of so many blocks cannot have, alone or together."""
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
            "feed_forward_frames: expected how many frames go through the feed-forward at a time, at least 1, or null "
            f"for all of them, found {feed_forward_frames!r}"
        )
    if not isinstance(inputs_on_host, bool):
        raise UserError(f"inputs_on_host: expected true or false, found {inputs_on_host!r}")
    if inputs_on_host and not use_checkpoint:
        raise UserError(
            "inputs_on_host: expected false with use_checkpoint: false, where blocks keep much more than their inputs, "
            "found true; set use_checkpoint: true, or leave inputs_on_host out"
        )


def chosen_runs(blocks: Sequence[nn.Module], use_checkpoint: bool | int, inputs_on_host: bool) -> dict[nn.Module, Run]:
    """For each block how to run it: all of them again in the backward pass, none, or that many from the start.

    On the host, what waits costs the card nothing: a block that can be run in parts then is, and called directly.
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
