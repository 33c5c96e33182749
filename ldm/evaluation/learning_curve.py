"""Learning curves: what runs measured of their samples while they were trained, against the compute they had spent.

A record is what `ldm.callbacks.MotionLogger` writes into a run folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError
from ldm.evaluation.page import nice_ticks
from ldm.evaluation.statistics import NUM_DRAWS, Estimate, estimate, interval, warnings
from ldm.files import parse_json

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


TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_")  # that the name of a run folder begins with
PARTS = ("settings", "measures", "data", "occasions")
COMPARABLE = ("captions", "num_clips", "frames", "fps", "sampler", "steps", "scale", "seed")


@dataclass(frozen=True)
class Record:
    """What one run measured: `words` as in its file, with settings, measures, data and occasions."""

    name: str
    path: Path
    words: Mapping[str, Any]


def find_records(places: Sequence[Path]) -> list[Record]:
    """The records in run folders, or the named files themselves; raises UserError where there is none."""
    records = []
    for place in places:
        if place.is_dir():
            found = [record for path in sorted(place.glob("*.json")) if (record := _read(path)) is not None]
            if not found:
                raise UserError(
                    f"{place}: expected the folder of a run that measured its samples, found no record of it; train "
                    "with ldm.callbacks.MotionLogger among lightning.callbacks"
                )
        elif not place.is_file():
            raise UserError(f"{place}: expected a run folder or a record of one, found no such file")
        elif (record := _read(place)) is None:
            raise UserError(f"{place}: expected a record of ldm.callbacks.MotionLogger, found other JSON")
        else:
            found = [record]
        records += found
    for record in records:
        _check(record)
    return records


def _read(path: Path) -> Record | None:
    """None for JSON of something else."""
    try:
        words = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, found something else ({error})") from None
    if not isinstance(words, dict) or not all(part in words for part in PARTS):
        return None
    run = TIME.sub("", path.resolve().parent.name)
    return Record(run if path.stem == "motion" else f"{run}, {path.stem}", path, words)


def _check(record: Record) -> None:
    occasions = record.words["occasions"]
    if any(occasion["tflop"] is None for occasion in occasions):
        raise UserError(
            f"{record.path}: expected the compute spent on each occasion, found none; train with "
            "ldm.callbacks.ComputeCount among lightning.callbacks"
        )
    if not any(occasion["tflop"] > 0 for occasion in occasions):
        raise UserError(
            f"{record.path}: expected an occasion after the first step, found {len(occasions)} before it; train on"
        )


def summarise(records: Sequence[Record], share: float) -> dict[str, Any]:
    """All curves in plain containers, ready for JSON; `share` of the data's mean is the target of the outlook."""
    measures = {name: dict(measure) for record in records for name, measure in record.words["measures"].items()}
    return {"target": share, "measures": measures, "curves": [_curve(record, measures, share) for record in records]}


def _curve(record: Record, measures: Mapping[str, Mapping[str, Any]], share: float) -> dict[str, Any]:
    data = record.words["data"]
    found = {}
    for name, measure in measures.items():
        true = estimate(data["values"].get(name, []), data["scenes"] if name in data["values"] else [])
        points = []
        for occasion in record.words["occasions"]:
            values = occasion["values"].get(name, [])
            mean = estimate(values, [str(number) for number in range(len(values))])
            if mean.mean is not None:
                points.append({"step": occasion["step"], "tflop": occasion["tflop"], **asdict(mean)})
        outlook = None
        if measure["better"] > 0 and points:
            seen = [Point(*(point[word] for word in ("tflop", "mean", "low", "high"))) for point in points]
            outlook = asdict(look_ahead(seen, true, share))
        found[name] = {"data": asdict(true), "points": points, "outlook": outlook}
    return {"name": record.name, "record": record.path.name, "settings": record.words["settings"], "measures": found}


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What to beware of when reading the curves."""
    curves = {curve["name"]: curve["settings"]["num_clips"] for curve in summary["curves"]}
    found = [
        f"{name}: {warning}"
        for name, num_clips in curves.items()
        for warning in warnings([str(number) for number in range(num_clips)])
    ]
    first = summary["curves"][0]
    for curve in summary["curves"][1:]:
        differing = [word for word in COMPARABLE if curve["settings"].get(word) != first["settings"].get(word)]
        if differing:
            words = ", ".join(differing)
            found.append(f"{curve['name']} was measured with other {words} than {first['name']}: do not compare levels")
    return found


WIDTH, HEIGHT = 420, 250  # of a panel, in the picture's own units
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 30, 34  # of it, outside its axes
LINE = 18  # height of a line of the legend
COLUMNS = 2
START = 26  # left of the axis' first number: where what was seen before the first step stands
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#6b6b6b")  # told apart by every eye
INK, SOFT, GRID = "#1c2024", "#60666d", "#e3e6ea"
FONT = f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}"'
STROKES = {
    "curve": 'stroke-width="2"',
    "data": 'stroke-width="1.2" stroke-dasharray="7 4"',
    "outlook": 'stroke-width="2" stroke-dasharray="2 4"',
}
LEGEND = "Band: 95% interval over clips. Long dashes: the data's own clips. Dots: the line fitted, followed on."


@dataclass(frozen=True)
class _Axes:
    """Where numbers of a panel stand, in its own units."""

    first: float  # TFLOP at either end
    last: float
    low: float
    high: float

    def x(self, tflop: float) -> float:
        if tflop <= 0:
            return LEFT
        share = math.log(tflop / self.first) / math.log(self.last / self.first)
        return LEFT + START + share * (WIDTH - LEFT - START - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)


def curves_svg(summary: Mapping[str, Any]) -> str:
    """The picture of a summary of `learning_curve`."""
    names, curves = list(summary["measures"]), summary["curves"]
    legend = TOP + LINE * (len(curves) + 1)
    rows = -(-len(names) // COLUMNS)
    width, height = COLUMNS * WIDTH, legend + rows * HEIGHT
    parts = [f'<rect width="{width}" height="{height}" fill="#fff"/>']
    for number, curve in enumerate(curves):
        y = LINE * (number + 1)
        parts.append(f'<rect x="{LEFT}" y="{y - 8}" width="18" height="4" fill="{_colour(number)}"/>')
        clips = f"{curve['settings']['num_clips']} clips on each occasion"
        parts.append(
            f'<text x="{LEFT + 26}" y="{y}">{escape(curve["name"])} <tspan fill="{SOFT}" dx="6">{clips}</tspan></text>'
        )
    parts.append(f'<text fill="{SOFT}" x="{LEFT}" y="{LINE * (len(curves) + 1)}">{LEGEND}</text>')
    for number, name in enumerate(names):
        row, column = divmod(number, COLUMNS)
        place = f"translate({column * WIDTH} {legend + row * HEIGHT})"
        parts.append(f'<g transform="{place}">{"".join(_panel(summary, name))}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="learning curves" viewBox="0 0 {width} '
        f'{height}" width="{width}" height="{height}"><g {FONT}>{"".join(parts)}</g></svg>\n'
    )


def _panel(summary: Mapping[str, Any], name: str) -> list[str]:
    found = [curve["measures"][name] for curve in summary["curves"]]
    values = [point[end] for its in found for point in its["points"] for end in ("low", "high")]
    values += [its["data"]["mean"] for its in found if its["data"]["mean"] is not None]
    title = f'<text font-weight="600" x="{LEFT}" y="20">{escape(summary["measures"][name]["title"])}</text>'
    if not any(its["points"] for its in found):
        return [title, f'<text fill="{SOFT}" x="{LEFT}" y="{HEIGHT / 2:.0f}">cannot be judged</text>']
    ticks = nice_ticks(values)
    axes = _Axes(*_ends(summary), ticks[0], ticks[-1])
    parts = [title]
    for tick in ticks:
        y = axes.y(tick)
        parts.append(f'<line stroke="{GRID}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text fill="{SOFT}" text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{tick:g}</text>')
    for tick in log_ticks(axes.first, axes.last):
        parts.append(
            f'<text fill="{SOFT}" text-anchor="middle" x="{axes.x(tick):.1f}" y="{HEIGHT - 16}">{tick:,g}</text>'
        )
    unit = "TFLOP, logarithmic"
    parts.append(f'<text fill="{SOFT}" text-anchor="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}">{unit}</text>')
    if any(point["tflop"] == 0 for its in found for point in its["points"]):
        parts.append(f'<text fill="{SOFT}" text-anchor="middle" x="{LEFT}" y="{HEIGHT - 16}">0</text>')
    for number, its in enumerate(found):
        parts += _draw(its, axes, _colour(number))
    return parts


def _draw(its: Mapping[str, Any], axes: _Axes, colour: str) -> list[str]:
    """One curve with its interval, the data's mean and what the outlook expects."""
    parts = []
    if its["data"]["mean"] is not None:
        y = axes.y(its["data"]["mean"])
        parts.append(_stroke("data", colour, [(LEFT, y), (WIDTH - RIGHT, y)]))
    points = its["points"]
    if not points:
        return parts
    upper = [(axes.x(point["tflop"]), axes.y(point["high"])) for point in points]
    lower = [(axes.x(point["tflop"]), axes.y(point["low"])) for point in reversed(points)]
    parts.append(f'<polygon fill="{colour}" fill-opacity=".15" points="{_places(upper + lower)}"/>')
    parts.append(_stroke("curve", colour, [(axes.x(point["tflop"]), axes.y(point["mean"])) for point in points]))
    for point in points:
        told = f"step {point['step']}, {point['tflop']:,.4g} TFLOP: {point['mean']:.3f}"
        x, y = axes.x(point["tflop"]), axes.y(point["mean"])
        parts.append(f'<circle fill="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{told}</title></circle>')
    outlook = its["outlook"]
    if outlook and outlook["line"]:
        ends = [(tflop, min(max(value, axes.low), axes.high)) for tflop, value in outlook["line"]]
        parts.append(_stroke("outlook", colour, [(axes.x(tflop), axes.y(value)) for tflop, value in ends]))
    return parts


def _stroke(kind: str, colour: str, places: Sequence[tuple[float, float]]) -> str:
    return f'<polyline {STROKES[kind]} fill="none" stroke="{colour}" points="{_places(places)}"/>'


def _places(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _ends(summary: Mapping[str, Any]) -> tuple[float, float]:
    """Least and most TFLOP that any curve or line comes to, a little apart."""
    found = [its for curve in summary["curves"] for its in curve["measures"].values()]
    spent = [point["tflop"] for its in found for point in its["points"] if point["tflop"] > 0]
    spent += [tflop for its in found if its["outlook"] for tflop, _ in its["outlook"]["line"] or ()]
    return min(spent), max(*spent, 2 * min(spent))


def log_ticks(first: float, last: float) -> list[float]:
    """Round numbers from `first` to `last`, both above 0: 1, 2, 5, 10, ... or, over many decades, powers of ten."""
    powers = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
    factors = (1, 2, 5) if math.log10(last / first) < 3 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [float(f"{tick:.1g}") for tick in ticks if first * 0.999 <= tick <= last * 1.001]
