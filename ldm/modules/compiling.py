"""torch.compile for a network whose clips come in a few sizes: one graph for each, and an error where there is none.

torch.compile itself, left alone, tries graphs for any number of frames, gives up after eight of them and then runs the
plain network without a word. Here every set of shapes has a graph of its own, compiled whole (`fullgraph`) for exactly
these sizes, and what cannot be compiled ends in a `UserError` that names the frames.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch._inductor.exc
from torch import Tensor, nn

from ldm.errors import UserError

MOST_GRAPHS = 64  # of one network; frames, sizes, guidance or not, gradients or not
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
        if len(self.shapes) > MOST_GRAPHS:
            raise UserError(
                f"compile: {_frames(x)} would be graph {MOST_GRAPHS + 1} of the network; make clips of fewer sizes or "
                "leave compile out"
            )
        # Graphs belong to the code of the class, so all its networks in a process count.
        limits = {_limit(): 16 * MOST_GRAPHS, _limit("accumulated_"): 16 * MOST_GRAPHS}
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
