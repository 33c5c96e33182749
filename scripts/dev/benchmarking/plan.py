"""What a run does, the most important first, and what it leaves out when its minutes are over."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ldm.errors import UserError
from scripts.dev.benchmarking.contestants import PRECISIONS, Case
from scripts.dev.benchmarking.kernels import compare_attentions, compare_convolutions, trace
from scripts.dev.benchmarking.loading import compare_loaders
from scripts.dev.benchmarking.rows import Row
from scripts.dev.benchmarking.sections import (
    CAPS,
    Cap,
    compare_steps,
    peaks_apart,
    reference_step,
    sample_clips,
    try_to_fit,
)
from scripts.dev.benchmarking.timing import Budget, matmul_peak

SECTIONS = ("train", "sample", "memory", "kernels", "loader", "trace")
SMALL, FULL = (64, 128, 256, 256), (320, 640, 1280, 1280)
SMALL_SIDE, FULL_SIDE = 16, 64
SAMPLERS = {50: "ddim", 20: "dpm++"}  # by number of steps
GPU_MINUTES = 9.0


@dataclass(frozen=True)
class Job:
    """Rows of one section that come from one go, and about how many seconds that takes."""

    section: str
    title: str
    seconds: float
    run: Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class Settings:
    """What a run is asked for.

    names: contestants.  widths, side, frames: of the small networks on a processor.  caps: configs to fit into cards.
    """

    device: torch.device
    names: Sequence[str]
    precisions: Sequence[str]
    rounds: int
    widths: tuple[int, ...] = SMALL
    side: int = SMALL_SIDE
    caps: Sequence[Cap] = CAPS
    scenes: int = 160


class Plan:
    """The jobs of a run on a device; calling `run` yields their rows."""

    def __init__(self, settings: Settings, sections: Sequence[str], budget: Budget) -> None:
        unknown = [section for section in sections if section not in SECTIONS]
        if unknown:
            raise UserError(f"sections: expected some of {', '.join(SECTIONS)}, found {', '.join(unknown)}")
        self.settings, self.budget = settings, budget
        self.peaks: dict[str, float] = {}
        jobs = self._jobs_on_card() if settings.device.type == "cuda" else self._jobs_on_processor()
        self.jobs = [job for job in jobs if job.section in sections]

    def run(self) -> Iterator[Row]:
        """Every row as soon as it is there; of a job there is no time for, one row that says so."""
        for precision in self.settings.precisions:
            self.peaks[precision] = matmul_peak(self.settings.device, PRECISIONS[precision])
        for job in self.jobs:
            if not self.budget.has(job.seconds):
                yield Row(job.section, job.title, "left out", note=f"takes about {job.seconds:.0f} s, the time is over")
                continue
            for row in job.run():
                if self.settings.widths != SMALL:
                    row.found = {}  # the goals are not those of toys
                yield row
            gc.collect()
            if self.settings.device.type == "cuda":
                torch.cuda.empty_cache()

    def outline(self) -> list[Row]:
        """The jobs as rows without numbers."""
        return [Row(job.section, job.title, "not run") for job in self.jobs]

    def _jobs_on_processor(self) -> list[Job]:
        it, device, budget = self.settings, self.settings.device, self.budget
        cases = {word: Case(it.widths, 2, 5, it.side, word) for word in it.precisions}
        jobs = [  # small layers first: after whole networks the memory that they get lies scattered
            Job("kernels", f"layers over time, {word}", 40, lambda case=case: self._kernels(case))
            for word, case in cases.items()
        ]
        jobs += [self._compare(case, 60) for case in cases.values()]
        jobs.append(self._loader())
        jobs += [
            Job("memory", f"{case}, {word}", 60, lambda case=case: peaks_apart(case, it.names, device, budget))
            for word, case in cases.items()
        ]
        jobs += [
            Job("sample", f"16 frames, {steps} steps, {word}", 60, lambda word=word, steps=steps: sample_clips(
                Case(it.widths, 1, 16, it.side, word), steps, SAMPLERS[steps], device, 1, budget))
            for word in it.precisions for steps in SAMPLERS
        ]  # fmt: skip
        return [*jobs, *(Job("trace", f"{case}, {word}", 20, lambda case=case: trace(case, device))
                         for word, case in cases.items())]  # fmt: skip

    def _jobs_on_card(self) -> list[Job]:
        it, device, budget = self.settings, self.settings.device, self.budget
        cases = {frames: Case(FULL, 2, frames, FULL_SIDE, "bf16") for frames in (5, 16)}
        references = {
            frames: Job("train", f"reference run, 2 x {frames} frames", 60, lambda frames=frames: reference_step(
                frames, device, self._peak("bf16"), budget))
            for frames in cases
        }  # fmt: skip
        fits = [Job("memory", str(cap), 40, lambda cap=cap: try_to_fit(cap, device, budget)) for cap in it.caps]
        sampling = [
            Job("sample", f"16 frames, {steps} steps", 20, lambda steps=steps: sample_clips(
                Case(FULL, 1, 16, FULL_SIDE, "bf16"), steps, SAMPLERS[steps], device, 3, budget))
            for steps in SAMPLERS
        ]  # fmt: skip
        kernels = [
            Job("kernels", f"layers over time, 2 x {frames}", 15, lambda frames=frames: self._kernels(cases[frames]))
            for frames in cases
        ]  # fmt: skip
        return [
            references[5], self._compare(cases[5], 90), references[16], *fits, *sampling,
            Job("trace", f"{cases[5]}, bf16", 20, lambda: trace(cases[5], device)), *kernels,
            self._compare(cases[16], 90), self._loader(),
        ]  # fmt: skip

    def _compare(self, case: Case, seconds: float) -> Job:
        it = self.settings
        return Job("train", f"{case}, {case.precision}", seconds, lambda: compare_steps(
            case, it.names, it.device, it.rounds, self.budget, self._peak(case.precision)))  # fmt: skip

    def _kernels(self, case: Case) -> Iterator[Row]:
        """The layers over time of the first level, and on a processor those of the full-sized network too."""
        device, rounds, budget = self.settings.device, 3 * self.settings.rounds, self.budget
        yield from compare_convolutions(
            case, device, rounds, budget, trained=True, goal=f"{device.type} convolution {case.precision}"
        )
        yield from compare_convolutions(case, device, rounds, budget, trained=False)
        yield from compare_attentions(case, device, rounds, budget)
        if device.type == "cpu" and self.settings.widths == SMALL:
            full = replace(case, widths=FULL, side=FULL_SIDE)
            yield from compare_convolutions(full, device, self.settings.rounds, budget, trained=True)
            yield from compare_attentions(replace(full, side=FULL_SIDE // 2), device, self.settings.rounds, budget)

    def _loader(self) -> Job:
        it = self.settings
        full = it.widths == SMALL
        return Job("loader", "clips a second, cold cache", 60, lambda: compare_loaders(
            it.scenes, 50 if full else 10, FULL_SIDE if full else it.side, 5 if full else 0.2, min(3, it.rounds),
            self.budget))  # fmt: skip

    def _peak(self, precision: str) -> float:
        if precision not in self.peaks:
            self.peaks[precision] = matmul_peak(self.settings.device, PRECISIONS[precision])
        return self.peaks[precision]
