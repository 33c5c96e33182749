"""Inputs of blocks that wait in host memory between the forward and the backward pass (Rhu et al. 2016, "vDNN").

On a card they are copied to pinned memory by a stream of their own while the block works on them, and back one block
ahead of the one that the backward pass has reached. Streams wait for one another by events, never the host for them.
On the processor the copies are plain.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

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
