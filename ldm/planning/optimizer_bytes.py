"""What an optimiser keeps and what its step takes for a moment, in bytes a weight, by a step of it on small weights.

The optimiser that a config names is built as for training and takes two steps on a matrix and a vector with values, on
the processor, followed byte by byte. On a card libraries compile their step, so that what it takes for a moment is less
there than what is found here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ldm.models.diffusion.optimizers import build_optimizer
from ldm.models.diffusion.stored_weights import StoredWeights
from ldm.models.diffusion.weight_by_weight import WeightByWeight, state_bytes
from ldm.planning.live_tensors import LiveTensors

LEAST_QUANTISED = 4096  # smaller weights keep their states in float32, in torchao and in bitsandbytes
SIDE = 512


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


def measure_optimizer(options: Mapping[str, Any], weights: str, in_backward: bool) -> OptimizerBytes:
    """Measure the optimiser of these options, over weights stored as `model.params.memory.weights` has it."""
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items() if name != "states_on"}
    return _measure(tuple(sorted(options.items())), weights, in_backward)


@lru_cache
def _measure(options: tuple[tuple[str, Any], ...], weights: str, in_backward: bool) -> OptimizerBytes:
    states = []
    for shape in ((SIDE, SIDE), (SIDE,)):
        network = nn.ParameterList([nn.Parameter(torch.ones(shape))])
        stored = StoredWeights(network, weights)
        words = dict(options) | {"weights": None if weights == "float32" else stored, "in_backward": False}
        optimizer = build_optimizer([{"params": list(network), "lr": 1e-3}], **words)
        live = LiveTensors(network, torch.device("cpu"))
        weight = network[0]
        for phase in ("first step", "second step"):
            weight.grad = torch.zeros_like(weight)
            live.label("known", [weight, weight.grad, *stored.buffers()])
            with live.during(phase):
                before = live.live
                optimizer.step()
        states.append(state_bytes(optimizer) / weight.numel())
        if weight.ndim > 1:
            scratch = (live.peaks["second step"].total - before) / weight.numel()
    one_by_one = isinstance(optimizer, WeightByWeight) or in_backward or dict(options).get("name") != "adamw"
    if dict(options).get("name", "adamw") == "adamw" and not isinstance(optimizer, WeightByWeight):
        scratch = 0.0  # one kernel on a card, which writes into what is there
    return OptimizerBytes(*states, scratch, one_by_one)
