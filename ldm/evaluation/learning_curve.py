"""Learning curves: what runs measured of their samples during training, against the compute spent, and a prediction.

A straight line against the logarithm of compute is fitted to the last three doublings and extrapolated for three more
at most. Its interval covers the scatter about the line and the choice of clips; it cannot tell whether the line
continues: a curve may level off or jump. So the same prediction is also made from half the compute and checked against
the last point (the backtest). A record is what `ldm.callbacks.MotionLogger` writes into a run folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError
from ldm.evaluation.statistics import NUM_DRAWS, Estimate, estimate, interval, warnings
from ldm.files import parse_json

DOUBLINGS = 3.0  # of compute: fitted at most, and extrapolated at most
MIN_POINTS = 5  # for a fit
NORMAL_WIDTH = 3.92  # of a 95% interval, in standard deviations
TIMESTAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_")  # at the start of a run folder's name
RECORD_KEYS = ("settings", "measures", "data", "occasions")
COMPARABLE = ("captions", "num_clips", "frames", "fps", "sampler", "steps", "scale", "seed")


@dataclass(frozen=True)
class Point:
    """A point of a curve: TFLOP spent, the mean over clips and its interval."""

    tflop: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Backtest:
    """The last point as predicted from the points up to `tflop`, with its interval, and the mean that `came`."""

    tflop: float
    mean: float
    low: float
    high: float
    came: float

    @property
    def held(self) -> bool:
        return self.low <= self.came <= self.high


@dataclass(frozen=True)
class Prediction:
    """When a curve reaches its target.

    verdict: "reached", "forecast", "far", "flat" or "unknown"; statement: the same as a sentence.
    per_doubling: rise of the measure when compute doubles; tflop: compute at the target. Both (mean, low, high), None
    if unknown; parts of `tflop` are None beyond the extrapolation. backtest: None if half the compute has too few
    points. line: (TFLOP, mean) at both ends of the fitted and extrapolated line.
    """

    verdict: str
    statement: str
    per_doubling: tuple[float, float, float] | None = None
    tflop: tuple[float | None, float | None, float | None] | None = None
    backtest: Backtest | None = None
    line: tuple[tuple[float, float], tuple[float, float]] | None = None


@dataclass(frozen=True)
class _Line:
    """`NUM_DRAWS` fitted lines: levels at the end of the fit, slopes per doubling, and the scatter about them."""

    start: float  # TFLOP
    end: float
    level: np.ndarray
    slope: np.ndarray
    scatter: np.ndarray

    def ends(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Both ends of the mean line, extrapolated."""
        doublings = (np.log2(self.start / self.end), DOUBLINGS)
        first, last = (
            (float(self.end * 2**number), float(self.level.mean() + number * self.slope.mean())) for number in doublings
        )
        return first, last

    def predict(self, tflop: float, rng: np.random.Generator) -> np.ndarray:
        """Draws of the mean at this compute."""
        return self.level + self.slope * np.log2(tflop / self.end) + self.scatter * rng.standard_normal(NUM_DRAWS)


def predict(points: Sequence[Point], true: Estimate, share: float) -> Prediction:
    """When a curve reaches `share` of the mean of true clips. `points` by increasing compute; 0 TFLOP is ignored."""
    points = [point for point in points if point.tflop > 0]
    if not points:
        return Prediction("unknown", "nothing was measured after the start")
    if true.mean is None or true.low <= 0:
        return Prediction("unknown", "the interval of the data's own mean includes 0, so a share of it is undefined")
    goal, last = share * true.mean, points[-1]
    if last.mean >= goal:
        first = next(point for point in points if point.mean >= goal)
        return Prediction(
            "reached",
            f"{share:g} of the data's {_interval(true)} is reached: {_interval(last)}, first at {_round(first.tflop)} "
            "TFLOP",
        )
    rng = np.random.default_rng(0)
    line = _fit(points, rng)
    if line is None:
        return Prediction(
            "unknown",
            f"{_interval(last)}, {share:g} of the data's is {goal:.2f}; a fit needs {MIN_POINTS} evaluations over at "
            "least a doubling of compute",
        )
    slope = (float(line.slope.mean()), *interval(line.slope))
    backtest = _backtest(points, rng)
    rises = f"{_interval(last)}; {slope[0]:+.3f} per doubling of compute ({slope[1]:+.3f} to {slope[2]:+.3f})"
    if slope[1] <= 0:
        how = "the curve falls" if slope[2] < 0 else "the slope is not distinguishable from 0"
        statement = f"{rises}: {how}, so nothing predicts when {goal:.2f}, {share:g} of the data's, is reached"
        return Prediction("flat", statement + _describe(backtest), slope, None, backtest)
    goals = share * (true.mean + (true.high - true.low) / NORMAL_WIDTH * rng.standard_normal(NUM_DRAWS))
    clips = (
        (last.high - last.low) / NORMAL_WIDTH * rng.standard_normal(NUM_DRAWS)
    )  # the choice of clips, a fixed offset
    ahead = np.where(line.slope > 0, (goals - line.level - clips) / np.maximum(line.slope, 1e-12), np.inf)
    ahead = np.maximum(ahead, 0)
    low, middle, high = np.quantile(ahead, [0.025, 0.5, 0.975], method="nearest")
    limit = f"more than {_round(line.end * 2**DOUBLINGS)} TFLOP, the limit of the extrapolation"
    tflop = tuple(float(line.end * 2**value) if value <= DOUBLINGS else None for value in (middle, low, high))
    texts = [f"{_round(value)} TFLOP" if value is not None else limit for value in tflop]
    if tflop[0] is None:
        when = f"takes {limit}" if tflop[1] is None else f"takes at least {texts[1]} and possibly {limit}"
        verdict = "far"
    else:
        when = f"is reached at about {texts[0]} ({texts[1]} to {texts[2]})"
        verdict = "forecast"
    statement = f"{rises}; if the line continues, {goal:.2f}, {share:g} of the data's, {when}{_describe(backtest)}"
    return Prediction(verdict, statement, slope, tflop, backtest, line.ends())


def _fit(points: Sequence[Point], rng: np.random.Generator) -> _Line | None:
    """Draws from the posterior of a linear regression with flat priors over the last doublings; None if too few."""
    end = points[-1].tflop
    x = np.array([np.log2(point.tflop / end) for point in points])
    y = np.array([point.mean for point in points])[x >= -DOUBLINGS]
    x = x[x >= -DOUBLINGS]
    if len(x) < MIN_POINTS or np.ptp(x) < 1:
        return None
    matrix = np.stack([np.ones_like(x), x], axis=1)
    found, *_ = np.linalg.lstsq(matrix, y)
    error = float(((y - matrix @ found) ** 2).sum())
    scatter = np.sqrt(error / rng.chisquare(len(x) - 2, NUM_DRAWS))
    root = np.linalg.cholesky(np.linalg.inv(matrix.T @ matrix))
    level, slope = found[:, None] + scatter * (root @ rng.standard_normal((2, NUM_DRAWS)))
    return _Line(float(end * 2 ** x[0]), end, level, slope, scatter)


def _backtest(points: Sequence[Point], rng: np.random.Generator) -> Backtest | None:
    last = points[-1]
    before = [point for point in points if point.tflop <= last.tflop / 2]
    line = _fit(before, rng) if before else None
    if line is None:
        return None
    draws = line.predict(last.tflop, rng)
    return Backtest(line.end, float(draws.mean()), *interval(draws), last.mean)


def _describe(backtest: Backtest | None) -> str:
    if backtest is None:
        return ""
    verdict = "which held" if backtest.held else "which did not hold: do not trust the line"
    return (
        f". At {_round(backtest.tflop)} TFLOP the same fit predicted {backtest.mean:.2f} ({backtest.low:.2f} to "
        f"{backtest.high:.2f}) for the last point, {verdict}"
    )


def _round(value: float) -> str:
    """With two significant digits."""
    return f"{float(f'{value:.2g}'):,g}"


def _interval(found: Point | Estimate) -> str:
    return f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"


@dataclass(frozen=True)
class Record:
    """The measurements of one run: `content` of its file, with the keys settings, measures, data and occasions."""

    name: str
    path: Path
    content: Mapping[str, Any]


def find_records(paths: Sequence[Path]) -> list[Record]:
    """The records at files or in run folders; raises UserError for a path without one."""
    records = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: expected a run folder or a record in one, found no such file")
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        found = [record for file in files if (record := _read(file)) is not None]
        if not found and path.is_dir():
            raise UserError(
                f"{path}: expected the folder of a run that measured its samples, found no record; train with "
                "ldm.callbacks.MotionLogger in lightning.callbacks"
            )
        if not found:
            raise UserError(f"{path}: expected a record of ldm.callbacks.MotionLogger, found other JSON")
        records += found
    for record in records:
        _check(record)
    return records


def _read(path: Path) -> Record | None:
    """None for other JSON."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, found something else ({error})") from None
    if not isinstance(content, dict) or not all(key in content for key in RECORD_KEYS):
        return None
    run = TIMESTAMP.sub("", path.resolve().parent.name)
    return Record(run if path.stem == "motion" else f"{run}, {path.stem}", path, content)


def _check(record: Record) -> None:
    occasions = record.content["occasions"]
    if any(occasion["tflop"] is None for occasion in occasions):
        raise UserError(
            f"{record.path}: expected the compute spent at each evaluation, found none; train with "
            "ldm.callbacks.ComputeCount in lightning.callbacks"
        )
    if not any(occasion["tflop"] > 0 for occasion in occasions):
        raise UserError(
            f"{record.path}: expected an evaluation after the first step, found {len(occasions)} before it; train "
            "further"
        )


def summarise(records: Sequence[Record], share: float) -> dict[str, Any]:
    """All curves in plain containers, ready for JSON; the target of the predictions is `share` of the data's mean."""
    measures = {name: dict(measure) for record in records for name, measure in record.content["measures"].items()}
    return {"target": share, "measures": measures, "curves": [_curve(record, measures, share) for record in records]}


def _curve(record: Record, measures: Mapping[str, Mapping[str, Any]], share: float) -> dict[str, Any]:
    data = record.content["data"]
    found = {}
    for name, measure in measures.items():
        true = estimate(data["values"].get(name, []), data["scenes"] if name in data["values"] else [])
        points = []
        for occasion in record.content["occasions"]:
            values = occasion["values"].get(name, [])
            mean = estimate(values, [str(number) for number in range(len(values))])
            if mean.mean is not None:
                points.append({"step": occasion["step"], "tflop": occasion["tflop"], **asdict(mean)})
        prediction = None
        if measure["better"] > 0 and points:
            seen = [Point(*(point[key] for key in ("tflop", "mean", "low", "high"))) for point in points]
            prediction = asdict(predict(seen, true, share))
        found[name] = {"data": asdict(true), "points": points, "prediction": prediction}
    return {"name": record.name, "record": record.path.name, "settings": record.content["settings"], "measures": found}


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Limits of the curves: few clips, and settings that do not compare."""
    curves = {curve["name"]: curve["settings"]["num_clips"] for curve in summary["curves"]}
    found = [
        f"{name}: {warning}"
        for name, num_clips in curves.items()
        for warning in warnings([str(number) for number in range(num_clips)])
    ]
    first = summary["curves"][0]
    for curve in summary["curves"][1:]:
        if differing := [key for key in COMPARABLE if curve["settings"].get(key) != first["settings"].get(key)]:
            found.append(
                f"{curve['name']} and {first['name']} differ in {', '.join(differing)}: do not compare their levels"
            )
    return found
