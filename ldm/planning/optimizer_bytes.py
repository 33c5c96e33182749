"""What an optimiser keeps and what its step takes for a moment, in bytes a weight, by a step of it on small weights.

The optimiser that a config names is built as for training and takes two steps on a matrix and a vector with values, on
the processor, followed byte by byte. On a card libraries update weights by one compiled kernel that writes into what is
there, so that only what our own code makes for a moment counts: float32 copies of weights that are stored otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import nn

from ldm.models.diffusion.optimizers import build_optimizer
from ldm.models.diffusion.stored_weights import StoredWeights
from ldm.models.diffusion.weight_by_weight import WeightByWeight, state_bytes
from ldm.planning.live_tensors import LiveTensors

LEAST_QUANTISED = 4096  # smaller weights keep their states in float32, in torchao and in bitsandbytes
SHAPES = ((512, 512), (512,))


@dataclass(frozen=True)
class OptimizerBytes:
    """states_each, states_small: of a weight of at least, or fewer than, `LEAST_QUANTISED` numbers, for each number.

    scratch_each: beside weight, gradient and states while weights are updated.  one_by_one: they are, so that only the
    largest needs it; otherwise all at once.
    """

    states_each: float
    states_small: float
    scratch_each: float
    one_by_one: bool

    def states(self, size: int) -> int:
        """Of a weight of so many numbers."""
        return round(size * (self.states_each if size >= LEAST_QUANTISED else self.states_small))

    def scratch(self, sizes: Sequence[int]) -> int:
        """For a step of weights of these sizes."""
        return round(self.scratch_each * (max(sizes) if self.one_by_one else sum(sizes)))


def measure_optimizer(
    options: Mapping[str, Any], weights: str, in_backward: bool, is_on_card: bool = True
) -> OptimizerBytes:
    """Measure the optimiser of these options, over weights stored as `model.params.memory.weights` has it."""
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    return _measure(tuple(sorted(options.items())), weights, in_backward, is_on_card)


@lru_cache
def _measure(
    options: tuple[tuple[str, Any], ...], weights: str, in_backward: bool, is_on_card: bool
) -> OptimizerBytes:
    own = dict(options)
    found = [_step(lambda groups, **words: build_optimizer(groups, **own, **words), s, weights) for s in SHAPES]
    states = (state_bytes(optimizer) / prod(shape) for (optimizer, _), shape in zip(found, SHAPES, strict=True))
    optimizer, scratch = found[0]
    is_ours = isinstance(optimizer, WeightByWeight) or in_backward
    if is_on_card:
        scratch = _step(_in_one_kernel, SHAPES[0], weights)[1] if is_ours else 0
    return OptimizerBytes(*states, scratch / prod(SHAPES[0]), is_ours or not isinstance(optimizer, torch.optim.AdamW))


def _step(
    make: Callable[..., torch.optim.Optimizer], shape: tuple[int, ...], weights: str
) -> tuple[torch.optim.Optimizer, int]:
    """An optimiser after two steps of one weight, and the bytes that the second one took for a moment."""
    network = nn.ParameterList([nn.Parameter(torch.ones(shape))])
    stored = StoredWeights(network, weights)
    optimizer = make([{"params": list(network), "lr": 1e-3}], weights=None if weights == "float32" else stored)
    live = LiveTensors(network, torch.device("cpu"))
    for phase in ("first step", "second step"):
        network[0].grad = torch.zeros_like(network[0])
        live.label("known", [network[0], network[0].grad, *stored.buffers()])
        before = live.live
        with live.during(phase):
            optimizer.step()
    return optimizer, live.peaks["second step"].total - before


def _in_one_kernel(groups: list[dict[str, Any]], weights: StoredWeights | None) -> WeightByWeight:
    return WeightByWeight(groups, lambda groups: torch.optim.AdamW(groups, fused=True), weights)
