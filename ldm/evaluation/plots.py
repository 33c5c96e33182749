"""Pictures of the measures: a plot of one measure over all rows, and what moves which way in a clip."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import cv2
import numpy as np

from ldm.evaluation.flow import TAU, Motion, lengths
from ldm.evaluation.report import distance_label

WIDTH, LABELS, MARGIN, ROW, HEAD, FOOT = 660, 170, 20, 26, 6, 26  # of a plot, in its own units
OUTWARD, INWARD = (45, 190, 200), (240, 130, 40)  # teal and orange can be told apart by every eye


@dataclass(frozen=True)
class _Line:
    """A row of a plot: its name and colour, its estimate, and the name and value of each clip."""

    name: str
    kind: str
    found: Mapping[str, Any]
    clips: Sequence[tuple[str, float]] = ()


def interval_plot(summary: Mapping[str, Any], measure: str) -> str:
    """One measure of all rows as SVG: a faint dot for each clip, the mean and its interval on top."""
    lines = []
    for row in summary["rows"]:
        values = ((_place(clip), clip["readings"][measure]["value"]) for clip in row["clips"])
        clips = [(place, value) for place, value in values if value is not None]
        lines.append(_Line(row["name"], _kind(row), row["estimates"][measure], clips))
    return _plot(lines, summary["measures"][measure]["title"])


def distance_plot(summary: Mapping[str, Any], name: str) -> str:
    """One Frechet distance of all rows from the true clips as SVG, with its interval."""
    lines = [_Line(distance_label(row), _kind(row), row["distances"][name]) for row in summary["rows"]]
    return _plot(lines, f"Frechet distance of {summary['distances'][name]['title']}")


def _place(clip: Mapping[str, Any]) -> str:
    return f"{clip['video']}, frame {clip['start']}"


def _kind(row: Mapping[str, Any]) -> str:
    return "reference" if row["is_reference"] else "given"


def _plot(lines: Sequence[_Line], title: str) -> str:
    values = [value for line in lines for _, value in line.clips]
    values += [line.found[end] for line in lines for end in ("low", "high") if line.found["mean"] is not None]
    ticks = nice_ticks(values)
    low, high = ticks[0], ticks[-1]

    def at(value: float) -> float:
        return LABELS + MARGIN + (value - low) / (high - low) * (WIDTH - LABELS - 2 * MARGIN)

    bottom = HEAD + ROW * len(lines)
    parts = []
    for tick in ticks:
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{HEAD}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{at(tick):.1f}" y="{bottom + 17}">{tick:g}</text>')
    for number, line in enumerate(lines):
        middle = HEAD + ROW * (number + 0.5)
        parts.append(f'<text class="label" x="{LABELS}" y="{middle + 4:.1f}">{escape(_shorten(line.name))}</text>')
        parts += _draw_line(line, middle, at)
    title = escape(title)
    size = f'viewBox="0 0 {WIDTH} {bottom + FOOT}" width="{WIDTH}" height="{bottom + FOOT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{title}" {size}>{"".join(parts)}</svg>'


def _draw_line(line: _Line, middle: float, at: Callable[[float], float]) -> list[str]:
    parts = []
    for number, (clip, value) in enumerate(line.clips):
        y = middle + (number * 0.618 % 1 - 0.5) * 0.6 * ROW  # apart, and the same each time
        dot = f'<circle class="clip" cx="{at(value):.1f}" cy="{y:.1f}" r="2.5">'
        parts.append(f"{dot}<title>{escape(f'{clip}: {value:.3f}')}</title></circle>")
    found = line.found
    if found["mean"] is None:
        x = LABELS + MARGIN
        return [f'<text class="none" x="{x}" y="{middle + 4:.1f}">cannot be judged</text>']
    name = escape(f"{line.name}: {found['mean']:.3f}, 95% interval {found['low']:.3f} to {found['high']:.3f}")
    parts.append(
        f'<g class="{line.kind}"><line x1="{at(found["low"]):.1f}" x2="{at(found["high"]):.1f}" y1="{middle:.1f}" '
        f'y2="{middle:.1f}"/><circle cx="{at(found["mean"]):.1f}" cy="{middle:.1f}" r="4.5"/><title>{name}</title></g>'
    )
    return parts


def nice_ticks(values: Sequence[float], most: int = 6) -> list[float]:
    """Round numbers that span the values and 0, at most `most` steps apart; at least two of them."""
    low, high = min([0.0, *values]), max([0.0, *values])
    if low == high:
        return [0.0, 1.0]
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) + 0.0 for number in range(first, last + 1)]


def _shorten(name: str, most: int = 24) -> str:
    """The end of a long name, which tells folders apart."""
    return name if len(name) <= most else "…" + name[1 - most :]


def draw_motion(motion: Motion) -> np.ndarray:
    """What moves which way: uint8 RGB `p h w 3`, teal outward and orange inward, the fuller the more of it is that.

    Grey is where nothing moves outward or inward or no motion can be told, the cross is the focus of expansion.
    """
    share = motion.outward / (lengths(motion.stream) + TAU)
    strength = (abs(share) * motion.textured)[..., None]
    colour = np.where(share[..., None] > 0, np.float32(OUTWARD), np.float32(INWARD))
    grey = motion.grey[:-1, ..., None].astype(np.float32)
    shade = 0.5 + grey / 510  # light and dark parts can still be told apart below the colour
    pictures = (grey * (1 - strength) + colour * shade * strength).clip(0, 255).astype(np.uint8)
    centre = tuple(round(float(place)) for place in motion.focus)
    for picture in pictures:
        cv2.drawMarker(picture, centre, (255, 255, 255), cv2.MARKER_CROSS, 15, 3)
        cv2.drawMarker(picture, centre, (0, 0, 0), cv2.MARKER_CROSS, 13, 1)
    return pictures
