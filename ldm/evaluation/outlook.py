"""What a learning curve says about the rest of the way: a straight line against the logarithm of compute, or nothing.

A line is fitted to the last three doublings of compute and followed for three more at most. Its interval knows the
scatter about the line and the chance in which clips were looked at; whether the line goes on, nobody knows: a curve may
level off or take a sudden rise. So the same is also done from half the way, to see whether it would have come true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldm.evaluation.statistics import NUM_DRAWS, Estimate, interval

DOUBLINGS = 3.0  # of compute: as many are looked back as, at most, ahead
FEWEST = 5  # occasions for a fit
NORMAL_WIDTH = 3.92  # of a 95% interval, in standard deviations


@dataclass(frozen=True)
class Point:
    """Where a curve was looked at: TFLOP spent, the mean over clips and its interval."""

    tflop: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Backtest:
    """What the same fit, made at `tflop` or before, foretold of the last point, with its interval, and what came."""

    tflop: float
    mean: float
    low: float
    high: float
    came: float

    @property
    def held(self) -> bool:
        return self.low <= self.came <= self.high


@dataclass(frozen=True)
class Outlook:
    """What can be said of when a target is reached.

    verdict: "reached", "forecast", "far", "flat" or "unknown"; statement: the same in a sentence.
    per_doubling: how much the measure rises when compute doubles; tflop: at the target. Both as (mean, low, high), None
    where there is none; parts None that lie farther than the line is followed. backtest: None where half the way has
    too few points.
    line: two points of a line that leads on, TFLOP and mean: of its first occasion, and as far as it may be followed.
    """

    verdict: str
    statement: str
    per_doubling: tuple[float, float, float] | None = None
    tflop: tuple[float | None, float | None, float | None] | None = None
    backtest: Backtest | None = None
    line: tuple[tuple[float, float], tuple[float, float]] | None = None


@dataclass(frozen=True)
class _Line:
    """Lines that fit: levels at the end of the fit and slopes per doubling, `NUM_DRAWS` of each, and the scatter."""

    start: float  # TFLOP, of what was fitted
    end: float
    level: np.ndarray
    slope: np.ndarray
    scatter: np.ndarray

    def drawn(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Two ends of the line in the middle."""
        doublings = (np.log2(self.start / self.end), DOUBLINGS)
        first, last = (
            (float(self.end * 2**number), float(self.level.mean() + number * self.slope.mean())) for number in doublings
        )
        return first, last

    def foretold(self, tflop: float, rng: np.random.Generator) -> np.ndarray:
        """Draws of what will be seen at this compute."""
        return self.level + self.slope * np.log2(tflop / self.end) + self.scatter * rng.standard_normal(NUM_DRAWS)


def look_ahead(points: Sequence[Point], true: Estimate, share: float) -> Outlook:
    """When will a curve come to `share` of the mean of true clips? `points` by growing compute, 0 TFLOP apart."""
    points = [point for point in points if point.tflop > 0]
    if not points:
        return Outlook("unknown", "nothing was measured after the start")
    if true.mean is None or true.low <= 0:
        return Outlook("unknown", "the data's own mean cannot be told from 0, and there is no share of it to reach")
    goal, last = share * true.mean, points[-1]
    if last.mean >= goal:
        first = next(point for point in points if point.mean >= goal)
        return Outlook(
            "reached",
            f"{share:g} of the data's {_of(true)} is reached: {_of(last)}, at {_round(first.tflop)} TFLOP first",
        )
    rng = np.random.default_rng(0)
    line = _fit(points, rng)
    if line is None:
        return Outlook(
            "unknown",
            f"{_of(last)}, {share:g} of the data's is {goal:.2f}; fewer than {FEWEST} occasions over at least a "
            "doubling of compute are too few for a line",
        )
    slope = (float(line.slope.mean()), *interval(line.slope))
    backtest = _look_back(points, rng)
    rises = f"{_of(last)}; {slope[0]:+.3f} for each doubling of compute ({slope[1]:+.3f} to {slope[2]:+.3f})"
    if slope[1] <= 0:
        how = "it falls" if slope[2] < 0 else "that cannot be told from standing still"
        statement = f"{rises}: {how}, so nothing says when {goal:.2f}, {share:g} of the data's, would be reached"
        return Outlook("flat", statement + _told(backtest), slope, None, backtest)
    goals = share * (true.mean + (true.high - true.low) / NORMAL_WIDTH * rng.standard_normal(NUM_DRAWS))
    chance = (last.high - last.low) / NORMAL_WIDTH * rng.standard_normal(NUM_DRAWS)  # other clips, the same all along
    ahead = np.where(line.slope > 0, (goals - line.level - chance) / np.maximum(line.slope, 1e-12), np.inf)
    ahead = np.maximum(ahead, 0)
    low, middle, high = np.quantile(ahead, [0.025, 0.5, 0.975], method="nearest")
    reach = f"more than {_round(line.end * 2**DOUBLINGS)} TFLOP, where a forecast from this curve would end"
    tflop = tuple(float(line.end * 2**value) if value <= DOUBLINGS else None for value in (middle, low, high))
    words = [f"{_round(value)} TFLOP" if value is not None else reach for value in tflop]
    if tflop[0] is None:
        ends = f"takes {reach}" if tflop[1] is None else f"takes {words[1]} at the very least and may take {reach}"
        verdict = "far"
    else:
        ends = f"is reached at about {words[0]} ({words[1]} to {words[2]})"
        verdict = "forecast"
    statement = f"{rises}; if that goes on, {goal:.2f}, {share:g} of the data's, {ends}{_told(backtest)}"
    return Outlook(verdict, statement, slope, tflop, backtest, line.drawn())


def _fit(points: Sequence[Point], rng: np.random.Generator) -> _Line | None:
    """Draws from all lines that fit the last doublings (the posterior of linear regression under flat priors); None for
    too few points."""
    end = points[-1].tflop
    x = np.array([np.log2(point.tflop / end) for point in points])
    y = np.array([point.mean for point in points])[x >= -DOUBLINGS]
    x = x[x >= -DOUBLINGS]
    if len(x) < FEWEST or np.ptp(x) < 1:
        return None
    matrix = np.stack([np.ones_like(x), x], axis=1)
    found, *_ = np.linalg.lstsq(matrix, y)
    error = float(((y - matrix @ found) ** 2).sum())
    scatter = np.sqrt(error / rng.chisquare(len(x) - 2, NUM_DRAWS))
    root = np.linalg.cholesky(np.linalg.inv(matrix.T @ matrix))
    level, slope = found[:, None] + scatter * (root @ rng.standard_normal((2, NUM_DRAWS)))
    return _Line(float(end * 2 ** x[0]), end, level, slope, scatter)


def _look_back(points: Sequence[Point], rng: np.random.Generator) -> Backtest | None:
    last = points[-1]
    before = [point for point in points if point.tflop <= last.tflop / 2]
    line = _fit(before, rng) if before else None
    if line is None:
        return None
    draws = line.foretold(last.tflop, rng)
    return Backtest(line.end, float(draws.mean()), *interval(draws), last.mean)


def _told(backtest: Backtest | None) -> str:
    if backtest is None:
        return ""
    verdict = "which came true" if backtest.held else "which did not come true: do not trust the line"
    return (
        f". At {_round(backtest.tflop)} TFLOP the same line foretold {backtest.mean:.2f} ({backtest.low:.2f} to "
        f"{backtest.high:.2f}) for the end, {verdict}"
    )


def _round(value: float) -> str:
    """With two digits that count."""
    return f"{float(f'{value:.2g}'):,g}"


def _of(found: Point | Estimate) -> str:
    return f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"
