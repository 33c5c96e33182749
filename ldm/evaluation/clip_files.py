"""The clips of an evaluation: video files of one size, rate and length, a row of results per folder.

Given videos are cut from their first frame on, across scene changes: a break in a generated video is the model's.
Reference footage is cut inside its scenes and read at the rate, size and length of the evaluated clips, centre-cropped
as by `prepare.py`: motion per frame depends on all of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.preparing.footage import VideoInfo, find_scenes, list_videos, probe, read_frames
from ldm.data.preparing.sources import read_sidecar
from ldm.errors import UserError
from ldm.evaluation.flow import WORKING_SIDE, working_size
from ldm.video import read_metadata

MOST_REFERENCE_CLIPS = 64  # unless an evaluated row has more


@dataclass(frozen=True)
class ClipFormat:
    """The common format of all clips of an evaluation; height and width as read, at most the working size."""

    num_frames: int
    height: int
    width: int
    rate: Fraction  # frames per second


@dataclass(frozen=True)
class VideoCuts:
    """A video, the frames (at the rate of the format) where its clips start, in order, and its prompt if known."""

    path: Path
    starts: tuple[int, ...]
    prompt: str | None = None


@dataclass(frozen=True)
class PlannedRow:
    """The clips of one row, not yet read."""

    name: str
    cuts: tuple[VideoCuts, ...]

    @property
    def num_clips(self) -> int:
        return sum(len(video.starts) for video in self.cuts)


def plan_rows(given: Sequence[Path | str], num_frames: int | None) -> tuple[list[PlannedRow], ClipFormat]:
    """One row per folder, and one for all files named individually; each video is decoded once, to count its frames.

    num_frames: videos are cut into clips of that length, the remainder is dropped; None: each video is one clip.
    Raises UserError for a path that is no video, a row of a single clip, and clips of different formats.
    """
    if num_frames is not None and num_frames < 2:
        raise UserError(f"--frames: expected at least 2, found {num_frames}; a single frame has no motion")
    named: dict[str, list[Path]] = {}
    for path in map(Path, given):
        named.setdefault(str(path) if path.is_dir() else "files", []).append(path)
    videos = {name: _without_copies(list_videos(paths)) for name, paths in named.items()}
    if list(videos) == ["files"] and len(videos["files"]) == 1:
        videos = {str(videos["files"][0]): videos["files"]}
    infos = [probe(path) for paths in videos.values() for path in paths]
    _check_alike(infos)
    lengths = {info.path: _count_frames(info) for info in infos}
    length = num_frames or lengths[infos[0].path]
    for path, found in lengths.items():
        if num_frames is None and found != length:
            raise UserError(
                f"{path}: expected {length} frames as in {infos[0].path}, found {found}; evaluate clips of one length, "
                "or cut them with --frames"
            )
        if found < length:
            raise UserError(
                f"{path}: expected at least the {length} frames of --frames, found {found}; give a smaller number or "
                "leave this video out"
            )
    starts = {path: tuple(range(0, found - length + 1, length)) for path, found in lengths.items()}
    rows = [
        PlannedRow(name, tuple(VideoCuts(path, starts[path], read_prompt(path)) for path in paths))
        for name, paths in videos.items()
    ]
    for row in rows:
        _check_several(row)
    return rows, ClipFormat(length, *_reading_size(infos[0]), infos[0].rate)


def plan_reference(given: Sequence[Path | str], name: str, like: ClipFormat, num_clips: int) -> PlannedRow:
    """A row of at most `num_clips` true clips of the given format, evenly spread over the scenes of the footage.

    Raises UserError if the footage has a lower rate or a much smaller size than the format, or fewer than two clips.
    """
    videos = list_videos(given)
    for path in videos:
        if probe(path).rate < like.rate:
            raise UserError(
                f"{path}: expected at least {float(like.rate):.4g} frames per second, the rate of the evaluated clips, "
                f"found {probe(path).fps:.4g}; give footage of a higher rate"
            )
        read_frames(path, like.rate, (like.height, like.width))  # raises now if the picture is too small
    found = [
        (path, start)
        for path in videos
        for scene in find_scenes(path, like.rate).scenes
        for start in range(scene.start, scene.stop - like.num_frames + 1, like.num_frames)
    ]
    chosen = [found[number] for number in np.linspace(0, len(found) - 1, min(num_clips, len(found))).astype(int)]
    cuts = ((path, tuple(start for its, start in chosen if its == path)) for path in videos)
    row = PlannedRow(name, tuple(VideoCuts(path, starts, read_prompt(path)) for path, starts in cuts if starts))
    _check_several(row, f"{', '.join(map(str, given))}: ")
    return row


def read_prompt(video: Path) -> str | None:
    """The prompt of a video: in the file's metadata, or the first line of a text file of the same name; or None."""
    settings: Any = {}
    if video.suffix.lower() == ".mp4":
        with contextlib.suppress(UserError):
            settings = read_metadata(video)
    for part in (settings, settings.get("clip")):
        if isinstance(part, dict) and isinstance(part.get("prompt"), str):
            return part["prompt"]
    captions = read_sidecar(video)
    return captions[0] if captions else None


def read_clips(row: PlannedRow, form: ClipFormat) -> Iterator[tuple[VideoCuts, int, np.ndarray]]:
    """The clips of a row in order: video, first frame, and frames uint8 RGB `t h w 3`."""
    for video in row.cuts:
        starts, clip = iter(video.starts), []
        start = next(starts, None)
        for number, frame in enumerate(read_frames(video.path, form.rate, (form.height, form.width))):
            if start is None:
                break
            if number >= start:
                clip.append(frame)
            if len(clip) == form.num_frames:
                yield video, start, np.stack(clip)
                start, clip = next(starts, None), []


def _without_copies(paths: Sequence[Path]) -> list[Path]:
    """Leave out GIFs beside a video of the same name: `txt2vid.py` writes the same clip twice."""
    others = {path.with_suffix("") for path in paths if path.suffix.lower() != ".gif"}
    return [path for path in paths if path.suffix.lower() != ".gif" or path.with_suffix("") not in others]


def _check_alike(infos: Sequence[VideoInfo]) -> None:
    first = infos[0]
    for info in infos[1:]:
        if (info.height, info.width) != (first.height, first.width):
            raise UserError(
                f"{info.path}: expected {first.width}x{first.height} pixels as in {first.path}, found "
                f"{info.width}x{info.height}; evaluate clips of one size"
            )
        if abs(info.rate / first.rate - 1) > 0.001:
            raise UserError(
                f"{info.path}: expected {first.fps:.4g} frames per second as in {first.path}, found {info.fps:.4g}; "
                "evaluate clips of one rate"
            )


def _check_several(row: PlannedRow, where: str = "") -> None:
    if row.num_clips < 2:
        found = f"{row.num_clips} clip" + "s" * (row.num_clips != 1)
        raise UserError(
            f"{where}{row.name}: expected at least 2 clips, found {found}; a mean and its interval need about 30: "
            "give more videos, or cut long videos with --frames"
        )


def _reading_size(info: VideoInfo) -> tuple[int, int]:
    """Height and width at which a video is read: its own, or the working size if that is smaller."""
    if max(info.height, info.width) > WORKING_SIDE:
        return working_size(info.height, info.width)
    return info.height, info.width


def _count_frames(info: VideoInfo) -> int:
    """Number of frames that `read_frames` yields; finds corruption anywhere in the file before slow work starts."""
    count = sum(1 for _ in read_frames(info.path, info.rate, _reading_size(info)))
    if count < 2:
        raise UserError(f"{info.path}: expected a video, found a single frame, which has no motion")
    return count
