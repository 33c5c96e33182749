"""The whole evaluation as one HTML file that needs nothing else: numbers, plots, contact sheets and playing clips."""

from __future__ import annotations

import base64
import io
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.table import Table

from ldm.evaluation.flow import TAU, Motion, lengths, measure_motion
from ldm.evaluation.report import Row, ShownClip, distance_count, distance_label, notes, number
from ldm.video import contact_sheet, write_gif, write_mp4

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
    for row_index, line in enumerate(lines):
        middle = HEAD + ROW * (row_index + 0.5)
        parts.append(f'<text class="label" x="{LABELS}" y="{middle + 4:.1f}">{escape(_shorten(line.name))}</text>')
        parts += _draw_line(line, middle, at)
    title = escape(title)
    size = f'viewBox="0 0 {WIDTH} {bottom + FOOT}" width="{WIDTH}" height="{bottom + FOOT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{title}" {size}>{"".join(parts)}</svg>'


def _draw_line(line: _Line, middle: float, at: Callable[[float], float]) -> list[str]:
    parts = []
    for place, (clip, value) in enumerate(line.clips):
        y = middle + (place * 0.618 % 1 - 0.5) * 0.6 * ROW  # apart, and the same each time
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


SHEET_FRAMES = 6
SHOWN_WIDTH = 224  # pixels of a playing clip on the page
SHEET_SIDE = 128  # pixels of the longer side of a frame on a sheet

NOTATION = (
    "A dot is a clip. F is the flow from a frame to the next in pixels at 256 on the longer side, S the same without "
    "the camera's turning, d = (dx, dy) a pixel as seen from the focus of expansion, dy down, r = d / |d|, h and w "
    "height and width, tau = 0.25 pixels."
)
LEGEND = (
    "Evenly spread over each row, not chosen. In the lower line of a sheet teal streams outward from the cross, the "
    "focus of expansion, and orange towards it; grey is still or without texture."
)
DISTANCES = (
    "0 is alike, and smaller is nearer; a distance says nothing without what it was taken by, and comes out too large "
    "for few clips, so compare rows of as many clips. That of the true row is between its two halves."
)
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60666d; --line: #d5d9de; --paper: #fff; --box: #f5f6f8;
        --given: #c2410c; --reference: #1d5fa8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa1a9; --line: #3a4047; --paper: #16191c;
        --box: #1f2327; --given: #ff9a5c; --reference: #74b3f2; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1100px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; } h3 { margin: 1.5rem 0 .3rem; }
p, li { max-width: 75ch; } .soft, dt { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td small { display: block; color: var(--soft); white-space: nowrap; }
.warnings { background: var(--box); border-left: 4px solid var(--given); padding: .6rem 1rem; }
.warnings ul { margin: 0; padding-left: 1.1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: .3rem 0 0; max-width: 80ch; }
dd { margin: 0; } svg { max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); } svg .label { text-anchor: end; }
svg .tick { text-anchor: middle; fill: var(--soft); } svg .none { fill: var(--soft); font-style: italic; }
svg .grid { stroke: var(--line); } svg .zero { stroke: var(--soft); } svg .clip { fill: var(--soft); opacity: .45; }
svg g line { stroke-width: 3; } svg .given line { stroke: var(--given); } svg .given circle { fill: var(--given); }
svg .reference line { stroke: var(--reference); } svg .reference circle { fill: var(--reference); }
.clips { display: flex; flex-wrap: wrap; gap: .5rem; align-items: flex-start; }
figure { margin: 0; } figcaption { max-width: 224px; font-size: .8rem; line-height: 1.3; color: var(--soft); }
.clips video, .clips img { border-radius: 4px; }
.clips .sheet { max-width: 100%; height: auto; margin-top: .5rem; }
"""


def html_page(summary: Mapping[str, Any], rows: Sequence[Row], title: str, besides: Sequence[Table] = ()) -> str:
    """The page for a report's summary; `rows` are those of the same report, for the clips they show.

    besides: tables of what else was measured, shown below the others; their first column's head is the title.
    """
    form = summary["clips"]
    what = (
        f"Clips of {form['num_frames']} frames, {form['rate']:.4g} a second, read at {form['width']}x{form['height']} "
        "pixels. Means over clips; below each its 95% bootstrap interval."
    )
    warned = "".join(f"<li>{escape(note)}</li>" for note in notes(summary))
    body = [
        f"<h1>{escape(title)}</h1><p>{escape(what)}</p>",
        f'<div class="warnings"><ul>{warned}</ul></div>' if warned else "",
        f"<h2>Numbers</h2>{_table(summary, 'estimates')}",
    ]
    if any(row["of_true"] for row in summary["rows"]):
        body.append(
            "<h3>As parts of the true clips'</h3><p class='soft'>Ratios of means; none where the true mean cannot be "
            f"told from 0.</p>{_table(summary, 'of_true')}"
        )
    if any(row["distances"] for row in summary["rows"]):
        body.append(f"<h3>Frechet distances from the true clips</h3><p class='soft'>{escape(DISTANCES)}</p>")
        body.append(_table(summary, "distances"))
    body += [_rich_table(its) for its in besides]
    told = "".join(f"<li>{escape(line)}</li>" for line in summary["told"])
    body.append(f"<h2>Measures</h2><p class='soft'>{escape(NOTATION)}</p>{f'<ul>{told}</ul>' if told else ''}")
    body += [_measure(summary, name) for name in summary["measures"]]
    if any(row["distances"] for row in summary["rows"]):
        body += [_distance(summary, name) for name in summary["distances"]]
    body.append(f"<h2>Clips</h2><p class='soft'>{escape(LEGEND)}</p>")
    body += [_clips(row, form["rate"]) for row in rows]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{"".join(body)}</body></html>\n'


def _table(summary: Mapping[str, Any], part: str) -> str:
    known = summary["measures"] | summary["distances"]
    names = [name for name in known if any(name in row[part] for row in summary["rows"])]
    heads = "".join(f"<th>{escape(known[name]['title'])}</th>" for name in names)
    lines = []
    for row in summary["rows"]:
        if not row[part]:
            continue
        cells = (number(row[part].get(name), known[name]["places"]) for name in names)
        shown = "".join(f"<td>{mean}<small>{interval}</small></td>" for mean, interval in cells)
        name, count = row["name"], row["num_clips"]
        if part == "distances":
            name, count = distance_label(row), distance_count(row)
        lines.append(f"<tr><td>{escape(name)}</td><td>{count}</td>{shown}</tr>")
    return f'<div class="scroll"><table><tr><th></th><th>clips</th>{heads}</tr>{"".join(lines)}</table></div>'


def _rich_table(shown: Table) -> str:
    """A table of the terminal; the second line of a cell is its interval."""
    title, *heads = (escape(str(column.header)) for column in shown.columns)
    lines = []
    for name, *cells in zip(*(column.cells for column in shown.columns), strict=True):
        pairs = (escape(str(cell)).partition("\n") for cell in cells)
        lines.append(
            f"<tr><td>{escape(str(name))}</td>{''.join(f'<td>{a}<small>{b}</small></td>' for a, _, b in pairs)}</tr>"
        )
    head = "".join(f"<th>{text}</th>" for text in heads)
    table = f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'
    return f"<h3>{title[:1].upper()}{title[1:]}</h3>{table}"


def _measure(summary: Mapping[str, Any], name: str) -> str:
    measure = summary["measures"][name]
    entries = (("is", measure["formula"]), ("ranges", measure["scale"]), ("cannot see", measure["blind_to"]))
    return f"<h3>{escape(measure['title'])}</h3>{interval_plot(summary, name)}{_told(entries)}"


def _distance(summary: Mapping[str, Any], name: str) -> str:
    distance = summary["distances"][name]
    entries = (("between", distance["formula"]), ("by", distance["name"]), ("cannot see", distance["blind_to"]))
    return f"<h3>Frechet distance of {escape(distance['title'])}</h3>{distance_plot(summary, name)}{_told(entries)}"


def _told(entries: Sequence[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{term}</dt><dd>{escape(text)}</dd>' for term, text in entries)}</dl>"


def _clips(row: Row, rate: float) -> str:
    playing = "".join(_figure(clip, rate) for clip in row.shown)
    sheets = "".join(_sheet(clip.frames) for clip in row.shown)
    return f'<h3>{escape(row.name)}</h3><div class="clips">{playing}</div><div class="clips">{sheets}</div>'


def _figure(clip: ShownClip, rate: float) -> str:
    words = f"<figcaption>{escape(clip.prompt)}</figcaption>" if clip.prompt else ""
    return f"<figure>{_player(clip.frames, rate)}{words}</figure>"


def _player(frames: np.ndarray, rate: float) -> str:
    """A clip that plays by itself: MP4, or GIF where a side is odd."""
    is_even = frames.shape[1] % 2 == 0 and frames.shape[2] % 2 == 0
    kind, write = ("video/mp4", write_mp4) if is_even else ("image/gif", write_gif)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"
        write(path, frames, rate)
        source = _data_uri(kind, path.read_bytes())
    if is_even:
        return f'<video src="{source}" width="{SHOWN_WIDTH}" autoplay loop muted playsinline></video>'
    return f'<img src="{source}" width="{SHOWN_WIDTH}" alt="a clip">'


def _sheet(frames: np.ndarray) -> str:
    """Frames of a clip above what moves in them."""
    places = np.linspace(0, len(frames) - 2, min(SHEET_FRAMES, len(frames) - 1)).round().astype(int)
    motion = measure_motion(frames)
    height, width = motion.grey.shape[1:]
    small = [round(side * SHEET_SIDE / max(height, width)) for side in (width, height)]
    rows = [
        np.stack([cv2.resize(pictures[place], small, interpolation=cv2.INTER_AREA) for place in places])
        for pictures in (frames, draw_motion(motion))
    ]
    buffer = io.BytesIO()
    contact_sheet(rows).save(buffer, format="JPEG", quality=85)
    return f'<img class="sheet" src="{_data_uri("image/jpeg", buffer.getvalue())}" alt="frames and their motion">'


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
