"""Timing in turns: a busy machine slows all contestants alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
MATMUL_REPEATS = {"cpu": 6, "cuda": 40}


@dataclass(frozen=True)
class Seconds:
    """Median and quartiles of `times` measurements."""

    median: float
    low: float
    high: float
    times: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Seconds:
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


class Budget:
    """Minutes that a run may take; None: unlimited."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds left; infinite without a limit."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def has(self, seconds: float) -> bool:
        """Whether so many seconds are left."""
        return self.left >= seconds


def wait_for(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    tasks: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, budget: Budget
) -> dict[str, list[float]]:
    """Seconds of each task in each round. Every task runs once per round, for at least one round; warm up before."""
    found: dict[str, list[float]] = {name: [] for name in tasks}
    names = list(tasks)
    for number in range(rounds):
        begin = time.monotonic()
        for name in names[number % len(names) :] + names[: number % len(names)]:
            wait_for(device)
            start = time.perf_counter()
            tasks[name]()
            wait_for(device)
            found[name].append(time.perf_counter() - start)
        if not budget.has(1.5 * (time.monotonic() - begin)):
            break
    return found


def ratios(seconds: Mapping[str, Sequence[float]], name: str) -> dict[str, float]:
    """Seconds of `name` relative to each of the others: the median over rounds."""
    return {
        other: statistics.median(a / b for a, b in zip(seconds[name], theirs, strict=True))
        for other, theirs in seconds.items()
        if other != name
    }


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, the best of several."""
    side, repeats = MATMUL_SIDE[device.type], MATMUL_REPEATS[device.type]
    first, second = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        wait_for(device)
        start = time.perf_counter()
        torch.matmul(first, second)
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
