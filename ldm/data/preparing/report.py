"""Output of scripts/prepare.py: progress bars, tables of kept and dropped footage, previews of stored scenes."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ldm.data.preparing.parts import VideoReport
from ldm.data.preparing.sources import Encoders, PreparePlan
from ldm.data.shards import PreparedSet
from ldm.files import replacing
from ldm.video import contact_sheet

PREVIEW_SCENES, PREVIEW_FRAMES = 4, 5


def print_table(plan: PreparePlan, fresh: list[VideoReport], console: Console) -> None:
    """Kept and dropped scenes of each video, with reasons."""
    table = _table("prepared footage", "video", "scenes", "frames", "dropped")
    table.add_column("why", overflow="fold")
    for report in [*plan.done, *fresh]:
        dropped = sum(stretch.stop - stretch.start for stretch in report.dropped)
        why = "; ".join(f"frames {d.start}-{d.stop - 1}: {d.reason}" for d in report.dropped)
        table.add_row(report.source, str(report.num_scenes), str(report.num_frames), str(dropped), why)
    for name, reason in plan.unusable.items():
        table.add_row(name, "0", "0", "all", reason)
    console.print(table, markup=False)


def print_looks(plan: PreparePlan, fresh: list[VideoReport], console: Console) -> None:
    """Kept and dropped clips of each style of the procedural world, with reasons."""
    table = _table("procedural clips", "style", "clips", "frames", "dropped")
    reports = sorted([*plan.done, *fresh], key=lambda report: report.source)
    for look, group in groupby(reports, key=lambda report: report.source.split("/")[1]):
        clips = list(group)
        kept, frames = (sum(getattr(clip, count) for clip in clips) for count in ("num_scenes", "num_frames"))
        table.add_row(look, str(kept), str(frames), str(len(clips) - kept))
    console.print(table, markup=False)
    for report in reports:
        for stretch in report.dropped:
            console.print(f"{report.source}: {stretch.reason}", markup=False)


def _table(title: str, *columns: str) -> Table:
    """A table with a column of names and columns of numbers."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right", overflow="fold")
    return table


def write_preview(prepared: PreparedSet, encoders: Encoders) -> Path:
    """Decode a few frames of a few scenes into a contact sheet, preview.png in the prepared folder."""
    chosen = np.linspace(0, len(prepared.scenes) - 1, min(PREVIEW_SCENES, len(prepared.scenes))).round().astype(int)
    rows, labels = [], []
    for scene in (prepared.scenes[index] for index in dict.fromkeys(chosen.tolist())):
        count = min(PREVIEW_FRAMES, scene.num_frames)
        times = np.linspace(0, scene.num_frames - 1, count).round().astype(int).tolist()
        moments = np.concatenate([prepared.read_moments(scene, time, 1) for time in times])
        rows.append(encoders.pictures(moments))
        shown = ", ".join(str(scene.start + time) for time in times)
        labels.append(f"{scene.source} frames {shown}: {scene.captions[0]}")
    path = prepared.root / "preview.png"
    with replacing(path) as partial:
        contact_sheet(rows, labels).save(partial, format="PNG")
    return path


class RateColumn(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        """The rate, empty until it is known."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "")


def make_progress(console: Console) -> Progress:
    """Progress bars with rate and remaining time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)


def summary(prepared: PreparedSet, plan: PreparePlan, fresh: list[VideoReport], is_world: bool) -> str:
    """The last line of output: counts of this run and of the folder."""
    info = prepared.info
    kind = "clips" if is_world else "videos"
    others = info.num_videos - sum(report.num_scenes > 0 for report in [*plan.done, *fresh])
    earlier = f" ({others} prepared from other footage)" if others else ""
    return (
        f"{kind.title()}: {len(fresh)} prepared, {len(plan.done)} done before, {len(plan.unusable)} dropped. "
        f"{prepared.root} holds scenes: {info.num_scenes}, {kind}: {info.num_videos}{earlier}, frames: "
        f"{info.num_frames}, {info.num_frames / info.fps:.0f} s at {info.fps:g} frames a second, "
        f"{info.size[0]}x{info.size[1]} pixels."
    )
