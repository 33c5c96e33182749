"""Measure whether clips move like a drive, compared with true clips and control clips.

    python scripts/evaluate.py VIDEO_OR_FOLDER... --reference FOOTAGE [--frames N] [--out DIR]
    python scripts/evaluate.py CHECKPOINT... --reference world --looks still --clips 64 --rates 4,6,12

A folder is one row; all single files together are one row. A video is a clip; --frames cuts it into several.
--reference adds rows of true clips and of controls made from them (reversed, frozen, shuffled, zoomed stills), and the
Frechet distance of every row from the true one. Text agreement is measured for clips with a prompt, which txt2vid.py
stores in the file; a text file beside the video serves too. Prints a table, writes report.json and report.html.

A checkpoint first samples its clips, from captions of the procedural world for scenes that no training sees. Further
rows are the same network without temporal layers and, with --reference world, the true scenes, their controls and
their reconstruction by the autoencoder; measured flow is compared with true flow. --rates repeats the clips at other
frame rates.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ldm.data.world import UnseenScene
from ldm.devices import keep_freed_memory
from ldm.errors import Parser, UserError, run_command
from ldm.evaluation.clip_files import (
    MOST_REFERENCE_CLIPS,
    ClipFormat,
    PlannedRow,
    plan_reference,
    plan_rows,
    read_clips,
)
from ldm.evaluation.commanded_rate import rate_table, summarise_rates
from ldm.evaluation.flow import measure_motion
from ldm.evaluation.metrics import MetricNeeds, MetricSet, choose_metrics
from ldm.evaluation.motion import CONTROLS, read_measures, zoomed_still
from ldm.evaluation.page import html_page
from ldm.evaluation.report import TRUE, MeasuredClip, Report, Row, ShownClip, distance_table, notes, table
from ldm.evaluation.true_flow import FlowReading, flow_table, read_flow, summarise_flow
from ldm.experiments.evaluation_plan import (
    WORLD,
    EvaluationPlan,
    add_making_options,
    check_use,
    planned_of,
    split_given,
)
from ldm.experiments.sampled_rows import AUTOENCODED, MadeRow
from ldm.files import write_atomically
from ldm.sampling.progress import progress_bar

NUM_SHOWN = 4
NARROWEST = 150  # characters of the table without a terminal
MOST_WITH_TRUTH = 32  # clips whose flow is compared with true flow
EXTRA_TABLES = {"true_flow": flow_table, "rates": rate_table}  # key of the report -> its table


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        usage="%(prog)s VIDEOS_OR_CHECKPOINT... [options]",
    )  # fmt: skip
    parser.add_argument(
        "videos", nargs="+", type=Path, metavar="VIDEOS_OR_CHECKPOINT",
        help="clips to evaluate, files or folders; or checkpoints to sample them from",
    )  # fmt: skip
    parser.add_argument(
        "--reference", nargs="+", type=Path, metavar="FOOTAGE", default=[],
        help="true footage, read at the rate, size and length of the clips; or the word world",
    )  # fmt: skip
    parser.add_argument(
        "--no-controls", "--no-spoilt", action="store_true",
        help="leave out reversed, frozen, shuffled and zoomed clips: four fifths of the time of the reference",
    )  # fmt: skip
    parser.add_argument(
        "--judge", type=Path, metavar="FILE",
        help="style classifier, for text agreement and Frechet distances (default: that of models/drive)",
    )  # fmt: skip
    parser.add_argument(
        "--clip-model", type=Path, metavar="FOLDER",
        help="text agreement by CLIP instead, from a local folder in the format of transformers",
    )  # fmt: skip
    parser.add_argument(
        "--i3d", type=Path, metavar="FILE", help="FVD too, by I3D from a local TorchScript file; 16 frames a clip"
    )
    parser.add_argument("--trust-i3d", action="store_true", help="run that file, which contains code")
    parser.add_argument(
        "--frames", type=int, metavar="N",
        help="per clip: cut videos (default: whole), sample from checkpoints (default: as in training)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/evaluation"), help="folder for the report (default: %(default)s)"
    )
    add_making_options(parser)
    options = parser.parse_args(arguments)
    if options.i3d is not None and not options.trust_i3d:
        raise UserError(
            f"--i3d: expected --trust-i3d with it, found none: {options.i3d} is TorchScript, code that runs when read; "
            "give --trust-i3d if you trust its source"
        )
    return options


def measure_row(planned: PlannedRow, form: ClipFormat, metrics: MetricSet, advance: Callable[[], object]) -> Row:
    """Measure the clips of one row; `advance` is called after each."""
    row = Row(planned.name, is_reference=False)
    shown = indices_shown(planned.num_clips)
    for number, (video, start, frames) in enumerate(read_clips(planned, form)):
        seen = metrics.measure(frames, video.prompt)
        row.add(MeasuredClip(str(video.path), start, seen.readings, video.prompt), seen.features)
        if number in shown:
            row.shown.append(ShownClip(frames, video.prompt))
        advance()
    return row


def measure_reference(
    planned: PlannedRow, form: ClipFormat, metrics: MetricSet, controls: bool, advance: Callable[[], object]
) -> list[Row]:
    """Measure true clips and, if wanted, the controls made from each; `advance` is called after every clip."""
    rows = {name: Row(name, is_reference=True) for name in (TRUE, *(CONTROLS if controls else ()))}
    shown = indices_shown(planned.num_clips)
    for number, (video, start, frames) in enumerate(read_clips(planned, form)):
        true = metrics.measure(frames, video.prompt)
        for name, row in rows.items():
            made, seen = frames, true
            if name != TRUE:
                make = CONTROLS[name]
                made = zoomed_still(frames, true.motion) if make is zoomed_still else make(frames)
                seen = metrics.measure(made, video.prompt)
            row.add(MeasuredClip(str(video.path), start, seen.readings, video.prompt), seen.features)
            if number in shown:
                row.shown.append(ShownClip(made, video.prompt))
            advance()
    return list(rows.values())


def indices_shown(num_clips: int) -> set[int]:
    """The clips of a row that the page shows, evenly spaced."""
    return set(np.linspace(0, num_clips - 1, NUM_SHOWN).astype(int).tolist())


def evaluate(options: argparse.Namespace, console: Console, command: str) -> tuple[Report, dict[str, Any]]:
    """Make and measure all rows -> the report, and `EXTRA_TABLES` as for JSON."""
    checkpoints, videos = split_given(options.videos)
    check_use(options, checkpoints)
    made = None
    with console.status("reading clips and checkpoints"):
        given, form = plan_rows(videos, options.frames) if videos else ([], None)
        if checkpoints or WORLD in options.reference:
            made = EvaluationPlan(options, checkpoints, form, command)
            form = form or made.clip_format
        reference = None
        if options.reference and not (made and made.has_world):
            most = max(MOST_REFERENCE_CLIPS, len(made.scenes) if made else 0, *(row.num_clips for row in given))
            reference = plan_reference(options.reference, TRUE, form, most)
    if made is not None:
        with progress_bar(console, "clips made", made.num_clips) as update:
            made.make(lambda num: update(advance=num))
        reference = reference if made.true is None else planned_of(made.true)[0]
    rows = [(planned_of(row)[0], row.is_reference) for row in (made.rows if made else ())]
    rows = [*(row for row in rows if row[1]), *((row, False) for row in given), *(row for row in rows if not row[1])]
    with console.status("loading the metrics"):
        everything = [*(row for row, _ in rows), *([reference] if reference else [])]
        has_prompts = any(video.prompt is not None for row in everything for video in row.cuts)
        needs = MetricNeeds(form.num_frames, reference is not None, has_prompts)
        metrics = choose_metrics(options.judge, options.clip_model, options.i3d, needs)
    num_kinds = 1 if options.no_controls else 1 + len(CONTROLS)
    total = sum(row.num_clips for row, _ in rows) + (num_kinds * reference.num_clips if reference else 0)
    with progress_bar(console, "clips", total) as update:
        advance, measured = partial(update, advance=1), []
        if reference:
            measured += measure_reference(reference, form, metrics, not options.no_controls, advance)
        for row, is_reference in rows:
            measured.append(measure_row(row, form, metrics, advance))
            measured[-1].is_reference = is_reference
    return Report(form, measured, metrics), measure_extras(made, console) if made else {}


def measure_extras(made: EvaluationPlan, console: Console) -> dict[str, Any]:
    """`EXTRA_TABLES` of sampled clips: flow where true flow is known, motion at other frame rates."""
    found = {}
    if made.true is not None:
        rows = [made.true, *(row for row in made.rows if row.name.startswith(AUTOENCODED))]
        scenes = made.scenes[:MOST_WITH_TRUTH]
        with progress_bar(console, "clips with their true flow", len(scenes)) as update:
            found["true_flow"] = flow_rows(rows, scenes, made.form, partial(update, advance=1))
    if made.at_rates:
        total = sum(len(row.files) for rows in made.at_rates.values() for row in rows.values())
        with progress_bar(console, "clips at other rates", total) as update:
            advance = partial(update, advance=1)
            found["rates"] = [
                summarise_rates(name, {rate: ground_speeds(row, advance) for rate, row in rows.items()})
                for name, rows in made.at_rates.items()
            ]
    return found


def flow_rows(
    rows: Sequence[MadeRow], scenes: Sequence[UnseenScene], form: Any, advance: Callable[[], object]
) -> list[dict[str, Any]]:
    """Measured and true flow of rows that show these scenes; form: frames, size and rate."""
    readings: dict[str, list[FlowReading]] = {row.name: [] for row in rows}
    clips = [read_clips(*planned_of(row)) for row in rows]
    for scene in scenes:
        truth = scene.draw(*form, truth=True)
        for row, its in zip(rows, clips, strict=True):
            readings[row.name].append(read_flow(next(its)[2], truth.flow, truth.occluded))
        advance()
    return [summarise_flow(name, found) for name, found in readings.items()]


def ground_speeds(row: MadeRow, advance: Callable[[], object]) -> list[float | None]:
    """The ground speed of each clip of a row, None where it is not measurable."""
    found = []
    for _, _, frames in read_clips(*planned_of(row)):
        found.append(read_measures(measure_motion(frames))["speed"].value)
        advance()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate clips and checkpoints, print the tables and write the report."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(arguments)
    if options.no_controls and not options.reference:
        raise UserError("--no-controls: expected --reference with it, found none")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"{options.out}: expected a folder for the report, found a file; choose another --out")
    keep_freed_memory()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=NARROWEST)
    report, extras = evaluate(options, console, shlex.join(["python", "scripts/evaluate.py", *arguments]))
    with console.status("means, distances and their intervals"):
        summary = {**report.summary(), **extras}
    console.print(table(summary), markup=False)
    distances = distance_table(summary)
    if distances is not None:
        console.print(distances, markup=False)
    tables = [show(summary[name]) for name, show in EXTRA_TABLES.items() if name in summary]
    for its in tables:
        console.print(its, markup=False)
    for line in summary["told"]:
        console.print(line, markup=False, soft_wrap=True)
    for note in notes(summary):
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    options.out.mkdir(parents=True, exist_ok=True)
    title = "Do the clips move like a drive?"
    write_atomically(options.out / "report.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_atomically(options.out / "report.html", html_page(summary, report.rows, title, tables))
    console.print(f"{options.out / 'report.json'}, report.html", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
