"""Pixels: scaling, writing and reading of video files, contact sheets.

`video` is a float tensor `t c h w` in [-1, 1]; `frames` are uint8 RGB arrays `t h w 3`. The same frames and metadata
give the same bytes.
"""

from __future__ import annotations

import json
from bisect import bisect
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from ldm.errors import UserError
from ldm.files import parse_json, replacing

# Formats that may be read: single files, no playlists or scripts, which open other files and addresses.
FORMATS = (
    "mov,matroska,webm,avi,flv,gif,mpegts,mpeg,mjpeg,ogg,asf,yuv4mpegpipe,mpegvideo,h264,hevc,m4v,3gp,wtv,"
    "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe,tiff_pipe"  # images, for a clear error message
)
OPEN_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
MAX_HELD = 2**33  # bytes of the frames of a video that is read whole
MAX_PIXELS = 2**26  # of an image or a frame; 8192x8192
CRF = "10"  # of libx264: visually lossless
BT709 = 1  # code of this colour matrix, transfer and primaries in the header


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """Pixels in [-1, 1], clipped, `t c h w` -> uint8 `t h w c`, rounded."""
    pixels = (video.detach().float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return rearrange(pixels, "t c h w -> t h w c").cpu().numpy()


def from_uint8(frames: np.ndarray | Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 `t h w c` -> float32 `t c h w` in [-1, 1], inverted exactly by `to_uint8`."""
    pixels = torch.from_numpy(np.array(frames))
    return rearrange(pixels, "t h w c -> t c h w").float() / 127.5 - 1


def parse_size(size: int | str | Sequence[int], where: str) -> tuple[int, int]:
    """One side for a square, "HEIGHTxWIDTH", or [height, width] -> height, width in pixels, both at least 1.

    Raises UserError that starts with `where` for anything else.
    """
    is_list = isinstance(size, Sequence) and not isinstance(size, str)
    sides = list(size) if is_list else str(size).lower().split("x")
    if len(sides) not in (1, 2) or not all(str(side).isdecimal() and int(side) > 0 for side in sides):
        raise UserError(f"{where}: expected a number of pixels or HEIGHTxWIDTH, found {size!r}")
    return int(sides[0]), int(sides[-1])


def write_mp4(path: Path | str, frames: np.ndarray, fps: float, metadata: Mapping[str, Any] | None = None) -> None:
    """Write uint8 RGB `t h w 3` with even sides as widely playable H.264 (yuv420p, BT.709), atomically.

    `metadata` is stored as JSON in the `comment` tag; see `read_metadata`.
    """
    _check_frames(frames, fps)
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"MP4 needs even sides, found {frames.shape[2]}x{frames.shape[1]} pixels")
    options = {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"}
    with replacing(path) as partial, av.open(str(partial), "w", format="mp4", options=options) as container:
        if metadata is not None:
            container.metadata["comment"] = json.dumps(metadata, sort_keys=True)
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": CRF, "preset": "medium", "flags": "+bitexact"}
        codec = stream.codec_context
        codec.thread_count = 1  # the bytes depend on the number of threads
        codec.colorspace = codec.color_trc = codec.color_primaries = BT709
        codec.color_range = ColorRange.MPEG
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def read_video(path: Path | str) -> tuple[np.ndarray, float]:
    """All frames of a short video file, uint8 RGB `t h w 3`, and its frames a second; raises UserError."""
    with _open(path) as container:
        if not container.streams.video:
            raise UserError(f"{path}: expected a video, found no video stream in it")
        stream = container.streams.video[0]
        check_pixels(stream.codec_context.width, stream.codec_context.height, path)
        frames, room = [], MAX_HELD
        try:
            for frame in container.decode(stream):
                room -= 3 * frame.width * frame.height
                if room < 0:
                    raise UserError(
                        f"{path}: expected a short video, found more than {MAX_HELD:,} bytes of frames; cut it"
                    )
                frames.append(_rgb(frame))
        except av.error.FFmpegError as error:
            raise UserError(f"{path}: expected a video, found a corrupt one ({error.strerror})") from error
        if not frames:
            raise UserError(f"{path}: expected a video, found no frame in it")
        return np.stack(frames), float(stream.average_rate or stream.guessed_rate)


def check_pixels(width: int, height: int, path: Path | str) -> None:
    """Raise UserError for an image or frame of more than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{path}: expected an image of at most {MAX_PIXELS:,} pixels, found {width}x{height}; make it smaller"
        )


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    if frame.colorspace == BT709:
        frame = frame.reformat(format="rgb24", src_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.JPEG)
    return frame.to_ndarray(format="rgb24")


def read_metadata(path: Path | str) -> dict[str, Any]:
    """The metadata that `write_mp4` stored in a file; raises UserError without any."""
    with _open(path) as container:
        comment = container.metadata.get("comment", "")
    try:
        metadata = parse_json(comment)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: expected settings in its `comment` tag, found {comment[:60]!r}")
    return metadata


def _open(path: Path | str) -> av.container.InputContainer:
    try:
        return av.open(f"file:{path}", options=OPEN_OPTIONS)  # never a network address
    except av.error.FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: expected a video, found something ffmpeg cannot read ({error.strerror})") from error


def write_gif(path: Path | str, frames: np.ndarray, fps: float) -> None:
    """Write uint8 RGB `t h w 3` as an endless GIF; one palette for all frames avoids flicker."""
    _check_frames(frames, fps)
    num_samples = min(len(frames), 16)
    samples = frames[np.linspace(0, len(frames) - 1, num_samples).round().astype(int)]
    mosaic = Image.fromarray(rearrange(samples, "t h w c -> (t h) w c"))
    palette = mosaic.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1)
    pictures = (
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames
    )
    with replacing(path) as partial:
        next(pictures).save(
            partial,
            format="GIF",
            save_all=True,
            append_images=pictures,
            duration=max(20, round(100 / fps) * 10),  # in units of 10 ms; players ignore values below 20
            loop=0,
            optimize=False,
            disposal=1,
        )


def contact_sheet(rows: Sequence[np.ndarray], labels: Sequence[str] | None = None, gap: int = 4) -> Image.Image:
    """One row per clip, uint8 RGB `t h w 3`, its label above it, frames from left to right."""
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"expected {len(rows)} labels, one for each row, found {len(labels)}")
    font = ImageFont.load_default(size=14)
    band = 20 if labels is not None else 0
    width = max(len(row) * (row.shape[2] + gap) + gap for row in rows)
    height = sum(band + row.shape[1] + gap for row in rows) + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    y = gap
    for number, row in enumerate(rows):
        if labels is not None:
            draw.text((gap, y), _shorten(labels[number], font, width - 2 * gap), fill="black", font=font)
        for column, frame in enumerate(row):
            sheet.paste(Image.fromarray(frame), (gap + column * (row.shape[2] + gap), y + band))
        y += band + row.shape[1] + gap
    return sheet


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    text = " ".join(text[: 8 * width].split())  # longer text never fits
    if font.getlength(text) <= width:
        return text
    fit = bisect(range(1, len(text) + 1), width, key=lambda count: font.getlength(text[:count] + "..."))
    return text[:fit] + "..."


def _check_frames(frames: np.ndarray, fps: float) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"expected uint8 frames `t h w 3`, found {frames.dtype} {list(frames.shape)}")
    if fps <= 0:
        raise ValueError(f"expected frames a second above 0, found {fps:g}")
