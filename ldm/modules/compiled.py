"""Faster calls of a network whose inputs come in few shapes: torch.compile and CUDA graphs, one graph for each shape.

By itself torch.compile generalises over the number of frames, gives up after eight graphs and then silently runs
uncompiled. Here every set of shapes gets its own full graph, and a network that cannot be compiled is a `UserError`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.exc
from torch import Tensor, nn

from ldm.errors import UserError

MAX_GRAPHS = 64  # of one network: frames, sizes, with and without guidance or gradients
BACKENDS = ("inductor", "aot_eager", "eager")  # the latter two compile nothing: they show whether a graph can be traced


class CompiledByShape:
    """Calls `network`'s forward through a graph for the given shapes, compiled at their first call."""

    def __init__(self, network: nn.Module, backend: str = "inductor") -> None:
        if backend not in BACKENDS:
            raise UserError(f"compile: expected backend to be one of {', '.join(BACKENDS)}, found {backend!r}")
        self.forward = network.forward
        self.shapes: set[tuple] = set()
        self.compiled = torch.compile(self.forward, dynamic=False, fullgraph=True, backend=backend)

    def __call__(self, x: Tensor, *inputs: Any, **named: Any) -> Tensor:
        self.shapes.add((torch.is_grad_enabled(), *map(_signature, (x, *inputs, *named.values()))))
        if len(self.shapes) > MAX_GRAPHS:
            raise UserError(
                f"compile: {_frames(x)} would be graph {MAX_GRAPHS + 1} of the network; make clips of fewer sizes or "
                "leave compile out"
            )
        # Dynamo counts graphs per class, so the limit covers all networks of the process.
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
    """Route all calls of `network` through graphs; names and weights are unchanged. Undone by `undo_compile`."""
    network.forward = CompiledByShape(network, backend)
    return network.forward


def undo_compile(network: nn.Module) -> None:
    """Call the plain network again."""
    if isinstance(network.__dict__.get("forward"), CompiledByShape):
        del network.forward


class GraphReplay:
    """Calls `network`'s forward by replaying a recording for the given shapes, made at their first call.

    record: takes a call without arguments, returns a function that repeats it and returns its output tensor.
    """

    def __init__(self, network: nn.Module, record: Callable[[Callable[[], Tensor]], Callable[[], Tensor]]) -> None:
        self.forward = network.forward
        self.record = record
        self.recordings: dict[tuple, tuple[list[Tensor], Callable[[], Tensor]]] = {}

    @torch.no_grad()
    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        values = [*inputs, *named.values()]
        tensors = [value for value in values if isinstance(value, Tensor)]
        kind = (len(inputs), *named, *map(_signature, values))
        if kind not in self.recordings:
            buffers = [tensor.clone() for tensor in tensors]  # the recording reads its inputs here
            left = iter(buffers)
            fixed = [next(left) if isinstance(value, Tensor) else value for value in values]
            rest = dict(zip(named, fixed[len(inputs) :], strict=True))
            self.recordings[kind] = buffers, self.record(lambda: self.forward(*fixed[: len(inputs)], **rest))
        buffers, replay = self.recordings[kind]
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)
        return replay().clone()  # the next replay overwrites it


def check_cuda_graphs(device: torch.device) -> None:
    """Raise `UserError` for a device without CUDA graphs."""
    if device.type != "cuda":
        raise UserError(f"--cuda-graphs: expected an NVIDIA GPU, found '{device.type}'; leave it out")


def use_cuda_graphs(network: nn.Module) -> GraphReplay:
    """Route all calls of a frozen `network` on a GPU through CUDA graphs."""
    if any(weight.requires_grad for weight in network.parameters()):
        raise ValueError("a recording has no gradients; freeze the network first")
    network.forward = GraphReplay(network, record_cuda_graph)
    return network.forward


def record_cuda_graph(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A CUDA graph of a call on the current GPU, after three warm-up calls on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def _frames(x: Tensor) -> str:
    return f"{x.shape[1]} frames of {x.shape[-2]}x{x.shape[-1]}" if x.ndim == 5 else "images"


def _signature(value: Any) -> Any:
    return (tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else value


@functools.cache
def _limit(kind: str = "") -> str:
    """The name of dynamo's limit in this version of torch."""
    names = [f"{kind}recompile_limit", f"{kind}cache_size_limit"]
    return next(name for name in names if hasattr(torch._dynamo.config, name))
