"""Which clips are evaluated: video files on disk, alike in size, rate and length, a row of results for each folder.

What is given is cut from its first frame on, without a look at what it shows: a break in a generated video is the
model's. Reference footage is cut inside its scenes, and read at the rate, size and length of what it is held against,
cropped in the middle as `prepare.py` does: motion from frame to frame depends on all of these.
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

MOST_REFERENCE_CLIPS = 64  # unless there are more of the row it is held against


@dataclass(frozen=True)
class ClipFormat:
    """What all clips of an evaluation have in common; height and width as read, not above the working size."""

    num_frames: int
    height: int
    width: int
    rate: Fraction  # frames a second


@dataclass(frozen=True)
class VideoCuts:
    """One video and the frames, at the rate of the format, where its clips start, in order; and its prompt if known."""

    path: Path
    starts: tuple[int, ...]
    prompt: str | None = None


@dataclass(frozen=True)
class PlannedRow:
    """The clips of one row, before they are read."""

    name: str
    cuts: tuple[VideoCuts, ...]

    @property
    def num_clips(self) -> int:
        """Of all its videos."""
        return sum(len(video.starts) for video in self.cuts)


def plan_rows(given: Sequence[Path | str], num_frames: int | None) -> tuple[list[PlannedRow], ClipFormat]:
    """A row for each folder, and one for all files named one by one; every video is decoded once, to count its frames.

    `num_frames` cuts videos into clips of that length and drops what is left over; None takes each video whole.
    Raises UserError for a path that is no video, a row of a single clip, and clips that are not alike.
    """
    if num_frames is not None and num_frames < 2:
        raise UserError(f"--frames: expected at least 2, found {num_frames}; nothing moves in a single picture")
    named: dict[str, list[Path]] = {}
    for place in map(Path, given):
        named.setdefault(str(place) if place.is_dir() else "files", []).append(place)
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
                f"{path}: expected {length} frames as in {infos[0].path}, found {found}; compare clips of one length, "
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
    """A row of true clips of the given format: of all that its scenes hold, at most `num_clips`, evenly spread.

    Raises UserError when the footage is slower or much smaller than the format, or holds fewer than two such clips.
    """
    videos = list_videos(given)
    for path in videos:
        if probe(path).rate < like.rate:
            raise UserError(
                f"{path}: expected at least {float(like.rate):.4g} frames a second, the rate of what is evaluated, "
                f"found {probe(path).fps:.4g}; give faster footage"
            )
        read_frames(path, like.rate, (like.height, like.width))  # speaks up now if the picture is too small
    found = [
        (path, start)
        for path in videos
        for scene in find_scenes(path, like.rate).scenes
        for start in range(scene.start, scene.stop - like.num_frames + 1, like.num_frames)
    ]
    chosen = [found[place] for place in np.linspace(0, len(found) - 1, min(num_clips, len(found))).astype(int)]
    cuts = ((path, tuple(start for its, start in chosen if its == path)) for path in videos)
    row = PlannedRow(name, tuple(VideoCuts(path, starts, read_prompt(path)) for path, starts in cuts if starts))
    _check_several(row, f"{', '.join(map(str, given))}: ")
    return row


def read_prompt(video: Path) -> str | None:
    """What a video was made from: the prompt inside the file, as this project writes it, or the first line beside it.

    The latter is a text file of the same name. None where there is neither.
    """
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
    """The clips of a row, one after the other: their video, first frame, and frames uint8 RGB `t h w 3`."""
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
    """Leave out GIFs that lie beside a video of the same name, as `txt2vid.py` writes them: the same clip, coarser."""
    others = {path.with_suffix("") for path in paths if path.suffix.lower() != ".gif"}
    return [path for path in paths if path.suffix.lower() != ".gif" or path.with_suffix("") not in others]


def _check_alike(infos: Sequence[VideoInfo]) -> None:
    first = infos[0]
    for info in infos[1:]:
        if (info.height, info.width) != (first.height, first.width):
            raise UserError(
                f"{info.path}: expected {first.width}x{first.height} pixels as in {first.path}, found "
                f"{info.width}x{info.height}; compare clips of one size"
            )
        if abs(info.rate / first.rate - 1) > 0.001:
            raise UserError(
                f"{info.path}: expected {first.fps:.4g} frames a second as in {first.path}, found {info.fps:.4g}; "
                "compare clips of one rate"
            )


def _check_several(row: PlannedRow, place: str = "") -> None:
    if row.num_clips < 2:
        found = f"{row.num_clips} clip" + "s" * (row.num_clips != 1)
        raise UserError(
            f"{place}{row.name}: expected at least 2 clips, found {found}; a mean and its interval need more, "
            "30 or so: give more videos, or cut longer ones with --frames"
        )


def _reading_size(info: VideoInfo) -> tuple[int, int]:
    """Height and width of a video as it is read: its own, or the working size when that is smaller."""
    if max(info.height, info.width) > WORKING_SIDE:
        return working_size(info.height, info.width)
    return info.height, info.width


def _count_frames(info: VideoInfo) -> int:
    """Frames as `read_frames` yields them; damage anywhere in the file is found here, before anything slow."""
    count = sum(1 for _ in read_frames(info.path, info.rate, _reading_size(info)))
    if count < 2:
        raise UserError(f"{info.path}: expected a video, found a single frame; nothing moves in a picture")
    return count
