"""Measure whether clips move as a drive moves, beside true clips and clips spoilt on purpose.

    python scripts/evaluate.py VIDEO_OR_FOLDER... --reference FOOTAGE [--frames N] [--out DIR]
    python scripts/evaluate.py CHECKPOINT... --reference world --looks still --clips 64 --rates 4,6,12

Every folder makes a row, files given one by one make one together. A video is a clip; --frames cuts it into several.
--reference adds the row of true clips and, made from them, reversed, frozen, shuffled ones and zoomed stills, and the
Frechet distance of every row from the true one. Clips whose prompt is known - it is in what txt2vid.py writes, or in
a text file beside the video - are held against it. Prints a table and writes report.json and report.html.

A checkpoint makes its clips first, from captions of the drawn world: scenes that no training sees. Beside its own row
are its frames without the layers over time and, with --reference world, those scenes as they are, spoilt, and through
its autoencoder; measured flow is then held against the true one. --rates makes the same clips at other frame rates.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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

NUM_SHOWN = 4
NARROWEST = 150  # characters of the table where there is no terminal
MOST_WITH_TRUTH = 32  # clips whose flow is held against the truth
BESIDES = {"true_flow": flow_table, "rates": rate_table}  # what is measured besides the rows -> its table


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        usage="%(prog)s VIDEOS_OR_CHECKPOINT... [options]",
    )  # fmt: skip
    parser.add_argument(
        "videos", nargs="+", type=Path, metavar="VIDEOS_OR_CHECKPOINT",
        help="clips to evaluate, files or folders; or checkpoints, which make them",
    )  # fmt: skip
    parser.add_argument(
        "--reference", nargs="+", type=Path, metavar="FOOTAGE", default=[],
        help="true footage, read at the rate, size and length of what is evaluated; or the word world",
    )  # fmt: skip
    parser.add_argument(
        "--no-spoilt", action="store_true", help="leave out reversed, frozen, shuffled and zoomed ones: four fifths of "
        "the time that the reference takes",
    )  # fmt: skip
    parser.add_argument(
        "--judge", type=Path, metavar="FILE",
        help="look classifier, for text agreement and Frechet distances (default: that of models/drive)",
    )  # fmt: skip
    parser.add_argument(
        "--clip-model", type=Path, metavar="FOLDER",
        help="text agreement by CLIP instead, from a local folder in the form of transformers",
    )  # fmt: skip
    parser.add_argument(
        "--i3d", type=Path, metavar="FILE", help="FVD as well, by I3D from a local TorchScript file; 16 frames a clip"
    )
    parser.add_argument("--trust-i3d", action="store_true", help="run that file, which is a program")
    parser.add_argument(
        "--frames", type=int, metavar="N",
        help="of a clip: videos are cut into such (default: whole), checkpoints make such (default: as in training)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/evaluation"), help="folder for the report (default: %(default)s)"
    )
    add_making_options(parser)
    options = parser.parse_args(arguments)
    if options.i3d is not None and not options.trust_i3d:
        raise UserError(
            f"--i3d: {options.i3d} is TorchScript, a program that runs as soon as it is read; give --trust-i3d beside "
            "it if you know where it comes from"
        )
    return options


def judge_row(planned: PlannedRow, form: ClipFormat, metrics: MetricSet, advance: Callable[[], object]) -> Row:
    """Measure the given clips of one row; `advance` is called after each."""
    row = Row(planned.name, is_reference=False)
    shown = places_shown(planned.num_clips)
    for number, (video, start, frames) in enumerate(read_clips(planned, form)):
        seen = metrics.measure(frames, video.prompt)
        row.add(MeasuredClip(str(video.path), start, seen.readings, video.prompt), seen.features)
        if number in shown:
            row.shown.append(ShownClip(frames, video.prompt))
        advance()
    return row


def judge_reference(
    planned: PlannedRow, form: ClipFormat, metrics: MetricSet, spoilt: bool, advance: Callable[[], object]
) -> list[Row]:
    """Measure true clips and, where wanted, spoilt ones made of each of them; `advance` is called after every one."""
    rows = {name: Row(name, is_reference=True) for name in (TRUE, *(CONTROLS if spoilt else ()))}
    shown = places_shown(planned.num_clips)
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


def places_shown(num_clips: int) -> set[int]:
    """Which clips of a row are shown: evenly spread over it."""
    return set(np.linspace(0, num_clips - 1, NUM_SHOWN).astype(int).tolist())


def evaluate(options: argparse.Namespace, console: Console, words: str) -> tuple[Report, dict[str, Any]]:
    """Make and measure all that the command line names: the rows, and what is measured besides them, as for JSON."""
    checkpoints, videos = split_given(options.videos)
    check_use(options, checkpoints)
    made = None
    with console.status("looking at what is given"):
        given, form = plan_rows(videos, options.frames) if videos else ([], None)
        if checkpoints or WORLD in options.reference:
            made = EvaluationPlan(options, checkpoints, form, words)
            form = form or made.clip_format
        reference = None
        if options.reference and not (made and made.has_world):
            most = max(MOST_REFERENCE_CLIPS, len(made.scenes) if made else 0, *(row.num_clips for row in given))
            reference = plan_reference(options.reference, TRUE, form, most)
    if made is not None:
        with progress_bar(console, "clips made", made.num_clips) as advance:
            made.make(advance)
        reference = reference if made.true is None else planned_of(made.true)[0]
    rows = [(planned_of(row)[0], row.is_reference) for row in (made.rows if made else ())]
    rows = [*(row for row in rows if row[1]), *((row, False) for row in given), *(row for row in rows if not row[1])]
    with console.status("looking for what measures"):
        everything = [*(row for row, _ in rows), *([reference] if reference else [])]
        has_prompts = any(video.prompt is not None for row in everything for video in row.cuts)
        needs = MetricNeeds(form.num_frames, reference is not None, has_prompts)
        metrics = choose_metrics(options.judge, options.clip_model, options.i3d, needs)
    num_kinds = 1 if options.no_spoilt else 1 + len(CONTROLS)
    total = sum(row.num_clips for row, _ in rows) + (num_kinds * reference.num_clips if reference else 0)
    with progress_bar(console, "clips", total) as advance:
        judged = []
        if reference:
            judged += judge_reference(reference, form, metrics, not options.no_spoilt, advance)
        for row, is_reference in rows:
            judged.append(judge_row(row, form, metrics, advance))
            judged[-1].is_reference = is_reference
    return Report(form, judged, metrics), measure_besides(made, console) if made else {}


def measure_besides(made: EvaluationPlan, console: Console) -> dict[str, Any]:
    """What is measured of made clips besides the rows: flow where its truth is known, motion at other frame rates."""
    found = {}
    if made.true is not None:
        rows = [made.true, *(row for row in made.rows if row.name.startswith(AUTOENCODED))]
        scenes = made.scenes[:MOST_WITH_TRUTH]
        with progress_bar(console, "clips with their true flow", len(scenes)) as advance:
            found["true_flow"] = flow_rows(rows, scenes, made.form, advance)
    if made.at_rates:
        total = sum(len(row.files) for rows in made.at_rates.values() for row in rows.values())
        with progress_bar(console, "clips at other rates", total) as advance:
            found["rates"] = [
                summarise_rates(name, {rate: ground_speeds(row, advance) for rate, row in rows.items()})
                for name, rows in made.at_rates.items()
            ]
    return found


def flow_rows(
    rows: Sequence[MadeRow], scenes: Sequence[UnseenScene], form: Any, advance: Callable[[], object]
) -> list[dict[str, Any]]:
    """Measured flow against the truth in rows that show these scenes; `form` are frames, size and rate."""
    readings: dict[str, list[FlowReading]] = {row.name: [] for row in rows}
    clips = [read_clips(*planned_of(row)) for row in rows]
    for scene in scenes:
        truth = scene.draw(*form, truth=True)
        for row, its in zip(rows, clips, strict=True):
            readings[row.name].append(read_flow(next(its)[2], truth.flow, truth.occluded))
        advance()
    return [summarise_flow(name, found) for name, found in readings.items()]


def ground_speeds(row: MadeRow, advance: Callable[[], object]) -> list[float | None]:
    """The ground speed of each clip of a row, None where it cannot be judged."""
    found = []
    for _, _, frames in read_clips(*planned_of(row)):
        found.append(read_measures(measure_motion(frames))["speed"].value)
        advance()
    return found


@contextmanager
def progress_bar(console: Console, what: str, total: int) -> Iterator[Callable[..., object]]:
    """A function that moves a bar on, by one or by the number it is called with."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda number=1: progress.advance(task, number)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate what the command line names, print the table and write the report."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(words)
    if options.no_spoilt and not options.reference:
        raise UserError("--no-spoilt: expected --reference, whose clips are spoilt, found none")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"{options.out}: expected a folder for the report, found a file; choose another --out")
    keep_freed_memory()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=NARROWEST)
    report, besides = evaluate(options, console, shlex.join(["python", "scripts/evaluate.py", *words]))
    with console.status("means, distances and their intervals"):
        summary = {**report.summary(), **besides}
    console.print(table(summary), markup=False)
    distances = distance_table(summary)
    if distances is not None:
        console.print(distances, markup=False)
    tables = [show(summary[name]) for name, show in BESIDES.items() if name in summary]
    for its in tables:
        console.print(its, markup=False)
    for line in summary["told"]:
        console.print(line, markup=False, soft_wrap=True)
    for note in notes(summary):
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    options.out.mkdir(parents=True, exist_ok=True)
    title = "Do the clips move as a drive moves?"
    write_atomically(options.out / "report.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_atomically(options.out / "report.html", html_page(summary, report.rows, title, tables))
    console.print(f"{options.out / 'report.json'}, report.html", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
