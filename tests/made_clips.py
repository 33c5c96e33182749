"""Prepared folders of made-up numbers, written by the code that writes real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ldm.data.preparing.preparation import EncodingSettings, Preparation
from ldm.data.shards import PreparedSet

SETTINGS = EncodingSettings(
    first_stage="a" * 64, text_encoder="b" * 64, scale_factor=0.18215, fps=10.0, size=[64, 64], num_tokens=5
)
CAPTIONS = ["a drive", "eine Fahrt → Süden"]


def moments_of(video: int, num_frames: int) -> np.ndarray:
    return np.random.default_rng(video).standard_normal((num_frames, 8, 4, 6)).astype(np.float16)


def context_of(number: int) -> np.ndarray:
    return np.random.default_rng(100 + number).standard_normal((5, 7)).astype(np.float16)


def fill(out: Path, videos=range(3), settings=SETTINGS, shard_bytes=6000) -> PreparedSet:
    """Prepare made-up videos: number v has scenes of 4 and 6 + v frames, and one frame dropped between them."""
    making = Preparation(out, settings, shard_bytes)
    if not making.has_empty_context:
        making.store_empty_context(context_of(-1))
    for video in videos:
        sha256 = f"{video:064x}"
        if making.done(sha256, f"v{video}.mp4", CAPTIONS):
            continue
        with making.video(f"v{video}.mp4", sha256, CAPTIONS) as part:
            moments = moments_of(video, 11 + video)
            part.add(range(0, 4), moments[:4], [context_of(0), context_of(1)])
            part.drop(range(4, 5), "a single frame between two cuts")
            part.add(range(5, 11 + video), moments[5:], [context_of(0), context_of(1)])
    return making.finish()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def the_set(folder: Path) -> dict[str, bytes]:
    """What a prepared folder is made of. In the list of broken videos stands how far ffmpeg got, which varies."""
    return {name: content for name, content in contents(folder).items() if name != "broken.jsonl"}
