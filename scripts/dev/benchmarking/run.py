"""The jobs of a benchmark in order of importance; what does not fit into the given minutes is left out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ldm.errors import UserError
from scripts.dev.benchmarking.contestants import PRECISIONS, Case
from scripts.dev.benchmarking.kernels import compare_attentions, compare_convolutions, trace
from scripts.dev.benchmarking.loading import compare_loaders
from scripts.dev.benchmarking.rows import BenchmarkRow
from scripts.dev.benchmarking.sections import (
    CAPS,
    Cap,
    compare_steps,
    peak_memories,
    reference_step,
    sample_clips,
    try_to_fit,
)
from scripts.dev.benchmarking.timing import Budget, matmul_peak

SECTIONS = ("train", "sample", "memory", "kernels", "loader", "trace")
SMALL, FULL = (64, 128, 256, 256), (320, 640, 1280, 1280)  # channels of the levels
SMALL_SIDE, FULL_SIDE = 16, 64  # of a latent
SAMPLERS = {50: "ddim", 20: "dpm++"}  # by number of steps
GPU_MINUTES = 9.0


@dataclass(frozen=True)
class BenchmarkJob:
    """Rows of one section that are measured together, and an estimate of the seconds it takes."""

    section: str
    title: str
    seconds: float
    run: Callable[[], Iterator[BenchmarkRow]]


@dataclass(frozen=True)
class BenchmarkSettings:
    """The request of a benchmark.

    names: contestants. widths, side: of the networks on a CPU. caps: configs that must fit a GPU. scenes: for `loader`.
    """

    device: torch.device
    names: Sequence[str]
    precisions: Sequence[str]
    rounds: int
    widths: tuple[int, ...] = SMALL
    side: int = SMALL_SIDE
    caps: Sequence[Cap] = CAPS
    scenes: int = 160


class BenchmarkRun:
    """The jobs of a benchmark; `rows` measures them. peaks: precision -> operations per second of a matrix product."""

    def __init__(self, settings: BenchmarkSettings, sections: Sequence[str], budget: Budget) -> None:
        unknown = [section for section in sections if section not in SECTIONS]
        if unknown:
            raise UserError(f"sections: expected some of {', '.join(SECTIONS)}, found {', '.join(unknown)}")
        self.settings, self.budget = settings, budget
        self.peaks: dict[str, float] = {}
        jobs = self._gpu_jobs() if settings.device.type == "cuda" else self._cpu_jobs()
        self.jobs = [job for job in jobs if job.section in sections]

    def rows(self) -> Iterator[BenchmarkRow]:
        """Each row as soon as it is measured; a job that does not fit into the budget gives one row that says so."""
        for precision in self.settings.precisions:
            self.peaks[precision] = matmul_peak(self.settings.device, PRECISIONS[precision])
        for job in self.jobs:
            if not self.budget.has(job.seconds):
                note = f"takes about {job.seconds:.0f} s, more than the time left"
                yield BenchmarkRow(job.section, job.title, "left out", note=note)
                continue
            for row in job.run():
                if self.settings.widths != SMALL:
                    row.found = {}  # the goals do not apply to toy networks
                yield row
            gc.collect()
            if self.settings.device.type == "cuda":
                torch.cuda.empty_cache()

    def outline(self) -> list[BenchmarkRow]:
        """The jobs as rows without numbers."""
        return [BenchmarkRow(job.section, job.title, "not run") for job in self.jobs]

    def _cpu_jobs(self) -> list[BenchmarkJob]:
        it, device, budget = self.settings, self.settings.device, self.budget
        cases = {precision: Case(it.widths, 2, 5, it.side, precision) for precision in it.precisions}
        jobs = [  # small layers first: whole networks fragment the memory that follows them
            BenchmarkJob("kernels", f"temporal layers, {name}", 40, lambda case=case: self._kernels(case))
            for name, case in cases.items()
        ]
        jobs += [self._compare(case, 60) for case in cases.values()]
        jobs.append(self._loader())
        jobs += [
            BenchmarkJob(
                "memory", f"{case}, {name}", 60, lambda case=case: peak_memories(case, it.names, device, budget)
            )
            for name, case in cases.items()
        ]
        jobs += [
            self._sample(Case(it.widths, 1, 16, it.side, precision), steps, f", {precision}", 60, 1)
            for precision in it.precisions
            for steps in SAMPLERS
        ]
        traces = [self._trace(case) for case in cases.values()]
        return [*jobs, *traces]

    def _gpu_jobs(self) -> list[BenchmarkJob]:
        it, device, budget = self.settings, self.settings.device, self.budget
        cases = {frames: Case(FULL, 2, frames, FULL_SIDE, "bf16") for frames in (5, 16)}

        def reference(frames: int) -> BenchmarkJob:
            title = f"reference run, 2 x {frames} frames"
            return BenchmarkJob("train", title, 60, lambda: reference_step(frames, device, self._peak("bf16"), budget))

        fits = [
            BenchmarkJob("memory", str(cap), 40, lambda cap=cap: try_to_fit(cap, device, budget)) for cap in it.caps
        ]
        sampling = [self._sample(Case(FULL, 1, 16, FULL_SIDE, "bf16"), steps, "", 20, 3) for steps in SAMPLERS]
        kernels = [
            BenchmarkJob("kernels", f"temporal layers, 2 x {frames}", 15, lambda case=case: self._kernels(case))
            for frames, case in cases.items()
        ]
        return [
            reference(5), self._compare(cases[5], 90), reference(16), *fits, *sampling, self._trace(cases[5]), *kernels,
            self._compare(cases[16], 90), self._loader(),
        ]  # fmt: skip

    def _compare(self, case: Case, seconds: float) -> BenchmarkJob:
        it, precision = self.settings, case.precision

        def run() -> Iterator[BenchmarkRow]:
            return compare_steps(case, it.names, it.device, it.rounds, self.budget, self._peak(precision))

        return BenchmarkJob("train", f"{case}, {precision}", seconds, run)

    def _sample(self, case: Case, steps: int, precision: str, seconds: float, rounds: int) -> BenchmarkJob:
        def run() -> Iterator[BenchmarkRow]:
            return sample_clips(case, steps, SAMPLERS[steps], self.settings.device, rounds, self.budget)

        return BenchmarkJob("sample", f"16 frames, {steps} steps{precision}", seconds, run)

    def _trace(self, case: Case) -> BenchmarkJob:
        return BenchmarkJob("trace", f"{case}, {case.precision}", 20, lambda: trace(case, self.settings.device))

    def _kernels(self, case: Case) -> Iterator[BenchmarkRow]:
        """The temporal layers of the first level; on a CPU those of the full-sized network too."""
        device, rounds, budget = self.settings.device, 3 * self.settings.rounds, self.budget
        goal = f"{device.type} convolution {case.precision}"
        yield from compare_convolutions(case, device, rounds, budget, trained=True, goal=goal)
        yield from compare_convolutions(case, device, rounds, budget, trained=False)
        yield from compare_attentions(case, device, rounds, budget)
        if device.type == "cpu" and self.settings.widths == SMALL:
            full = replace(case, widths=FULL, side=FULL_SIDE)
            yield from compare_convolutions(full, device, self.settings.rounds, budget, trained=True)
            yield from compare_attentions(replace(full, side=FULL_SIDE // 2), device, self.settings.rounds, budget)

    def _loader(self) -> BenchmarkJob:
        it = self.settings
        frames, side, seconds = (50, FULL_SIDE, 5) if it.widths == SMALL else (10, it.side, 0.2)

        def run() -> Iterator[BenchmarkRow]:
            return compare_loaders(it.scenes, frames, side, seconds, min(3, it.rounds), self.budget)

        return BenchmarkJob("loader", "clips per second, cold cache", 60, run)

    def _peak(self, precision: str) -> float:
        if precision not in self.peaks:
            self.peaks[precision] = matmul_peak(self.settings.device, PRECISIONS[precision])
        return self.peaks[precision]
