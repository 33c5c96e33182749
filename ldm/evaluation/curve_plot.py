"""Learning curves as a picture: a panel for each measure, its mean against the logarithm of TFLOP, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ldm.evaluation.plots import nice_ticks

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
