"""All rows of an evaluation side by side: numbers for JSON, tables for the terminal, and notes on their limits.

`Report.summary` holds the whole result in plain containers; tables, page and plots show it and compute nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from ldm.data.world.captions import look_of_prompt
from ldm.evaluation.clip_files import ClipFormat
from ldm.evaluation.frechet import FEW_FOR_DISTANCE, FeatureRow, estimate_distance
from ldm.evaluation.metrics import MetricSet
from ldm.evaluation.motion import NO_TEXTURE, Reading
from ldm.evaluation.statistics import estimate, estimate_ratio, warnings

TRUE = "true"
HALVES = "half against half"
NO_NUMBER = "-"


@dataclass(frozen=True)
class MeasuredClip:
    """The measures of one clip, its video, the frame of the video where it starts, and its prompt if known."""

    video: str
    start: int
    readings: dict[str, Reading]
    prompt: str | None = None


@dataclass(frozen=True)
class ShownClip:
    """A clip for the page: frames uint8 `t h w 3`, and its prompt if known."""

    frames: np.ndarray
    prompt: str | None = None


@dataclass
class Row:
    """Measured clips under one name; `is_reference` for true clips and the control clips made of them.

    features: extractor -> vectors `n d` of every clip, None of a clip without texture. shown: a few of the clips.
    """

    name: str
    is_reference: bool
    clips: list[MeasuredClip] = field(default_factory=list)
    features: dict[str, list[np.ndarray | None]] = field(default_factory=dict)
    shown: list[ShownClip] = field(default_factory=list)

    def add(self, clip: MeasuredClip, features: Mapping[str, np.ndarray | None]) -> None:
        self.clips.append(clip)
        for name, found in features.items():
            self.features.setdefault(name, []).append(found)

    def values(self, measure: str) -> list[float | None]:
        """One measure of all clips."""
        return [clip.readings[measure].value for clip in self.clips]

    @property
    def videos(self) -> list[str]:
        """The video of each clip."""
        return [clip.video for clip in self.clips]


@dataclass(frozen=True)
class Report:
    """Rows whose clips have one format, and the metrics they were measured with."""

    form: ClipFormat
    rows: list[Row]
    metrics: MetricSet = field(default_factory=MetricSet)

    def summary(self) -> dict[str, Any]:
        """Clip format, measures, distances and rows in plain containers, ready for JSON."""
        true = next((row for row in self.rows if row.is_reference and row.name == TRUE), None)
        return {
            "clips": {**asdict(self.form), "rate": float(self.form.rate)},
            "told": list(self.metrics.descriptions),
            "measures": {
                name: {key: value for key, value in vars(measure).items() if key != "compute"}
                for name, measure in self.metrics.measures.items()
            },
            "distances": {
                name: {key: value for key, value in vars(extractor).items() if key != "extract"}
                for name, extractor in self.metrics.extractors.items()
            },
            "rows": [_summarise(row, true, self.metrics) for row in self.rows],
        }


def _summarise(row: Row, true: Row | None, metrics: MetricSet) -> dict[str, Any]:
    """One row. `of_true`: its means relative to those of the true clips, None where that ratio is undefined.

    The distances of the true row are those of one half of it from the other.
    """
    measures, of_true, distances = metrics.measures, {}, {}
    for name, measure in measures.items():
        if true is not None and row is not true and measure.better >= 0:
            ratio = estimate_ratio(row.values(name), row.videos, true.values(name), true.videos)
            of_true[name] = ratio and asdict(ratio)
    if true is not None:
        kinds = [look_of_prompt(clip.prompt or "") or "" for clip in true.clips]
        for name in metrics.extractors:
            target = FeatureRow(true.features[name], true.videos)
            pair = target.halves(kinds) if row is true else (FeatureRow(row.features[name], row.videos), target)
            distances[name] = asdict(estimate_distance(*pair))
    return {
        "name": row.name,
        "is_reference": row.is_reference,
        "num_clips": len(row.clips),
        "num_videos": len(set(row.videos)),
        "warnings": warnings(row.videos) + _distance_warnings(distances),
        "estimates": {name: asdict(estimate(row.values(name), row.videos)) for name in measures},
        "of_true": of_true,
        "distances": distances,
        "not_judged": {name: reasons for name in measures if (reasons := _reasons(row.clips, name))},
        "clips": [asdict(clip) for clip in row.clips],
    }


def _reasons(clips: Sequence[MeasuredClip], measure: str) -> dict[str, int]:
    """Reason why a measure has no value -> number of such clips."""
    return dict(Counter(clip.readings[measure].reason for clip in clips if clip.readings[measure].value is None))


def _distance_warnings(distances: Mapping[str, Any]) -> list[str]:
    counts = [found["num_clips"] for found in distances.values()]
    found = []
    if counts and counts[0] < FEW_FOR_DISTANCE:
        found.append(
            f"Frechet distances of {counts[0]} clips are biased upwards, as all below {FEW_FOR_DISTANCE:,} clips: "
            "compare only with rows of the same number of clips"
        )
    if missing := max((found["num_unjudged"] for found in distances.values()), default=0):
        found.append(f"{missing} of {counts[0] + missing} clips left out of the Frechet distances: {NO_TEXTURE}")
    return found


def table(summary: Mapping[str, Any]) -> Table:
    """Means with their 95% intervals below, one line per row of the summary."""
    return _rows_table(summary, "mean and 95% interval", "measures", "estimates")


def ratio_table(summary: Mapping[str, Any]) -> Table | None:
    """Means relative to those of the true clips, one line per other row; None without true clips."""
    return _rows_table(summary, "relative to true clips", "measures", "of_true")


def distance_table(summary: Mapping[str, Any]) -> Table | None:
    """Frechet distances from the true clips, one line per row; None without true clips."""
    return _rows_table(summary, "Frechet distance from true clips", "distances", "distances")


def _rows_table(summary: Mapping[str, Any], heading: str, kind: str, part: str) -> Table | None:
    """`part` of each row that has it, a column for each of the summary's `kind` that any row has a part of."""
    rows = [row for row in summary["rows"] if row[part]]
    columns = {name: column for name, column in summary[kind].items() if any(name in row[part] for row in rows)}
    if not rows:
        return None
    shown = new_table(heading, "clips", *(column["title"] for column in columns.values()))
    for row in rows:
        label, count = row["name"], row["num_clips"]
        if part == "distances":  # all extractors leave out the same clips
            label, count = distance_label(row), next(iter(row[part].values()))["num_clips"]
        cells = (number(row[part].get(name), column["places"]) for name, column in columns.items())
        shown.add_row(label, str(count), *("\n".join(cell) for cell in cells))
    return shown


def new_table(heading: str, *columns: str) -> Table:
    """An empty table of the terminal with right-aligned columns beside the rows' names."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    shown.add_column(heading, overflow="fold", min_width=14)
    for column in columns:
        shown.add_column(column, justify="right")
    return shown


def distance_label(row: Mapping[str, Any]) -> str:
    """The name of a row among distances."""
    return f"{row['name']}: {HALVES}" if row["is_reference"] and row["name"] == TRUE else row["name"]


def number(found: Mapping[str, Any] | None, places: int) -> tuple[str, str]:
    """A mean and its interval as text with so many decimals; a dash and an empty string where there is none."""
    if found is None or found["mean"] is None:
        return NO_NUMBER, ""
    mean, low, high = (f"{round(found[part], places) + 0.0:.{places}f}" for part in ("mean", "low", "high"))  # no -0
    return mean, f"{low} to {high}"


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Limits of the numbers: clips that could not be measured, with reasons, and unreliable intervals."""
    shared: dict[str, list[str]] = {}
    for row in summary["rows"]:
        titles: dict[tuple[str, int], list[str]] = {}
        for name, reasons in row["not_judged"].items():
            for reason, count in reasons.items():
                titles.setdefault((reason, count), []).append(summary["measures"][name]["title"])
        for (reason, count), measures in titles.items():
            what = "any measure" if len(measures) == len(summary["measures"]) else ", ".join(measures)
            note = f"{count} of {row['num_clips']} clips have no value of {what}: {reason}"
            shared.setdefault(note, []).append(row["name"])
    for row in summary["rows"]:
        for warning in row["warnings"]:
            shared.setdefault(warning, []).append(row["name"])
    return [f"{', '.join(names)}: {note}" for note, names in shared.items()]
