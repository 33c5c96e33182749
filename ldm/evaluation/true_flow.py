"""Measured flow against the truth, where clips are drawn and their true flow is known.

What a measure of motion is worth depends on the flow that it is made from; here is how far that lies from the truth on
these very clips, and what the same measure says of the true flow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from rich import box
from rich.table import Table

from ldm.evaluation.flow import endpoint_error, measure_motion, working_flow
from ldm.evaluation.motion import NotMeasurableError, roadside_expansion
from ldm.evaluation.report import number
from ldm.evaluation.statistics import estimate

TITLES = {
    "error": "error of flow, pixels",
    "length": "length of true flow",
    "roadside_expansion": "roadside expansion",
    "true_roadside_expansion": "the same by true flow",
}
PLACES = 2


@dataclass(frozen=True)
class FlowReading:
    """Of one clip, in pixels of the working size where something is seen in both frames: the mean endpoint error of
    measured flow and the mean length of the true one; and roadside expansion by either. None where nothing is seen."""

    error: float | None
    length: float | None
    roadside_expansion: float | None
    true_roadside_expansion: float | None


def read_flow(frames: np.ndarray, true_flow: np.ndarray, occluded: np.ndarray) -> FlowReading:
    """Frames uint8 `t h w 3`, their true flow `t-1 h w 2` in pixels and where it leads nowhere, `t-1 h w` bool."""
    measured, true = measure_motion(frames), measure_motion(frames, true_flow)
    size = measured.grey.shape[:0:-1]
    hidden = np.stack([cv2.resize(pair.astype(np.uint8), size, interpolation=cv2.INTER_LINEAR) for pair in occluded])
    seen = measured.textured & (hidden == 0)
    error = length = None
    if seen.any():
        flow = working_flow(true_flow)
        error, length = endpoint_error(measured.flow, flow, seen), endpoint_error(np.zeros_like(flow), flow, seen)
    expansions: list[float | None] = []
    for motion in (measured, true):
        try:
            expansions.append(roadside_expansion(motion))
        except NotMeasurableError:
            expansions.append(None)
    return FlowReading(error, length, *expansions)


def summarise_flow(name: str, readings: Sequence[FlowReading]) -> dict[str, Any]:
    """Means over the clips of a row, with intervals, in plain containers."""
    clips = [str(number) for number in range(len(readings))]
    found = {part: estimate([getattr(reading, part) for reading in readings], clips) for part in TITLES}
    return {"name": name, **{part: asdict(its) for part, its in found.items()}}


def flow_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each summarised row."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    shown.add_column("flow against the truth", overflow="fold", min_width=14)
    for title in ("clips", *TITLES.values()):
        shown.add_column(title, justify="right")
    for row in rows:
        cells = ("\n".join(number(row[part], PLACES)) for part in TITLES)
        shown.add_row(row["name"], str(row["error"]["num_clips"]), *cells)
    return shown
