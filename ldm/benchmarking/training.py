"""The section `train`: steps of all contestants, turn by turn, and of the reference run as its config has it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ldm.benchmarking.child import ask_child
from ldm.benchmarking.contestants import CONTESTANTS, Case, why_missing
from ldm.benchmarking.rows import GOALS, Row
from ldm.benchmarking.steps import TrainingStep, count_flop
from ldm.benchmarking.timing import Budget, Seconds, ratios, take_turns
from ldm.errors import is_lack_of_memory

WARM_UPS = 2
CHILD_SECONDS = 240
REFERENCE = "configs/video-sd.yaml"


def compare_steps(
    case: Case, names: Sequence[str], device: torch.device, rounds: int, budget: Budget, peak: float
) -> Iterator[Row]:
    """A row for each contestant: those that are there, after each other in every round; then those that are not.

    peak: operations a second of a matrix product of this precision, measured.
    """
    label = f"{case}, {case.precision}"
    steps: dict[str, TrainingStep] = {}
    absent = []
    for name in names:
        reason = why_missing(name)
        if reason is None:
            reason = _begin(steps, name, case, device)
        if reason is not None:
            absent.append(Row("train", label, CONTESTANTS[name].title, note=reason))
    seconds = take_turns(steps, rounds, device, budget)
    found = ratios(seconds, "ours") if "ours" in steps else {}
    for name, step in steps.items():
        flop, taken = count_flop(name, case, step), Seconds.of(seconds[name])
        lacks = CONTESTANTS[name].lacks
        row = Row("train", label, CONTESTANTS[name].title, taken, found.get(name), flop, flop / taken.median / peak)
        row.peak_bytes = step.peak_on_card()
        row.note = f"has no {lacks}" if lacks else ""
        key = f"{device.type} {name}"
        if key in GOALS and row.ratio is not None:
            row.found[key] = row.ratio
        yield row
    yield from absent
    steps.clear()
    gc.collect()


def _begin(steps: dict[str, TrainingStep], name: str, case: Case, device: torch.device) -> str | None:
    """Build a contestant beside the others and warm it up; why that did not go, or None."""
    try:
        step = TrainingStep(name, case, device)
        for _ in range(WARM_UPS):
            step()
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return "does not fit beside the others"
    steps[name] = step
    return None


def peaks_apart(case: Case, names: Sequence[str], device: torch.device, budget: Budget) -> Iterator[Row]:
    """The most memory that two steps of each contestant take, each in a process of its own."""
    for name in names:
        row = Row("memory", f"{case}, {case.precision}", CONTESTANTS[name].title)
        row.note = why_missing(name) or ""
        if not row.note:
            request = {"contestant": name, "case": asdict(case), "device": str(device), "steps": WARM_UPS}
            found = ask_child(request, min(CHILD_SECONDS, budget.left))
            row.peak_bytes, row.note = found.get("peak_bytes"), found.get("error", "process of its own, two steps")
        yield row


def reference_step(frames: int, device: torch.device, peak: float, budget: Budget) -> Iterator[Row]:
    """Steps of the reference run as a user has them, without checkpointing: attention frozen, 8-bit states, average."""
    case = f"2 x {frames} frames, {REFERENCE}, no checkpointing"
    overrides = ["model.params.unet_config.params.use_checkpoint=false", f"data.params.frames={frames}"]
    request: dict[str, Any] = {
        "base": [REFERENCE], "overrides": overrides, "device": str(device), "side": 64, "steps": 15,
    }  # fmt: skip
    row = Row("train", case, "the reference run")
    found = ask_child(request, min(CHILD_SECONDS, budget.left))
    row.note, row.peak_bytes = found.get("error", ""), found.get("peak_bytes")
    if "seconds" in found:
        row.seconds, row.flop = Seconds.of(found["seconds"][5:]), found["flop"]
        row.share = row.flop / row.seconds.median / peak
        row.found = {f"cuda step {frames}": row.seconds.median, f"cuda share {frames}": row.share}
    yield row
