"""Optimiser states that lie in host memory and come to the card only while their weight is updated.

On a card the copies run on streams of their own, in pinned memory: the states of the next weight come in while one is
updated, and those of the last one go out. Nothing waits on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Any]  # tensors, quantised ones among them, and numbers


class HostStates:
    """The states of weights, by weight, in host memory. For weights in host memory it is a plain dictionary."""

    def __init__(self) -> None:
        self._states: dict[nn.Parameter, State] = {}
        self._coming: dict[nn.Parameter, tuple[State, torch.cuda.Event]] = {}
        self._written: dict[nn.Parameter, torch.cuda.Event] = {}
        self._next: dict[nn.Parameter, nn.Parameter] = {}  # the order of the last step
        self._last: nn.Parameter | None = None
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}

    def fetch(self, weight: nn.Parameter) -> State:
        """The states of a weight on its device; empty before its first update."""
        if weight.device.type != "cuda":
            return self._states.get(weight, {})
        if self._last is not None:
            self._next[self._last] = weight
        self._last = weight
        state = self._arrived(weight)
        following = self._next.get(weight)
        if following is not None and following is not weight and following not in self._coming:
            self._send_for(following)
        return state

    def keep(self, weight: nn.Parameter, state: State) -> None:
        """Take the states of a weight back into host memory."""
        if weight.device.type != "cuda":
            self._states[weight] = state
            return
        _, outwards = self._streams_of(weight.device)
        kept = self._states.setdefault(weight, {})
        outwards.wait_stream(torch.cuda.current_stream(weight.device))
        with torch.cuda.stream(outwards):
            for name, value in state.items():
                if not _is_moved(value):
                    kept[name] = value
                    continue
                if name not in kept:
                    kept[name] = rebuilt(value, lambda part: torch.empty_like(part, device="cpu", pin_memory=True))
                for here, there in zip(plain_parts(kept[name]), plain_parts(value), strict=True):
                    here.copy_(there, non_blocking=True)
                    there.record_stream(outwards)
            self._written[weight] = outwards.record_event()

    def set(self, weight: nn.Parameter, state: State) -> None:
        """Take over states that were read from a file."""
        is_pinned = weight.device.type == "cuda"

        def to_host(part: Tensor) -> Tensor:
            copy = part.detach().to("cpu", copy=True)
            return copy.pin_memory() if is_pinned else copy

        self._coming.pop(weight, None)
        self._written.pop(weight, None)
        self._states[weight] = {
            name: rebuilt(value, to_host) if _is_moved(value) else value for name, value in state.items()
        }

    def all(self) -> dict[nn.Parameter, State]:
        """Every weight's states, complete: waits for the copies that are under way."""
        for _, outwards in self._streams.values():
            outwards.synchronize()
        return self._states

    def end_step(self) -> None:
        """The next weight asked for is the first of another step."""
        self._last = None

    def _arrived(self, weight: nn.Parameter) -> State:
        if weight not in self._states:
            return {}
        if weight not in self._coming:
            self._send_for(weight)
        state, event = self._coming.pop(weight)
        now = torch.cuda.current_stream(weight.device)
        now.wait_event(event)
        for value in state.values():
            for part in plain_parts(value) if _is_moved(value) else ():
                part.record_stream(now)
        return state

    def _send_for(self, weight: nn.Parameter) -> None:
        if weight not in self._states:
            return
        inwards, _ = self._streams_of(weight.device)
        if weight in self._written:
            inwards.wait_event(self._written[weight])
        with torch.cuda.stream(inwards):
            state = {
                name: rebuilt(value, lambda part: part.to(weight.device, non_blocking=True))
                if _is_moved(value)
                else value
                for name, value in self._states[weight].items()
            }
            self._coming[weight] = state, inwards.record_event()

    def _streams_of(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[device]


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors a tensor consists of: itself, or codes, scales and so on of a quantised one."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from plain_parts(getattr(tensor, name))
    else:
        yield tensor


def rebuilt(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The tensor with each of its `plain_parts` changed."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return change(tensor)
    names, context = tensor.__tensor_flatten__()
    parts = {name: rebuilt(getattr(tensor, name), change) for name in names}
    return type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())


def _is_moved(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0  # counters stay where their optimiser put them
