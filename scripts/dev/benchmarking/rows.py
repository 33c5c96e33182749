"""Rows of a benchmark and its goals, as JSON record and as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from scripts.dev.benchmarking.timing import Seconds

KIND = "benchmark"
GIGA, GIB = 1e9, 2**30


@dataclass(frozen=True)
class Goal:
    """An upper bound of a measured number or, with `at_least`, a lower bound; `stretch` is the next goal."""

    title: str
    limit: float
    device: str
    at_least: bool = False
    unit: str = ""
    stretch: float | None = None

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


GOALS = {
    "cpu unet2d": Goal("step beside UNet2DConditionModel frame by frame", 1.18, "cpu", unit="x"),
    "cpu unet3d": Goal("step beside UNet3DConditionModel", 0.65, "cpu", unit="x", stretch=0.55),
    "cpu motion": Goal("step beside UNetMotionModel", 0.80, "cpu", unit="x", stretch=0.70),
    "cpu convolution fp32": Goal("convolution over frames beside a folded Conv1d, fp32", 1.3, "cpu", True, "x"),
    "cpu convolution bf16": Goal("convolution over frames beside a folded Conv1d, bf16", 2.0, "cpu", True, "x"),
    "cpu clips": Goal("clips per second from two workers, cold cache", 900, "cpu", True, "/s"),
    "cpu webdataset": Goal("clips at random beside a WebDataset stream", 5, "cpu", True, "x"),
    "cuda step 5": Goal("step of 2 x 5 frames, no checkpointing", 0.090, "cuda", unit=" s", stretch=0.070),
    "cuda share 5": Goal("the same, share of the measured peak", 0.38, "cuda", True),
    "cuda step 16": Goal("step of 2 x 16 frames, no checkpointing", 0.245, "cuda", unit=" s", stretch=0.210),
    "cuda share 16": Goal("the same, share of the measured peak", 0.45, "cuda", True),
    "cuda unet3d": Goal("step beside UNet3DConditionModel", 0.65, "cuda", unit="x", stretch=0.55),
    "cuda motion": Goal("step beside UNetMotionModel", 0.80, "cuda", unit="x", stretch=0.70),
    "cuda fit 2x5": Goal("2 x 5 frames on 8 GB", 8, "cuda", unit=" GB"),
    "cuda fit 2x25": Goal("2 x 25 frames on 12 GB", 12, "cuda", unit=" GB"),
    "cuda fit 2x64": Goal("2 x 64 frames on 24 GB", 24, "cuda", unit=" GB"),
    "cuda fit 1x181": Goal("1 x 181 frames on 24 GB", 24, "cuda", unit=" GB"),
    "cuda fit temporal": Goal("temporal layers alone, 2 x 25 frames on 12 GB", 12, "cuda", unit=" GB"),
    "cuda sample 50": Goal("16 frames in 50 steps with guidance", 4.5, "cuda", unit=" s"),
    "cuda sample 20": Goal("16 frames in 20 steps with guidance", 1.6, "cuda", unit=" s"),
}  # fmt: skip


@dataclass
class BenchmarkRow:
    """One measurement: section, case and name.

    seconds: None if nothing was measured, `note` has the reason. ratio: of our seconds to these, median over rounds.
    flop: of a call, counted. share: of the measured peak of matrix products. peak_bytes: peak memory. rate: clips per
    second. found: values for goals, by their keys in `GOALS`.
    """

    section: str
    case: str
    name: str
    seconds: Seconds | None = None
    ratio: float | None = None
    flop: float | None = None
    share: float | None = None
    peak_bytes: int | None = None
    rate: float | None = None
    note: str = ""
    found: dict[str, float] = field(default_factory=dict)

    def verdicts(self) -> Iterator[str]:
        """Each goal of the row, and whether it is met."""
        for key, value in self.found.items():
            goal = GOALS[key]
            bound, verdict = ("least" if goal.at_least else "most"), ("met" if goal.is_met(value) else "not met")
            yield f"at {bound} {goal.limit:g}{goal.unit}: {verdict} ({value:.3g})"


def record(rows: Sequence[BenchmarkRow], about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the JSON file. about: date, device, machine, torch, threads, peaks, minutes."""
    return {"kind": KIND, **about, "rows": [asdict(row) for row in rows]}


def is_record(values: Any) -> bool:
    """Whether parsed JSON is a benchmark's record."""
    return isinstance(values, dict) and values.get("kind") == KIND


def rows_of(values: Mapping[str, Any]) -> list[BenchmarkRow]:
    """The rows of a record."""
    rows = [BenchmarkRow(**{**row, "seconds": row["seconds"] and Seconds(**row["seconds"])}) for row in values["rows"]]
    for row in rows:
        row.found = {key: value for key, value in row.found.items() if key in GOALS}
    return rows


def table_rows(rows: Sequence[BenchmarkRow]) -> list[list[str]]:
    """Cells of a table, headings first; empty columns are left out."""
    headings = ["", "case", "seconds (quartiles)", "ours takes", "GFLOP, counted", "GFLOP/s", "of the peak",
                "peak memory, MiB", "per second", "goal", "note"]  # fmt: skip
    lines = [[row.name, row.case, *_numbers(row), "; ".join(row.verdicts()), row.note] for row in rows]
    kept = [0, *(column for column in range(1, len(headings)) if any(line[column] for line in lines))]
    return [[line[column] for column in kept] for line in [headings, *lines]]


def goal_rows(rows: Sequence[BenchmarkRow], device: str) -> list[list[str]]:
    """Cells of a table of all goals of a kind of device; goals that were not measured stay empty."""
    lines = [["goal", "wanted", "stretch", "found", "met"]]
    for key, goal in GOALS.items():
        if goal.device != device:
            continue
        found = [(row, row.found[key]) for row in rows if key in row.found]
        sign = "at least" if goal.at_least else "at most"
        stretch = "" if goal.stretch is None else f"{goal.stretch:g}{goal.unit}"
        values = ", ".join(f"{value:.3g}{goal.unit}{_precision(row)}" for row, value in found)
        met = ", ".join("yes" if goal.is_met(value) else "no" for _, value in found)
        lines.append([goal.title, f"{sign} {goal.limit:g}{goal.unit}", stretch, values, met])
    return lines


def _precision(row: BenchmarkRow) -> str:
    word = row.case.rpartition(", ")[2]
    return f" ({word})" if word in ("fp32", "bf16") and row.section == "train" else ""


def _numbers(row: BenchmarkRow) -> list[str]:
    taken = row.seconds
    seconds = "" if taken is None else f"{_short(taken.median)} ({_short(taken.low)} to {_short(taken.high)})"
    speed = row.flop / row.seconds.median / GIGA if row.flop and row.seconds else None
    return [
        seconds,
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        "" if not row.flop else f"{row.flop / GIGA:,.1f}",
        "" if speed is None else f"{speed:,.0f}",
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
        "" if row.rate is None else f"{row.rate:,.0f}",
    ]


def _short(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"
