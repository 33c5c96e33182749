"""Turn footage into prepared clips: scenes, autoencoder moments and caption embeddings, stored for training.

    python scripts/prepare.py VIDEO_OR_FOLDER... --out DIR --config CFG --prompt "a drive" [--preview] [key=value ...]
    python scripts/prepare.py --world 500 --out DIR --config CFG [--frames 17] [--looks "desert,snow"] [key=value ...]

Run the same command again to go on after an interruption or to add videos: what is done is skipped. With --world the
clips are drawn, with captions that say what is to be seen; --frames 1 makes single images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
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

from ldm import checkpoint
from ldm.atomic import replacing
from ldm.checkpoint_names import FIRST_STAGE_PREFIX, TEXT_PREFIX
from ldm.command_line import Parser
from ldm.config import check, load_config
from ldm.config_targets import FLAG, trusting
from ldm.data.captions import find_captions
from ldm.data.drawn_sources import draw_ahead, plan_world, read_looks, usable_cores
from ldm.data.encoding import Encoders
from ldm.data.footage import FootageError, name_videos
from ldm.data.preparation import Preparation, Settings, VideoReport
from ldm.data.shards import PreparedSet
from ldm.data.sources import Plan, Source, VideoSource, plan_videos, prepare_source
from ldm.errors import UserError, run_command
from ldm.video import contact_sheet, parse_size

DEFAULT_FPS, DEFAULT_SIZE, DEFAULT_FRAMES = 10.0, 512, 17  # 17: five frames, every fourth
SIZE_STEP = 64
PREVIEW_SCENES, PREVIEW_FRAMES = 4, 5


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `key=value` among the videos are overrides of the config."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("videos", nargs="*", metavar="VIDEO_OR_FOLDER", help="footage; key=value overrides the config")
    parser.add_argument("--out", required=True, type=Path, help="folder for the prepared clips")
    parser.add_argument("--config", required=True, help="the video config; its encoders are used")
    parser.add_argument(FLAG, action="store_true", help="build whatever class the config names")
    parser.add_argument("--fps", type=float, help=f"frames a second (default: prepare.fps, else {DEFAULT_FPS:g})")
    parser.add_argument("--size", help=f"side, or HEIGHTxWIDTH, in pixels (default: prepare.size, else {DEFAULT_SIZE})")
    captions = parser.add_mutually_exclusive_group()
    captions.add_argument("--prompt", help="one caption for all videos")
    captions.add_argument("--captions", metavar="FILE", help="CSV with the columns file,caption")
    parser.add_argument(
        "--preview", action="store_true", help="decode a few stored scenes into preview.png: look before you train"
    )
    world = parser.add_argument_group("the drawn world, in place of footage")
    world.add_argument("--world", type=int, metavar="N", help="draw N clips; a larger N adds to them")
    world.add_argument("--looks", metavar="A,B,...", help="looks that take turns (default: all)")
    world.add_argument("--frames", type=int, help=f"frames of each clip, 1: single images (default: {DEFAULT_FRAMES})")
    world.add_argument("--seed", type=int, help="another seed draws other clips (default: 0)")
    world.add_argument("--processes", type=int, metavar="N", help="that draw (default: one for each core)")
    parsed = parser.parse_intermixed_args(arguments)
    parsed.overrides = [word for word in parsed.videos if "=" in word and not Path(word).exists()]
    parsed.videos = [word for word in parsed.videos if word not in parsed.overrides]
    if parsed.world is None:
        if not parsed.videos:
            parser.error("give at least one video or folder, or --world N")
        if given := [word for word in ("looks", "frames", "seed", "processes") if vars(parsed)[word] is not None]:
            parser.error(f"--{given[0]} is for the drawn world and goes with --world N")
    elif parsed.videos or parsed.prompt is not None or parsed.captions is not None:
        parser.error("--world draws its own clips and captions; leave out videos, --prompt and --captions")
    if parsed.processes is not None and parsed.processes < 1:
        parser.error(f"--processes: expected at least 1, found {parsed.processes}")
    return parsed


def read_size(arguments: argparse.Namespace, defaults: dict[str, Any]) -> list[int]:
    """[height, width] from --size, or the config's prepare.size; raises UserError unless multiples of 64."""
    where, given = "--size", arguments.size
    if given is None:
        where, given = "prepare.size", defaults.get("size", DEFAULT_SIZE)
    size = list(parse_size(given, where))
    nearest = [max(SIZE_STEP, round(side / SIZE_STEP) * SIZE_STEP) for side in size]
    if nearest != size:
        raise UserError(
            f"{where}: expected multiples of {SIZE_STEP}, found {given}; the nearest is {nearest[0]}x{nearest[1]} "
            "(height x width)"
        )
    return size


def read_settings(arguments: argparse.Namespace, config: DictConfig) -> Settings:
    """Everything that all scenes of the data set will have in common."""
    defaults = dict(config.get("prepare") or {})
    if unknown := set(defaults) - {"fps", "size"}:
        raise UserError(f"prepare.{min(unknown)}: expected the keys fps and size in this section")
    fps = arguments.fps if arguments.fps is not None else float(defaults.get("fps", DEFAULT_FPS))
    if not 0 < fps < float("inf"):
        raise UserError(f"--fps: expected frames a second above 0, found {fps:g}")
    size = read_size(arguments, defaults)
    tensors = checkpoint.encoder_tensors(config)
    parts = [
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in (FIRST_STAGE_PREFIX, TEXT_PREFIX)
    ]
    return Settings(
        first_stage=checkpoint.identity(parts[0]),
        text_encoder=checkpoint.identity(parts[1]),
        scale_factor=checkpoint.latent_scale(config),
        fps=fps,
        size=size,
        num_tokens=int((config.model.params.cond_stage_config.get("params") or {}).get("max_length", 77)),
    )


def prepare_all(
    plan: Plan, ready: Iterable[Source], preparation: Preparation, encoders: Encoders, progress: Progress
) -> None:
    """Prepare the sources one by one, as they are ready; those that turn out to be unusable are noted in the plan."""
    expected = [source.num_frames for source in plan.sources]
    task = progress.add_task("encoding", total=sum(expected))
    before, to_come = 0, sum(expected)
    for number, source in enumerate(ready):
        progress.update(task, description=f"encoding {source.name} ({number + 1} of {len(expected)})")
        try:
            report = prepare_source(source, preparation, encoders, lambda count: progress.advance(task, count))
            before += report.num_frames
        except FootageError as error:
            plan.unusable[source.name] = str(error).removeprefix(f"{source.path}: ")
        to_come -= expected[number]
        progress.update(task, completed=before, total=before + to_come)


def warn_of_cut_captions(sources: Sequence[VideoSource], encoders: Encoders, console: Console) -> None:
    """Say which captions are longer than the text encoder holds, and what of them is lost."""
    for caption in dict.fromkeys(caption for source in sources for caption in source.captions):
        if lost := encoders.text_encoder.truncated(caption):
            console.print(
                f"warning: the caption '{caption[:40]}...' ({len(caption.split())} words) is longer than the text "
                f"encoder holds; this was cut: '{lost}'",
                markup=False,
            )


def print_table(plan: Plan, fresh: list[VideoReport], console: Console) -> None:
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


def print_looks(plan: Plan, fresh: list[VideoReport], console: Console) -> None:
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare footage; raises UserError when nothing was kept or something makes the whole run pointless."""
    given = parse_arguments(arguments)
    with trusting(given.trust_config):
        carry_out(given, Console())


def carry_out(given: argparse.Namespace, console: Console) -> None:
    """Prepare what a parsed command line names."""
    config = load_config([given.config], given.overrides)
    check(config)
    is_drawn = given.world is not None
    looks = read_looks(given.looks)
    names, captions = ({}, {}) if is_drawn else find_videos(given, console)
    with console.status("reading the encoders' weights"):
        settings = read_settings(given, config)
    preparation = Preparation(given.out, settings)
    encoders: Encoders | None = None
    with make_progress(console) as progress:
        if is_drawn:
            frames = DEFAULT_FRAMES if given.frames is None else given.frames
            plan = plan_world(given.world, looks, frames, given.seed or 0, preparation)
        else:
            tracked = progress.track(names.items(), description="looking at the files")
            plan = plan_videos(tracked, captions, preparation)
        if plan.sources:
            encoders = Encoders(config)
            if not preparation.has_empty_context:
                preparation.store_empty_context(encoders.context(""))
            ready: Iterable[Source] = plan.sources
            if is_drawn:
                ready = draw_ahead(plan.sources, settings, given.processes or usable_cores())
            else:
                warn_of_cut_captions(plan.sources, encoders, console)
            prepare_all(plan, ready, preparation, encoders, progress)
    prepared = preparation.finish()
    fresh = [preparation.reports[source.sha256] for source in plan.sources if source.sha256 in preparation.reports]
    (print_looks if is_drawn else print_table)(plan, fresh, console)
    kept = sum(report.num_scenes for report in [*plan.done, *fresh])
    if prepared is None or not kept:
        raise UserError("nothing was kept; the table above says why, video by video")
    console.print(summary(prepared, plan, fresh, is_drawn), markup=False, highlight=False, soft_wrap=True)
    if given.preview:
        path = write_preview(prepared, encoders or Encoders(config))
        console.print(f"Look at {path} before you train.", markup=False, soft_wrap=True)


def find_videos(given: argparse.Namespace, console: Console) -> tuple[dict[Path, str], dict[Path, list[str]]]:
    """Names in the data set and captions of all videos that were given."""
    names = name_videos(given.videos)
    captions, strangers = find_captions(names, given.prompt, given.captions)
    if strangers:
        listed = ", ".join(strangers)
        console.print(f"warning: {given.captions} names files that were not given: {listed}", markup=False)
    return names, captions


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


def summary(prepared: PreparedSet, plan: Plan, fresh: list[VideoReport], is_drawn: bool) -> str:
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


if __name__ == "__main__":
    sys.exit(run_command(main))
