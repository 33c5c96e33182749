"""Videos for tests: clips of the procedural world, frames that carry their number, and broken files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from ldm.data.world import draw_clip
from ldm.video import write_mp4


def draw_drive(num_frames: int, size: int | tuple[int, int], seed: int) -> np.ndarray:
    """A clip of the procedural world, uint8 RGB `t h w 3`; other seeds give scenes of the same style."""
    return draw_clip("summer dawn", seed, num_frames, size, 25).frames


def write_drive(path: Path, num_frames: int, size: int = 64, seed: int = 0) -> None:
    write_mp4(path, draw_drive(num_frames, size, seed), fps=25)


def write_numbered(path: Path, num_frames: int, rate: str) -> None:
    """A video whose frame n shows the number n as eight black or white bars."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate))
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(num_frames):
            bars = np.array([255 * (number >> bit & 1) for bit in range(8)], np.uint8).repeat(8)
            frame = np.broadcast_to(bars[None, :, None], (64, 64, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))


def number_of(frame: np.ndarray) -> int:
    return sum(1 << bit for bit in range(8) if frame[32, 8 * bit + 4, 0] > 128)


def write_audio(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_truncated(path: Path) -> None:
    """A film whose index is at its front, so that it opens, and whose last third is missing."""
    write_mp4(path, draw_drive(30, 128, seed=0), fps=10)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
