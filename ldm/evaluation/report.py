"""All rows of an evaluation side by side: as numbers for JSON, as a table, and what to beware of in words.

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

from ldm.evaluation.clip_files import ClipFormat
from ldm.evaluation.motion import MEASURES, Reading
from ldm.evaluation.statistics import estimate, estimate_ratio, warnings

TRUE = "true"
NO_NUMBER = "-"


@dataclass(frozen=True)
class JudgedClip:
    """The measures of one clip, and where it comes from: a video and the frame of it where the clip starts."""

    video: str
    start: int
    readings: dict[str, Reading]


@dataclass
class Row:
    """Judged clips under one name; `is_reference` for true clips and what is made of them.

    shown: frames of a few of them, uint8 `t h w 3`.
    """

    name: str
    is_reference: bool
    clips: list[JudgedClip] = field(default_factory=list)
    shown: list[np.ndarray] = field(default_factory=list)

    def values(self, measure: str) -> list[float | None]:
        """One measure of all clips."""
        return [clip.readings[measure].value for clip in self.clips]

    @property
    def videos(self) -> list[str]:
        """Where each clip comes from."""
        return [clip.video for clip in self.clips]


@dataclass(frozen=True)
class Report:
    """Rows whose clips have one format."""

    form: ClipFormat
    rows: list[Row]

    def summary(self) -> dict[str, Any]:
        """Everything in plain containers, ready for JSON: the clips' format, the measures and the rows."""
        true = next((row for row in self.rows if row.is_reference and row.name == TRUE), None)
        return {
            "clips": {**asdict(self.form), "rate": float(self.form.rate)},
            "measures": {
                name: {key: value for key, value in vars(measure).items() if key != "compute"}
                for name, measure in MEASURES.items()
            },
            "rows": [_summarise(row, None if row is true else true) for row in self.rows],
        }


def _summarise(row: Row, true: Row | None) -> dict[str, Any]:
    """One row; `of_true` are its means as parts of those of the true clips, None where that says nothing."""
    of_true = {}
    for name, measure in MEASURES.items():
        if true is not None and measure.better >= 0:
            ratio = estimate_ratio(row.values(name), row.videos, true.values(name), true.videos)
            of_true[name] = ratio and asdict(ratio)
    return {
        "name": row.name,
        "is_reference": row.is_reference,
        "num_clips": len(row.clips),
        "num_videos": len(set(row.videos)),
        "warnings": warnings(row.videos),
        "estimates": {name: asdict(estimate(row.values(name), row.videos)) for name in MEASURES},
        "of_true": of_true,
        "not_judged": {name: reasons for name in MEASURES if (reasons := _reasons(row.clips, name))},
        "clips": [asdict(clip) for clip in row.clips],
    }


def _reasons(clips: Sequence[JudgedClip], measure: str) -> dict[str, int]:
    """Why clips could not be judged, and how many for each reason."""
    return dict(Counter(clip.readings[measure].reason for clip in clips if clip.readings[measure].value is None))


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
    found = []
    for row in summary["rows"]:
        titles: dict[tuple[str, int], list[str]] = {}
        for name, reasons in row["not_judged"].items():
            for reason, count in reasons.items():
                titles.setdefault((reason, count), []).append(summary["measures"][name]["title"])
        for (reason, count), measures in titles.items():
            what = "they" if len(measures) == len(summary["measures"]) else ", ".join(measures)
            found.append(f"{row['name']}: {count} of {row['num_clips']} clips: {what} cannot be judged: {reason}")
    shared: dict[str, list[str]] = {}
    for row in summary["rows"]:
        for warning in row["warnings"]:
            shared.setdefault(warning, []).append(row["name"])
    return found + [f"{', '.join(names)}: {warning}" for warning, names in shared.items()]
