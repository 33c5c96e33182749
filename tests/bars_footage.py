"""Footage of bars that move, small enough to train an autoencoder on in a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ldm.data.frames import FrameDataModule
from ldm.video import write_mp4


def moving_bars(num_frames: int = 24, height: int = 32, width: int = 56) -> np.ndarray:
    x, y = np.arange(width), np.arange(height)
    frames = []
    for t in range(num_frames):
        bars = ((x[None] + 2 * t + y[:, None] // 2) // 8 % 2) * 150 + 50
        frames.append(np.stack([bars, np.broadcast_to(y[:, None] * 4, bars.shape), 255 - bars], axis=-1))
    return np.stack(frames).astype(np.uint8)


def write_bars(folder: Path) -> Path:
    path = folder / "bars.mp4"
    write_mp4(path, moving_bars(), 10)
    return path


def make_data(footage: Path, **words) -> FrameDataModule:
    defaults = {"videos": str(footage), "size": 32, "fps": 10, "batch_size": 2, "val_share": 0.25}
    return FrameDataModule(**defaults | words)
