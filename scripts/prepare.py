"""Turn footage into prepared clips: scenes, autoencoder moments and caption embeddings, stored for training.

    python scripts/prepare.py VIDEO_OR_FOLDER... --out DIR --config CFG --prompt "a drive" [--preview] [key=value ...]

Run the same command again to go on after an interruption or to add videos: what is done is skipped.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from ldm.data.captions import THREE_WAYS, find_captions
from ldm.data.footage import FootageError, VideoInfo, find_scenes, name_videos, probe, read_frames
from ldm.data.preparation import PartWriter, Preparation, Settings, VideoReport, hash_file
from ldm.data.shards import PreparedSet
from ldm.errors import UserError, run_command
from ldm.modules.posterior import posterior_mean
from ldm.video import contact_sheet, from_uint8, parse_size, to_uint8

DEFAULT_FPS, DEFAULT_SIZE = 10.0, 512
SIZE_STEP = 64
CHUNK_PIXELS = 2 * 512 * 512  # encoded at a time
MAX_SCENE_FRAMES = 600  # longer scenes are stored in pieces, so that memory stays bounded
PREVIEW_SCENES, PREVIEW_FRAMES = 4, 5


@dataclass
class Job:
    """A readable video with captions, and what is known of it so far."""

    path: Path
    name: str
    captions: list[str]
    sha256: str
    info: VideoInfo


class Encoders:
    """The two frozen encoders of the config, on the best device there is."""

    def __init__(self, config: DictConfig) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        first_stage, text_encoder = checkpoint.load_encoders(config)
        self.first_stage, self.text_encoder = first_stage.to(self.device).eval(), text_encoder.to(self.device).eval()

    @torch.inference_mode()
    def moments(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Frames uint8 `h w 3` -> moments float16 `t 2c h w`."""
        moments = self.first_stage.encode(from_uint8(frames).to(self.device))
        return moments.half().cpu().numpy()

    @torch.inference_mode()
    def context(self, caption: str) -> np.ndarray:
        """A caption -> its embedding, float16 `n d`."""
        return self.text_encoder.encode([caption])[0].half().cpu().numpy()

    @torch.inference_mode()
    def pictures(self, moments: np.ndarray) -> np.ndarray:
        """Moments `t 2c h w` -> what the autoencoder makes of them, frames uint8 `t h w 3`."""
        means = posterior_mean(torch.from_numpy(moments.copy()).to(self.device).float())
        return np.concatenate([to_uint8(self.first_stage.decode(mean[None])) for mean in means])


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `key=value` among the videos are overrides of the config."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("videos", nargs="+", metavar="VIDEO_OR_FOLDER", help="footage; key=value overrides the config")
    parser.add_argument("--out", required=True, type=Path, help="folder for the prepared clips")
    parser.add_argument("--config", required=True, help="the video config; its encoders are used")
    parser.add_argument("--fps", type=float, help=f"frames a second (default: prepare.fps, else {DEFAULT_FPS:g})")
    parser.add_argument("--size", help=f"side, or HEIGHTxWIDTH, in pixels (default: prepare.size, else {DEFAULT_SIZE})")
    captions = parser.add_mutually_exclusive_group()
    captions.add_argument("--prompt", help="one caption for all videos")
    captions.add_argument("--captions", metavar="FILE", help="CSV with the columns file,caption")
    parser.add_argument(
        "--preview", action="store_true", help="decode a few stored scenes into preview.png: look before you train"
    )
    parsed = parser.parse_intermixed_args(arguments)
    parsed.overrides = [word for word in parsed.videos if "=" in word and not Path(word).exists()]
    parsed.videos = [word for word in parsed.videos if word not in parsed.overrides]
    if not parsed.videos:
        parser.error("give at least one video or folder")
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


def plan(
    names: dict[Path, str], captions: dict[Path, list[str]], preparation: Preparation, progress: Progress
) -> tuple[list[Job], dict[str, str], list[VideoReport]]:
    """Look at every file: what is to be done, what cannot be used and why (by name), what was done before."""
    jobs: list[Job] = []
    unusable: dict[str, str] = {}
    done: list[VideoReport] = []
    seen: dict[str, str] = {}
    for path, name in progress.track(names.items(), description="looking at the files"):
        try:
            info = probe(path)
        except FootageError as error:
            unusable[name] = str(error).removeprefix(f"{path}: ")
            continue
        if path not in captions:
            unusable[name] = f"no caption: {THREE_WAYS}"
            continue
        sha256 = hash_file(path)
        if sha256 in seen:
            unusable[name] = f"the same bytes as {seen[sha256]}"
            continue
        seen[sha256] = name
        report = preparation.done(sha256, name, captions[path])
        if report is None:
            jobs.append(Job(path, name, captions[path], sha256, info))
        else:
            done.append(report)
    return jobs, unusable, done


def prepare_video(job: Job, preparation: Preparation, encoders: Encoders, progress: Progress) -> VideoReport:
    """Store all scenes of one video. Raises FootageError when it turns out to be unusable; nothing of it stays then."""
    height, width = preparation.settings.size
    fps = preparation.settings.fps
    frames = read_frames(job.path, fps, (height, width))
    scenes = find_scenes(job.path, fps).scenes
    contexts = [encoders.context(caption) for caption in job.captions]
    per_chunk = max(1, CHUNK_PIXELS // (height * width))
    with preparation.video(job.name, job.sha256, job.captions) as part:
        for piece in (piece for scene in scenes for piece in split(scene)):
            moments = []
            for first in range(0, len(piece), per_chunk):
                chunk = list(islice(frames, min(per_chunk, len(piece) - first)))
                assert chunk, "the second reading of a video has the frames that the first one counted"
                moments.append(encoders.moments(chunk))
                progress.advance(progress.task_ids[-1], len(chunk))
            store(part, piece, np.concatenate(moments), contexts)
        deque(frames, maxlen=0)  # lets ffmpeg come to its end and complain
    return part.report


def split(scene: range) -> Iterator[range]:
    """A scene in as few equal pieces as `MAX_SCENE_FRAMES` allows."""
    num_pieces = -(-len(scene) // MAX_SCENE_FRAMES)
    edges = [scene.start + len(scene) * piece // num_pieces for piece in range(num_pieces + 1)]
    return (range(start, stop) for start, stop in pairwise(edges))


def store(part: PartWriter, frames: range, moments: np.ndarray, contexts: list[np.ndarray]) -> None:
    """Keep a scene, or say why not."""
    if len(moments) < 2:
        part.drop(frames, "a single frame between two cuts")
    elif not np.isfinite(moments).all():
        part.drop(frames, "the autoencoder gave values that are no numbers")
    else:
        part.add(frames, moments, contexts)


def prepare_all(jobs: list[Job], preparation: Preparation, encoders: Encoders, progress: Progress) -> dict[str, str]:
    """Prepare the videos one by one; returns those that turned out to be unusable, with the reason."""
    unusable = {}
    expected = [int(job.info.duration * preparation.settings.fps) for job in jobs]
    task = progress.add_task("encoding", total=sum(expected))
    before = 0
    for number, job in enumerate(jobs):
        progress.update(task, description=f"encoding {job.name} ({number + 1} of {len(jobs)})")
        try:
            before += prepare_video(job, preparation, encoders, progress).num_frames
        except FootageError as error:
            unusable[job.name] = str(error).removeprefix(f"{job.path}: ")
        progress.update(task, completed=before, total=before + sum(expected[number + 1 :]))
    return unusable


def warn_of_cut_captions(jobs: list[Job], encoders: Encoders, console: Console) -> None:
    """Say which captions are longer than the text encoder holds, and what of them is lost."""
    for caption in dict.fromkeys(caption for job in jobs for caption in job.captions):
        if lost := encoders.text_encoder.truncated(caption):
            console.print(
                f"warning: the caption '{caption[:40]}...' ({len(caption.split())} words) is longer than the text "
                f"encoder holds; this was cut: '{lost}'",
                markup=False,
            )


def print_table(reports: list[VideoReport], unusable: dict[str, str], console: Console) -> None:
    """What was kept, what was dropped and why."""
    table = Table(title="prepared footage")
    for column in ("video", "scenes", "frames", "dropped"):
        table.add_column(column, justify="left" if column == "video" else "right", overflow="fold")
    table.add_column("why", overflow="fold")
    for report in reports:
        dropped = sum(stretch.stop - stretch.start for stretch in report.dropped)
        why = "; ".join(f"frames {d.start}-{d.stop - 1}: {d.reason}" for d in report.dropped)
        table.add_row(report.source, str(report.num_scenes), str(report.num_frames), str(dropped), why)
    for name, reason in unusable.items():
        table.add_row(name, "0", "0", "all", reason)
    console.print(table, markup=False)


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
    console = Console()
    config = load_config([given.config], given.overrides)
    check(config)
    names = name_videos(given.videos)
    captions, strangers = find_captions(names, given.prompt, given.captions)
    if strangers:
        listed = ", ".join(strangers)
        console.print(f"warning: {given.captions} names files that were not given: {listed}", markup=False)
    with console.status("reading the encoders' weights"):
        settings = read_settings(given, config)
    preparation = Preparation(given.out, settings)
    encoders: Any = None
    with make_progress(console) as progress:
        jobs, unusable, done = plan(names, captions, preparation, progress)
        if jobs:
            encoders = Encoders(config)
            warn_of_cut_captions(jobs, encoders, console)
            if not preparation.has_empty_context:
                preparation.store_empty_context(encoders.context(""))
            unusable |= prepare_all(jobs, preparation, encoders, progress)
    prepared = preparation.finish()
    fresh = [preparation.reports[job.sha256] for job in jobs if job.sha256 in preparation.reports]
    print_table([*done, *fresh], unusable, console)
    kept = sum(report.num_scenes for report in [*done, *fresh])
    if prepared is None or not kept:
        raise UserError("nothing was kept; the table above says why, video by video")
    console.print(summary(prepared, done, fresh, unusable), markup=False, highlight=False, soft_wrap=True)
    if given.preview:
        path = write_preview(prepared, encoders or Encoders(config))
        console.print(f"Look at {path} before you train.", markup=False, soft_wrap=True)


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


def summary(
    prepared: PreparedSet, done: list[VideoReport], fresh: list[VideoReport], unusable: dict[str, str]
) -> str:
    """The last line: what the folder holds now."""
    info = prepared.info
    others = info.num_videos - sum(report.num_scenes > 0 for report in [*done, *fresh])
    earlier = f" ({others} from runs with other footage)" if others else ""
    return (
        f"Videos: {len(fresh)} prepared, {len(done)} done before, {len(unusable)} dropped. {prepared.root} holds "
        f"scenes: {info.num_scenes}, videos: {info.num_videos}{earlier}, frames: {info.num_frames}, "
        f"{info.num_frames / info.fps:.0f} s at {info.fps:g} frames a second, {info.size[0]}x{info.size[1]} pixels."
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
