"""All rows of an evaluation side by side: as numbers for JSON, as tables, and what to beware of in words.

`Report.summary` is the whole result in plain containers; table and page show what is in it and compute nothing.
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
    """The measures of one clip, where it comes from - a video and its frame where the clip starts - and its prompt."""

    video: str
    start: int
    readings: dict[str, Reading]
    prompt: str | None = None


@dataclass(frozen=True)
class ShownClip:
    """One of the clips that are to be seen: frames uint8 `t h w 3`, and the prompt if it is known."""

    frames: np.ndarray
    prompt: str | None = None


@dataclass
class Row:
    """Judged clips under one name; `is_reference` for true clips and what is made of them.

    features: for each extractor the vectors `n d` of every clip, None of one that could not be judged.
    shown: a few of the clips.
    """

    name: str
    is_reference: bool
    clips: list[MeasuredClip] = field(default_factory=list)
    features: dict[str, list[np.ndarray | None]] = field(default_factory=dict)
    shown: list[ShownClip] = field(default_factory=list)

    def add(self, clip: MeasuredClip, features: Mapping[str, np.ndarray | None]) -> None:
        """One more clip."""
        self.clips.append(clip)
        for name, found in features.items():
            self.features.setdefault(name, []).append(found)

    def values(self, measure: str) -> list[float | None]:
        """One measure of all clips."""
        return [clip.readings[measure].value for clip in self.clips]

    @property
    def videos(self) -> list[str]:
        """Where each clip comes from."""
        return [clip.video for clip in self.clips]


@dataclass(frozen=True)
class Report:
    """Rows whose clips have one format, and what they were measured with."""

    form: ClipFormat
    rows: list[Row]
    metrics: MetricSet = field(default_factory=MetricSet)

    def summary(self) -> dict[str, Any]:
        """Everything in plain containers, ready for JSON: the clips' format, the measures and the rows."""
        true = next((row for row in self.rows if row.is_reference and row.name == TRUE), None)
        return {
            "clips": {**asdict(self.form), "rate": float(self.form.rate)},
            "told": list(self.metrics.told),
            "measures": {
                name: {key: value for key, value in vars(measure).items() if key != "compute"}
                for name, measure in self.metrics.measures.items()
            },
            "distances": {
                name: {key: value for key, value in vars(extractor).items() if key not in ("extract", "shortest")}
                for name, extractor in self.metrics.extractors.items()
            },
            "rows": [_summarise(row, true, self.metrics) for row in self.rows],
        }


def _summarise(row: Row, true: Row | None, metrics: MetricSet) -> dict[str, Any]:
    """One row; `of_true` are its means as parts of those of the true clips, None where that says nothing.

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
    """Why clips could not be judged, and how many for each reason."""
    return dict(Counter(clip.readings[measure].reason for clip in clips if clip.readings[measure].value is None))


def _distance_warnings(distances: Mapping[str, Any]) -> list[str]:
    """What to say of distances before anyone compares them."""
    counts = [found["num_clips"] for found in distances.values()]
    found = []
    if counts and counts[0] < FEW_FOR_DISTANCE:
        found.append(
            f"Frechet distances of {counts[0]} clips come out too large, as they do below {FEW_FOR_DISTANCE:,}: "
            "compare with rows of as many clips only"
        )
    if missing := max((found["num_unjudged"] for found in distances.values()), default=0):
        found.append(f"left out of the Frechet distances: {missing} of {counts[0] + missing} clips: {NO_TEXTURE}")
    return found


def table(summary: Mapping[str, Any]) -> Table:
    """The means with their 95% intervals below, a line for each row of the summary."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    shown.add_column("mean and 95% interval", overflow="fold", min_width=14)
    shown.add_column("clips", justify="right")
    for measure in summary["measures"].values():
        shown.add_column(measure["title"], justify="right")
    for row in summary["rows"]:
        cells = (number(row["estimates"][name], measure["places"]) for name, measure in summary["measures"].items())
        shown.add_row(row["name"], str(row["num_clips"]), *("\n".join(cell) for cell in cells))
    return shown


def distance_table(summary: Mapping[str, Any]) -> Table | None:
    """The Frechet distances from the true clips, a line for each row; None where there are none."""
    if not any(row["distances"] for row in summary["rows"]):
        return None
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    shown.add_column("Frechet distance from true clips", overflow="fold", min_width=14)
    shown.add_column("clips", justify="right")
    for distance in summary["distances"].values():
        shown.add_column(distance["title"], justify="right")
    for row in summary["rows"]:
        cells = [number(row["distances"][name], its["places"]) for name, its in summary["distances"].items()]
        shown.add_row(distance_label(row), str(distance_count(row)), *("\n".join(cell) for cell in cells))
    return shown


def distance_label(row: Mapping[str, Any]) -> str:
    """The name of a row among distances."""
    return f"{row['name']}: {HALVES}" if row["is_reference"] and row["name"] == TRUE else row["name"]


def distance_count(row: Mapping[str, Any]) -> int:
    """How many of its clips a row's distances are taken from; all extractors leave out the same."""
    return next(found["num_clips"] for found in row["distances"].values())


def number(found: Mapping[str, Any] | None, places: int) -> tuple[str, str]:
    """A mean and its interval as text with so many decimal places; a dash and nothing where there is none."""
    if found is None or found["mean"] is None:
        return NO_NUMBER, ""
    mean, low, high = (_plain(found[part], places) for part in ("mean", "low", "high"))
    return mean, f"{low} to {high}"


def _plain(value: float, places: int) -> str:
    """A number without the minus of a zero."""
    return f"{round(value, places) + 0.0:.{places}f}"


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What to beware of: clips that could not be judged, and why, and intervals that promise too much."""
    shared: dict[str, list[str]] = {}
    for row in summary["rows"]:
        titles: dict[tuple[str, int], list[str]] = {}
        for name, reasons in row["not_judged"].items():
            for reason, count in reasons.items():
                titles.setdefault((reason, count), []).append(summary["measures"][name]["title"])
        for (reason, count), measures in titles.items():
            what = "they" if len(measures) == len(summary["measures"]) else ", ".join(measures)
            note = f"{count} of {row['num_clips']} clips: {what} cannot be judged: {reason}"
            shared.setdefault(note, []).append(row["name"])
    for row in summary["rows"]:
        for warning in row["warnings"]:
            shared.setdefault(warning, []).append(row["name"])
    return [f"{', '.join(names)}: {note}" for note, names in shared.items()]
