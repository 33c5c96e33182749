"""Footage: size, rate and length of a video file, its scene cuts, and its frames at a fixed rate and size.

There are two time grids. Every video is resampled to a regular grid at its own average frame rate (the *native* grid,
which also corrects jittering timestamps); scene cuts are found there. Frames at the requested rate are taken from that
grid: frame m is native frame floor(m * native / fps). So cuts translate exactly and the spacing is even from the first
frame on. (ffmpeg's output option `-r` spaces the first frames wrongly; its `fps` filter with `round=up` does not.)
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import ffmpeg
import imageio_ffmpeg
import numpy as np
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector, ThresholdDetector

from ldm.errors import UserError, printable
from ldm.video import MAX_PIXELS, OPEN_OPTIONS, check_pixels

VIDEO_SUFFIXES = frozenset(
    ".3gp .avi .flv .gif .m2ts .m4v .mjpeg .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv .y4m".split()
)
MAX_ENLARGEMENT = 2  # crops that would be enlarged by more are refused
MAX_RATE = 1000  # frames a second
MAX_ASPECT = 32
# No codec needs fewer bytes per repeated frame: a file with more frames has gaps in its time stamps.
BYTES_PER_FRAME, FEWEST_LIMIT = 16, 10_000
CUT_WIDTH = 256  # width in pixels of the frames in which cuts are detected


class FootageError(UserError):
    """An unusable video; the message starts with its path."""


@dataclass(frozen=True)
class VideoInfo:
    """The first video stream of a file; width and height as displayed (rotated, with square pixels)."""

    path: Path
    width: int
    height: int
    rate: Fraction  # average frames a second
    num_frames: int  # from the header or the duration, 0 if unknown
    duration: float  # seconds, 0 if unknown
    square_pixels: bool

    @property
    def fps(self) -> float:
        """Average frames a second."""
        return float(self.rate)


def ffmpeg_binary() -> str:
    """The ffmpeg on the PATH, otherwise the one of the package imageio-ffmpeg."""
    return shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()


def list_videos(paths: Iterable[Path | str]) -> list[Path]:
    """The given files, and for each folder the videos anywhere inside it (by suffix), sorted.

    Raises FootageError for a missing path and for a folder without videos.
    """
    videos: dict[Path, None] = {}
    for given in map(Path, paths):
        if not given.exists():
            raise FootageError(f"{given}: there is no such file or folder; give a video or a folder of videos")
        if not given.is_dir():
            videos[given] = None
            continue
        inside = sorted(p for p in given.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
        if not inside:
            raise FootageError(
                f"{given}: expected a folder with videos ({', '.join(sorted(VIDEO_SUFFIXES))}), found none; "
                "files with other names can be given one by one"
            )
        videos.update(dict.fromkeys(inside))
    return list(videos)


def name_videos(given: Iterable[Path | str]) -> dict[Path, str]:
    """All videos and their names in the data set: the path below a given folder, or the file's name.

    A duplicate name is replaced by the whole path. Raises FootageError as `list_videos` does.
    """
    names: dict[Path, str] = {}
    for root in map(Path, given):
        for path in list_videos([root]):
            name = _writable(path.relative_to(root).as_posix() if root.is_dir() else path.name)
            names.setdefault(path, name if name not in names.values() else _writable(path.as_posix()))
    return names


def _writable(name: str) -> str:
    """A name that can be written as UTF-8 and printed: control characters and invalid bytes are escaped."""
    return printable(name).replace("\n", "\\n").replace("\t", "\\t")


def probe(path: Path | str) -> VideoInfo:
    """Read a video's size, rate and length from its headers and first frame.

    Raises FootageError if the file is missing, empty, not a video, without a video stream, or a single frame.
    """
    path = Path(path)
    if not path.is_file():
        raise FootageError(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise FootageError(f"{path}: the file is empty (0 bytes); copy or download it again")
    try:
        with av.open(f"file:{path}", options=OPEN_OPTIONS) as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                raise FootageError(f"{path}: expected a video stream, found only {kinds}")
            stream = streams[0]
            check_pixels(stream.codec_context.width, stream.codec_context.height, path)
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the stream may differ from the header
            return _describe(path, container, stream)
    except (av.error.FFmpegError, StopIteration, OverflowError, ZeroDivisionError) as error:
        raise FootageError(
            f"{path}: expected a video, found {path.stat().st_size} bytes that ffmpeg cannot read "
            f"({_reason(error)}); is the file truncated, or not a video?"
        ) from error


def _describe(path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> VideoInfo:
    frame = next(container.decode(stream))
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    if stream.duration:
        duration = float(stream.duration * stream.time_base)
    else:
        duration = (container.duration or 0) / av.time_base
    num_frames = stream.frames or round(duration * rate)
    if num_frames == 1:
        raise FootageError(f"{path}: expected a video, found a single frame")
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width, height = round(frame.width * aspect), frame.height
    check_pixels(width, height, path)
    if not 1 <= max(width, height) <= MAX_ASPECT * min(width, height):
        raise FootageError(f"{path}: expected an aspect ratio of at most {MAX_ASPECT}, found {width}x{height}")
    if not 0 < rate <= MAX_RATE:
        raise FootageError(
            f"{path}: expected at most {MAX_RATE} frames a second, found {float(rate):.4g}; encode it again"
        )
    if frame.rotation % 180:
        width, height = height, width
    return VideoInfo(path, width, height, Fraction(rate), num_frames, duration, aspect == 1)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or "no frame in it"


def read_frames(path: Path | str, fps: float, size: int | tuple[int, int]) -> Iterator[np.ndarray]:
    """Frames at `fps` per second, evenly spaced from the first on, centre-cropped and resized to `size` = (h, w).

    Yields uint8 RGB `h w 3`, upright. One number for `size` means square. Raises FootageError before the first frame if
    `fps` is not above 0, if it exceeds the footage's rate or if the frames are too small, and at the first corrupted
    frame.
    """
    info = probe(path)
    height, width = (size, size) if isinstance(size, int) else size
    if fps <= 0:
        raise FootageError(f"expected frames a second above 0, found fps = {fps:g}")
    if fps > info.rate:
        raise FootageError(
            f"{path}: {fps:g} frames a second were asked for, the footage has {info.fps:.4g}; ask for at most that"
        )
    if height > MAX_ENLARGEMENT * info.height or width > MAX_ENLARGEMENT * info.width:
        raise FootageError(
            f"{path}: {info.width}x{info.height} pixels are too few for {width}x{height}: expected at least "
            f"{-(-width // MAX_ENLARGEMENT)}x{-(-height // MAX_ENLARGEMENT)}; ask for a smaller size"
        )
    video = _native_grid(info).filter("fps", fps=_exact(fps), round="up")
    if not info.square_pixels:
        video = video.filter("scale", "iw*sar", "ih").filter("setsar", "1")
    video = video.filter("crop", f"min(iw,ih*{width}/{height})", f"min(ih,iw*{height}/{width})", exact=1)
    video = video.filter("scale", width, height, flags="lanczos+accurate_rnd+full_chroma_int+bitexact")
    return _decode(video, info, (height, width), "rgb24")


def _native_grid(info: VideoInfo) -> ffmpeg.nodes.FilterableStream:
    """The video with its first frame at time 0 and all frames on the nearest points of a regular grid."""
    opened = ffmpeg.input(f"file:{info.path}", max_pixels=MAX_PIXELS, **OPEN_OPTIONS)
    video = opened["V:0"]  # V excludes attached pictures
    return video.filter("setpts", "PTS-STARTPTS").filter("fps", fps=_exact(info.rate))


def _exact(rate: float | Fraction) -> str:
    fraction = Fraction(rate).limit_denominator(1_000_000)
    return f"{fraction.numerator}/{fraction.denominator}"


def _decode(
    video: ffmpeg.nodes.FilterableStream, info: VideoInfo, size: tuple[int, int], pixels: str
) -> Iterator[np.ndarray]:
    """Run ffmpeg and yield its frames `h w 3`; any error it reports becomes a FootageError."""
    output = ffmpeg.output(video, "pipe:", format="rawvideo", pix_fmt=pixels)
    command = output.global_args("-nostdin", "-hide_banner", "-loglevel", "error", "-xerror").compile(ffmpeg_binary())
    num_bytes = size[0] * size[1] * 3
    count, most = 0, FEWEST_LIMIT + info.path.stat().st_size // BYTES_PER_FRAME
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages)
        try:
            while len(frame := process.stdout.read(num_bytes)) == num_bytes:
                count += 1
                if count > most:
                    raise FootageError(
                        f"{info.path}: expected at most {most:,} frames in a file of its size, found more: gaps in its "
                        "time stamps are filled with repeated frames; encode it again"
                    )
                yield np.frombuffer(frame, np.uint8).reshape(*size, 3)
            status = process.wait()
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        if status != 0 or frame:
            messages.seek(0)
            reason = (messages.read().decode(errors="replace").strip().splitlines() or [f"exit status {status}"])[0]
            reason = re.sub(r"\[[^]]* @ 0x[0-9a-f]+\] ", "", reason)  # a memory address
            raise FootageError(
                f"{info.path}: the file is corrupted or truncated: ffmpeg stopped after frame {count} ({reason}); "
                "nothing of it is used, copy or download it again"
            )


@dataclass(frozen=True)
class SceneList:
    """Scenes of one video as consecutive ranges of frames at the requested rate; together they cover all frames."""

    info: VideoInfo
    scenes: list[range]


def find_scenes(path: Path | str, fps: float) -> SceneList:
    """Split a video at its cuts and fades; ranges count frames as `read_frames(path, fps, ...)` yields them.

    Decodes the whole file once at a small size: corruption is found here, before anything slow. Raises FootageError as
    `probe` and `read_frames` do, and if the file holds a single frame.
    """
    info = probe(path)
    height = max(2, round(info.height * CUT_WIDTH / info.width))
    video = _native_grid(info).filter("scale", CUT_WIDTH, height, flags="area+bitexact")
    cuts, num_native = find_cuts(_decode(video, info, (height, CUT_WIDTH), "bgr24"))
    if num_native < 2:
        raise FootageError(f"{path}: expected a video, found a single frame")
    # Frame m is native frame floor(m * rate / fps): the first m at or after native frame c is ceil(c * fps / rate).
    ratio = Fraction(fps).limit_denominator(1_000_000) / info.rate
    edges = [-(-(cut * ratio.numerator) // ratio.denominator) for cut in [0, *cuts, num_native]]
    return SceneList(info, [range(a, b) for a, b in itertools.pairwise(edges) if b > a])


def find_cuts(frames: Iterable[np.ndarray]) -> tuple[list[int], int]:
    """Cuts and fades in BGR uint8 frames `h w 3`: the first frame of each new scene, and the number of frames.

    PySceneDetect's detectors, tuned to find every hard cut between similar scenes without false alarms. Misses slow
    dissolves and the weaker of two cuts within two frames.
    """
    detectors = [AdaptiveDetector(adaptive_threshold=2, min_content_val=8, min_scene_len=2), ThresholdDetector(12)]
    cuts: set[int] = set()
    count = 0
    for frame in frames:
        timecode = FrameTimecode(count, fps=25.0)
        for detector in detectors:
            cuts.update(cut.frame_num for cut in detector.process_frame(timecode, frame))
        count += 1
    return sorted(cuts), count
