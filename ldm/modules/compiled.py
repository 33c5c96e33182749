"""torch.compile for a network whose clips come in a few sizes: one graph for each, and an error where there is none.

torch.compile itself, left alone, tries graphs for any number of frames, gives up after eight of them and then runs the
plain network without a word. Here every set of shapes has a graph of its own, compiled whole (`fullgraph`) for exactly
these sizes, and what cannot be compiled ends in a `UserError` that names the frames.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.exc
from torch import Tensor, nn

from ldm.errors import UserError

MAX_GRAPHS = 64  # of one network; frames, sizes, guidance or not, gradients or not
BACKENDS = ("inductor", "aot_eager", "eager")  # the latter two compile nothing: they show whether a graph can be had


class CompiledByShape:
    """Calls `network`'s forward through a graph for the shapes at hand, compiled when they are first seen."""

    def __init__(self, network: nn.Module, backend: str = "inductor") -> None:
        if backend not in BACKENDS:
            raise UserError(f"compile: expected backend to be one of {', '.join(BACKENDS)}, found {backend!r}")
        self.forward = network.forward
        self.backend = backend
        self.shapes: set[tuple] = set()
        self.compiled = torch.compile(self.forward, dynamic=False, fullgraph=True, backend=backend)

    def __call__(self, x: Tensor, *inputs: Any, **named: Any) -> Tensor:
        self.shapes.add((tuple(x.shape), x.dtype, torch.is_grad_enabled(), *map(_shape, (*inputs, *named.values()))))
        if len(self.shapes) > MAX_GRAPHS:
            raise UserError(
                f"compile: {_frames(x)} would be graph {MAX_GRAPHS + 1} of the network; make clips of fewer sizes or "
                "leave compile out"
            )
        # Graphs belong to the code of the class, so all its networks in a process count.
        limits = {_limit(): 16 * MAX_GRAPHS, _limit("accumulated_"): 16 * MAX_GRAPHS}
        try:
            with torch._dynamo.config.patch(limits):
                return self.compiled(x, *inputs, **named)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"compile: the network cannot be compiled for {_frames(x)} ({reason}); leave compile out"
            ) from error


def compile_by_shape(network: nn.Module, backend: str = "inductor") -> CompiledByShape:
    """Have all calls of `network` go through graphs; its names and weights stay. `undo_compile` takes it back."""
    network.forward = CompiledByShape(network, backend)
    return network.forward


def undo_compile(network: nn.Module) -> None:
    """Call the plain network again."""
    if isinstance(network.__dict__.get("forward"), CompiledByShape):
        del network.forward


def _frames(x: Tensor) -> str:
    return f"{x.shape[1]} frames of {x.shape[-2]}x{x.shape[-1]}" if x.ndim == 5 else "images"


def _shape(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


@functools.cache
def _limit(kind: str = "") -> str:
    """The name of dynamo's limit in this version of torch."""
    names = [f"{kind}recompile_limit", f"{kind}cache_size_limit"]
    return next(name for name in names if hasattr(torch._dynamo.config, name))


Play = Callable[[], Tensor]  # runs what was recorded again and returns the tensor that it fills
WARM_UPS = 3  # runs before recording, in which libraries choose kernels and allocate


class GraphReplay:
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


def check_cuda_graphs(device: torch.device) -> None:
    """Raise `UserError` for a device that cannot record."""
    if device.type != "cuda":
        raise UserError(f"--cuda-graphs: expected an NVIDIA GPU, found '{device.type}'; leave it out")


def use_cuda_graphs(network: nn.Module) -> GraphReplay:
    """Have all calls of a frozen `network`, which is on a card, be played back."""
    if any(weight.requires_grad for weight in network.parameters()):
        raise ValueError("a recording has no gradients; freeze the network first")
    network.forward = GraphReplay(network, record_cuda_graph)
    return network.forward


def record_cuda_graph(call: Callable[[], Tensor]) -> Play:
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
