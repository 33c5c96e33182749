"""What preparing shows: progress, what was kept and dropped and why, and pictures of what was stored."""

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
    """What was kept, what was dropped and why."""
    table = Table(title="prepared footage")
    for column in ("video", "scenes", "frames", "dropped"):
        table.add_column(column, justify="left" if column == "video" else "right", overflow="fold")
    table.add_column("why", overflow="fold")
    for report in [*plan.done, *fresh]:
        dropped = sum(stretch.stop - stretch.start for stretch in report.dropped)
        why = "; ".join(f"frames {d.start}-{d.stop - 1}: {d.reason}" for d in report.dropped)
        table.add_row(report.source, str(report.num_scenes), str(report.num_frames), str(dropped), why)
    for name, reason in plan.unusable.items():
        table.add_row(name, "0", "0", "all", reason)
    console.print(table, markup=False)


def print_looks(plan: PreparePlan, fresh: list[VideoReport], console: Console) -> None:
    """How many clips there are of each look, and what is wrong with any."""
    table = Table(title="drawn clips")
    for column in ("look", "clips", "frames", "dropped"):
        table.add_column(column, justify="left" if column == "look" else "right")
    reports = sorted([*plan.done, *fresh], key=lambda report: report.source)
    for look, group in groupby(reports, key=lambda report: report.source.split("/")[1]):
        clips = list(group)
        kept, frames = (sum(getattr(clip, count) for clip in clips) for count in ("num_scenes", "num_frames"))
        table.add_row(look, str(kept), str(frames), str(len(clips) - kept))
    console.print(table, markup=False)
    for report in reports:
        for stretch in report.dropped:
            console.print(f"{report.source}: {stretch.reason}", markup=False)


def write_preview(prepared: PreparedSet, encoders: Encoders) -> Path:
    """Decode a few scenes, from the first frame to the last, into a contact sheet."""
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
    """Steps a second."""

    def render(self, task: Task) -> Text:
        """The text of the column."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "")


def make_progress(console: Console) -> Progress:
    """Bars with a rate and the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)


def summary(prepared: PreparedSet, plan: PreparePlan, fresh: list[VideoReport], is_drawn: bool) -> str:
    """The last line: what the folder holds now."""
    info = prepared.info
    kind = "clips" if is_drawn else "videos"
    others = info.num_videos - sum(report.num_scenes > 0 for report in [*plan.done, *fresh])
    earlier = f" ({others} from runs with other footage)" if others else ""
    return (
        f"{kind.title()}: {len(fresh)} prepared, {len(plan.done)} done before, {len(plan.unusable)} dropped. "
        f"{prepared.root} holds scenes: {info.num_scenes}, {kind}: {info.num_videos}{earlier}, frames: "
        f"{info.num_frames}, {info.num_frames / info.fps:.0f} s at {info.fps:g} frames a second, "
        f"{info.size[0]}x{info.size[1]} pixels."
    )
