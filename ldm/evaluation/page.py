"""An evaluation as one self-contained HTML file: numbers, plots (`plots.py`), contact sheets and playing clips."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.table import Table

from ldm.evaluation.flow import TAU, Motion, lengths, measure_motion
from ldm.evaluation.plots import THEME, distance_plot, interval_plot
from ldm.evaluation.report import Row, ShownClip, distance_table, notes, ratio_table, table
from ldm.video import contact_sheet, write_gif, write_mp4

OUTWARD, INWARD = (45, 190, 200), (240, 130, 40)  # teal and orange: colour-blind safe
SHEET_FRAMES = 6
SHOWN_WIDTH = 224  # pixels of a playing clip
SHEET_SIDE = 128  # pixels of the longer side of a frame on a contact sheet

NOTATION = (
    "Each dot is a clip. F is the optical flow from one frame to the next in pixels at 256 on the longer side, S is F "
    "without camera rotation, d = (dx, dy) is a pixel relative to the focus of expansion, dy down, r = d / |d|, h and "
    "w are height and width, tau = 0.25 pixels."
)
CLIPS = (
    "Evenly spaced over each row, not selected. In the lower line of a sheet teal moves outward from the focus of "
    "expansion (the cross) and orange towards it; grey is still or has no texture."
)
RATIOS = "Ratios of means; empty where the interval of the true mean includes 0."
DISTANCES = (
    "0 is identical, smaller is closer. A distance means nothing without its features and is biased upwards for few "
    "clips: compare rows with the same number of clips. The distance of the true row is between its two halves."
)
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --box: #f5f6f8; LIGHT }
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
dd { margin: 0; } svg { max-width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
.clips { display: flex; flex-wrap: wrap; gap: .5rem; align-items: flex-start; }
figure { margin: 0; } figcaption { max-width: 224px; font-size: .8rem; line-height: 1.3; color: var(--soft); }
.clips video, .clips img { border-radius: 4px; }
.clips .sheet { max-width: 100%; height: auto; margin-top: .5rem; }
""".replace("LIGHT", " ".join(f"--{name}: {colour};" for name, colour in THEME.items()))


def html_page(summary: Mapping[str, Any], rows: Sequence[Row], title: str, more_tables: Sequence[Table] = ()) -> str:
    """The page of a report's summary.

    rows: of the same report; their clips are shown. more_tables: follow the others, each under the heading of its first
    column.
    """
    clips = summary["clips"]
    form = (
        f"Clips of {clips['num_frames']} frames at {clips['rate']:.4g} frames per second, {clips['width']}x"
        f"{clips['height']} pixels. Means over clips; below each its 95% bootstrap interval."
    )
    body = [f"<h1>{escape(title)}</h1><p>{escape(form)}</p>"]
    if warnings := _items(notes(summary)):
        body.append(f'<div class="warnings">{warnings}</div>')
    body += ["<h2>Numbers</h2>", _table(table(summary))]
    ratios, distances = ratio_table(summary), distance_table(summary)
    if ratios is not None:
        body += ["<h3>Relative to the true clips</h3>", _note(RATIOS), _table(ratios)]
    if distances is not None:
        body += ["<h3>Frechet distances from the true clips</h3>", _note(DISTANCES), _table(distances)]
    for each in more_tables:
        heading = escape(str(each.columns[0].header))
        body += [f"<h3>{heading[:1].upper()}{heading[1:]}</h3>", _table(each)]
    body += ["<h2>Measures</h2>", _note(NOTATION), _items(summary["told"])]
    body += [_measure(summary, name) for name in summary["measures"]]
    body += [_distance(summary, name) for name in summary["distances"] if distances is not None]
    body += ["<h2>Clips</h2>", _note(CLIPS), *(_clips(row, clips["rate"]) for row in rows)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{"".join(body)}</body></html>\n'


def _note(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def _items(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _table(shown: Table) -> str:
    """A table of the terminal as HTML; the second line of a cell is its interval."""
    heads = "".join(f"<th>{escape(str(column.header))}</th>" for column in shown.columns[1:])
    lines = []
    for name, *cells in zip(*(column.cells for column in shown.columns), strict=True):
        pairs = (escape(str(cell)).partition("\n") for cell in cells)
        numbers = "".join(f"<td>{mean}<small>{interval}</small></td>" for mean, _, interval in pairs)
        lines.append(f"<tr><td>{escape(str(name))}</td>{numbers}</tr>")
    return f'<div class="scroll"><table><tr><th></th>{heads}</tr>{"".join(lines)}</table></div>'


def _measure(summary: Mapping[str, Any], name: str) -> str:
    measure = summary["measures"][name]
    entries = {"is": measure["formula"], "ranges": measure["scale"], "cannot see": measure["blind_to"]}
    return f"<h3>{escape(measure['title'])}</h3>{interval_plot(summary, name)}{_definitions(entries)}"


def _distance(summary: Mapping[str, Any], name: str) -> str:
    distance = summary["distances"][name]
    entries = {"between": distance["formula"], "by": distance["name"], "cannot see": distance["blind_to"]}
    title = f"<h3>Frechet distance of {escape(distance['title'])}</h3>"
    return f"{title}{distance_plot(summary, name)}{_definitions(entries)}"


def _definitions(entries: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{term}</dt><dd>{escape(text)}</dd>' for term, text in entries.items())}</dl>"


def _clips(row: Row, rate: float) -> str:
    playing = "".join(_figure(clip, rate) for clip in row.shown)
    sheets = "".join(_sheet(clip.frames) for clip in row.shown)
    return f'<h3>{escape(row.name)}</h3><div class="clips">{playing}</div><div class="clips">{sheets}</div>'


def _figure(clip: ShownClip, rate: float) -> str:
    caption = f"<figcaption>{escape(clip.prompt)}</figcaption>" if clip.prompt else ""
    return f"<figure>{_player(clip.frames, rate)}{caption}</figure>"


def _player(frames: np.ndarray, rate: float) -> str:
    """A looping clip: MP4, or GIF where height or width is odd."""
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
    """Frames of a clip above the motion that follows each."""
    chosen = np.linspace(0, len(frames) - 2, min(SHEET_FRAMES, len(frames) - 1)).round().astype(int)
    motion = measure_motion(frames)
    height, width = motion.grey.shape[1:]
    size = [round(side * SHEET_SIDE / max(height, width)) for side in (width, height)]
    rows = [
        np.stack([cv2.resize(pictures[number], size, interpolation=cv2.INTER_AREA) for number in chosen])
        for pictures in (frames, draw_motion(motion))
    ]
    buffer = io.BytesIO()
    contact_sheet(rows).save(buffer, format="JPEG", quality=85)
    return f'<img class="sheet" src="{_data_uri("image/jpeg", buffer.getvalue())}" alt="frames and their motion">'


def draw_motion(motion: Motion) -> np.ndarray:
    """Direction of motion as uint8 RGB `p h w 3`: teal outward, orange inward, saturated where all motion is.

    Grey is sideways, still or without texture; the cross is the focus of expansion.
    """
    share = motion.outward / (lengths(motion.stream) + TAU)
    strength = (abs(share) * motion.textured)[..., None]
    colour = np.where(share[..., None] > 0, np.float32(OUTWARD), np.float32(INWARD))
    grey = motion.grey[:-1, ..., None].astype(np.float32)
    shade = 0.5 + grey / 510  # keeps light and dark apart below the colour
    pictures = (grey * (1 - strength) + colour * shade * strength).clip(0, 255).astype(np.uint8)
    centre = tuple(round(float(coordinate)) for coordinate in motion.focus)
    for picture in pictures:
        cv2.drawMarker(picture, centre, (255, 255, 255), cv2.MARKER_CROSS, 15, 3)
        cv2.drawMarker(picture, centre, (0, 0, 0), cv2.MARKER_CROSS, 13, 1)
    return pictures


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
