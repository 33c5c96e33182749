"""Measure whether clips move as a drive moves, beside true clips and clips spoilt on purpose.

    python scripts/evaluate.py VIDEO_OR_FOLDER... --reference FOOTAGE [--frames N] [--out DIR]

Every folder makes a row, files given one by one make one together. A video is a clip; --frames cuts it into several.
--reference adds the row of true clips and, made from them, reversed, frozen, shuffled ones and zoomed stills, and the
Frechet distance of every row from the true one. Clips whose prompt is known - it is in what txt2vid.py writes, or in
a text file beside the video - are held against it. Prints a table and writes report.json and report.html.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ldm.atomic import write_atomically
from ldm.command_line import Parser
from ldm.errors import UserError, run_command
from ldm.evaluation.clip_files import (
    MOST_REFERENCE_CLIPS,
    ClipFormat,
    PlannedRow,
    plan_reference,
    plan_rows,
    read_clips,
)
from ldm.evaluation.instruments import Instruments, Needs, choose_instruments
from ldm.evaluation.page import html_page
from ldm.evaluation.references import REFERENCES, zoomed_still
from ldm.evaluation.report import TRUE, JudgedClip, Report, Row, ShownClip, distance_table, notes, table

NUM_SHOWN = 4
NARROWEST = 150  # characters of the table where there is no terminal


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        usage="%(prog)s VIDEO_OR_FOLDER... [options]",
    )  # fmt: skip
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO_OR_FOLDER", help="clips to evaluate")
    parser.add_argument(
        "--reference", nargs="+", type=Path, metavar="FOOTAGE", default=[],
        help="true footage, files or folders; read at the rate, size and length of what is evaluated",
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
    parser.add_argument("--frames", type=int, metavar="N", help="cut videos into clips of N frames (default: whole)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/evaluation"), help="folder for the report (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def judge_row(planned: PlannedRow, form: ClipFormat, instruments: Instruments, advance: Callable[[], object]) -> Row:
    """Measure the given clips of one row; `advance` is called after each."""
    row = Row(planned.name, is_reference=False)
    shown = places_shown(planned.num_clips)
    for number, (video, start, frames) in enumerate(read_clips(planned, form)):
        seen = instruments.look_at(frames, video.prompt)
        row.add(JudgedClip(str(video.path), start, seen.readings, video.prompt), seen.features)
        if number in shown:
            row.shown.append(ShownClip(frames, video.prompt))
        advance()
    return row


def judge_reference(
    planned: PlannedRow, form: ClipFormat, instruments: Instruments, advance: Callable[[], object]
) -> list[Row]:
    """Measure true clips and what is made of each of them; `advance` is called after every one."""
    rows = {name: Row(name, is_reference=True) for name in (TRUE, *REFERENCES)}
    shown = places_shown(planned.num_clips)
    for number, (video, start, frames) in enumerate(read_clips(planned, form)):
        true = instruments.look_at(frames, video.prompt)
        for name, row in rows.items():
            made, seen = frames, true
            if name != TRUE:
                make = REFERENCES[name]
                made = zoomed_still(frames, true.motion) if make is zoomed_still else make(frames)
                seen = instruments.look_at(made, video.prompt)
            row.add(JudgedClip(str(video.path), start, seen.readings, video.prompt), seen.features)
            if number in shown:
                row.shown.append(ShownClip(made, video.prompt))
            advance()
    return list(rows.values())


def places_shown(num_clips: int) -> set[int]:
    """Which clips of a row are shown: evenly spread over it."""
    return set(np.linspace(0, num_clips - 1, NUM_SHOWN).astype(int).tolist())


def evaluate(options: argparse.Namespace, console: Console) -> Report:
    """Measure everything that the command line names."""
    with console.status("looking at the videos"):
        planned, form = plan_rows(options.videos, options.frames)
        reference = None
        if options.reference:
            most = max(MOST_REFERENCE_CLIPS, *(row.num_clips for row in planned))
            reference = plan_reference(options.reference, TRUE, form, most)
        everything = [*planned, *([reference] if reference is not None else [])]
        has_prompts = any(video.prompt is not None for row in everything for video in row.cuts)
        needs = Needs(form.num_frames, reference is not None, has_prompts)
        instruments = choose_instruments(options.judge, options.clip_model, options.i3d, needs)
    total = sum(row.num_clips for row in planned)
    if reference is not None:
        total += (1 + len(REFERENCES)) * reference.num_clips
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("clips", total=total)

        def advance() -> None:
            progress.advance(task)

        rows = judge_reference(reference, form, instruments, advance) if reference is not None else []
        rows += [judge_row(row, form, instruments, advance) for row in planned]
    return Report(form, rows, instruments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate what the command line names, print the table and write the report."""
    options = parse_arguments(arguments)
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"{options.out}: expected a folder for the report, found a file; choose another --out")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=NARROWEST)
    report = evaluate(options, console)
    with console.status("means, distances and their intervals"):
        summary = report.summary()
    console.print(table(summary))
    distances = distance_table(summary)
    if distances is not None:
        console.print(distances)
    for line in summary["told"]:
        console.print(line, markup=False, soft_wrap=True)
    for note in notes(summary):
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    options.out.mkdir(parents=True, exist_ok=True)
    title = "Do the clips move as a drive moves?"
    write_atomically(options.out / "report.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_atomically(options.out / "report.html", html_page(summary, report.rows, title))
    console.print(f"{options.out / 'report.json'}, report.html", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
