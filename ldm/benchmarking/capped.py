"""The section `memory` on a card: do the presets fit into smaller cards, which a cap on its memory stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ldm.benchmarking.child import ask_child
from ldm.benchmarking.rows import GIB, Row
from ldm.benchmarking.timing import Budget, Seconds
from ldm.benchmarking.training import CHILD_SECONDS, REFERENCE
from ldm.config import check, load_config, to_container
from ldm.errors import UserError
from ldm.planning.ladder import needed, propose
from ldm.planning.training_step import count_step, shape_of

SIDE, STEPS = 64, 4
PLAN_SECONDS = 150  # that a search for a plan may take


@dataclass(frozen=True)
class Cap:
    """A config on a card of so many GB; `goal` is a key of `GOALS`."""

    gigabytes: float
    base: tuple[str, ...]
    overrides: tuple[str, ...]
    goal: str | None = None

    def __str__(self) -> str:
        words = [*(path.rpartition("/")[2] for path in self.base[-1:]), *self.overrides]
        return f"{' '.join(words)} in {self.gigabytes:g} GB"


def _preset(name: str, batch: int, frames: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (REFERENCE, f"configs/{name}.yaml"), (f"data.params.batch_size={batch}", f"data.params.frames={frames}")


CAPS = (
    Cap(8, *_preset("fit-8gb", 2, 5), "cuda fit 2x5"),
    Cap(12, *_preset("fit-12gb", 2, 25), "cuda fit 2x25"),
    Cap(24, *_preset("long-64", 2, 64), "cuda fit 2x64"),
    Cap(24, *_preset("long-181", 1, 181), "cuda fit 1x181"),
    Cap(12, *_preset("temporal-only", 2, 25), "cuda fit temporal"),
)


def try_to_fit(cap: Cap, device: torch.device, budget: Budget, side: int = SIDE) -> Iterator[Row]:
    """Some steps below the cap: fits or does not, and then what would. Never a traceback."""
    if device.type != "cuda":
        raise UserError("memory: expected an NVIDIA GPU to cap the memory of, found none; leave out --vram")
    request = {
        "base": cap.base, "overrides": cap.overrides, "cap": cap.gigabytes, "device": str(device), "side": side,
        "steps": STEPS, "counted": False,
    }  # fmt: skip
    row = Row("memory", str(cap), "fits")
    found = ask_child(request, min(CHILD_SECONDS, budget.left))
    row.peak_bytes = found.get("peak_bytes")
    if found.get("is_lack_of_memory"):
        row.name, row.note = "does not fit", plan_that_fits(cap, budget)
        value = float("inf")
    elif "error" in found:
        row.name, row.note, value = "not measured", found["error"], None
    else:
        row.seconds, value = Seconds.of(found["seconds"][2:]), cap.gigabytes
        row.note = f"{row.peak_bytes / GIB:.2f} GiB of tensors"
    if cap.goal is not None and value is not None:
        row.found = {cap.goal: value}
    yield row


def plan_that_fits(cap: Cap, budget: Budget) -> str:
    """What would make a config fit, counted; where there is no time to count, the command that does."""
    command = f"python scripts/plan.py --base {' '.join(cap.base)} --vram {cap.gigabytes:g} {' '.join(cap.overrides)}"
    if not budget.has(PLAN_SECONDS):
        return f"what fits is told by: {command}"
    try:
        config = load_config(list(cap.base), list(cap.overrides))
        check(config)
        tree = to_container(config)
        shape = shape_of(tree, (512, 512))
        proposal = propose(tree, cap.gigabytes, lambda changed: count_step(changed, shape))
    except UserError as error:
        return str(error)
    return f"would with {_words(proposal.overrides)} ({needed(proposal.count):.1f} GB, counted)"


def _words(overrides: Sequence[tuple[str, object]]) -> str:
    return " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides)
