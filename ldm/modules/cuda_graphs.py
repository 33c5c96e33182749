"""Sampling without waiting for Python: the network's kernels recorded once for each set of shapes, then played back.

A diffusion step is some thousand small kernels, which a fast card finishes sooner than Python can ask for them. In a
recording the card has the whole list. For frozen networks without gradients; memory of a recording is kept until the
network goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UserError

Play = Callable[[], Tensor]  # runs what was recorded again and returns the tensor that it fills
WARM_UPS = 3  # runs before recording, in which libraries choose kernels and allocate


class PlayedBack:
    """Calls `network`'s forward by playing back a recording of it for the shapes at hand.

    record: makes a recording of a call without arguments; another one than that of CUDA is for tests.
    """

    def __init__(self, network: nn.Module, record: Callable[[Callable[[], Tensor]], Play]) -> None:
        self.forward = network.forward
        self.record = record
        self.recordings: dict[tuple, tuple[list[Tensor], Play]] = {}

    @torch.no_grad()
    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        values = [*inputs, *named.values()]
        tensors = [value for value in values if isinstance(value, Tensor)]
        kind = (len(inputs), *named, *map(_kind, values))
        if kind not in self.recordings:
            places = [tensor.clone() for tensor in tensors]  # where the recording reads its inputs
            left = iter(places)
            stable = [next(left) if isinstance(value, Tensor) else value for value in values]
            rest = dict(zip(named, stable[len(inputs) :], strict=True))
            play = self.record(lambda: self.forward(*stable[: len(inputs)], **rest))
            self.recordings[kind] = (places, play)
        places, play = self.recordings[kind]
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor)
        return play().clone()  # the next playback writes over it


def check_has_graphs(device: torch.device) -> None:
    """Raise `UserError` for a device that cannot record."""
    if device.type != "cuda":
        raise UserError(f"--cuda-graphs: expected an NVIDIA GPU, found '{device.type}'; leave it out")


def play_back(network: nn.Module) -> PlayedBack:
    """Have all calls of a frozen `network`, which is on a card, be played back."""
    if any(weight.requires_grad for weight in network.parameters()):
        raise ValueError("a recording has no gradients; freeze the network first")
    network.forward = PlayedBack(network, record_on_card)
    return network.forward


def record_on_card(call: Callable[[], Tensor]) -> Play:
    """A CUDA graph of a call, on the current card, after some runs on a stream of its own as CUDA asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def play() -> Tensor:
        graph.replay()
        return out

    return play


def _kind(value: Any) -> Any:
    return (tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else value
