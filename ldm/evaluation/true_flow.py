"""Measured against true optical flow, for clips of the procedural world, whose flow is known.

A measure of motion is as good as the flow it uses: here is the error of that flow on the same clips, and the measure
computed from the true flow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from rich.table import Table

from ldm.evaluation.flow import endpoint_error, measure_motion, working_flow
from ldm.evaluation.motion import NotMeasurableError, roadside_expansion
from ldm.evaluation.report import new_table, number
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
    """One clip: mean endpoint error of measured flow and mean length of true flow over textured pixels that both frames
    show, in pixels of the working size; and roadside expansion by either flow. None if no such pixel exists."""

    error: float | None
    length: float | None
    roadside_expansion: float | None
    true_roadside_expansion: float | None


def read_flow(frames: np.ndarray, true_flow: np.ndarray, occluded: np.ndarray) -> FlowReading:
    """Frames uint8 `t h w 3`, their true flow `t-1 h w 2` in pixels, and its occluded pixels `t-1 h w` bool."""
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
    shown = new_table("measured against true flow", "clips", *TITLES.values())
    for row in rows:
        cells = ("\n".join(number(row[part], PLACES)) for part in TITLES)
        shown.add_row(row["name"], str(row["error"]["num_clips"]), *cells)
    return shown
