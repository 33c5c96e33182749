"""The section `loader`: how many clips a second reach the training process, beside a WebDataset stream."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils.data import DataLoader

from ldm.benchmarking.loading import clips_per_second, our_clips, webdataset_clips, write_shards
from ldm.benchmarking.rows import GOALS, Row
from ldm.benchmarking.timing import Budget, Seconds, ratios

WORKERS, BATCH, FRAMES = 2, 2, 5
TITLES = {
    "ours": "ours: clips at random, each checked",
    "webdataset": "WebDataset: a clip of each scene, at random",
    "side by side": "WebDataset: all clips of each scene in turn, shuffled in a buffer",
}


def compare_loaders(
    scenes: int, scene_frames: int, side: int, seconds: float, rounds: int, budget: Budget, kind: str = "cpu"
) -> Iterator[Row]:
    """Clips a second from random shards of so many scenes, in turns of at most so many seconds each.

    Before each turn the system is made to forget the shards (posix_fadvise, POSIX_FADV_DONTNEED): the first read of
    every byte comes from the disk. kind: of the goals, those of "cpu" hold everywhere.
    """
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        root = folder / "prepared"
        size = write_shards(root, scenes, scene_frames, side)
        ways: dict[str, Callable[[], DataLoader]] = {
            "ours": lambda: our_clips(root, FRAMES, BATCH, WORKERS),
            "webdataset": lambda: webdataset_clips(root, FRAMES, BATCH, WORKERS, whole_scenes=False),
            "side by side": lambda: webdataset_clips(root, FRAMES, BATCH, WORKERS, whole_scenes=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, make in ways.items():
                rates[name].append(clips_per_second(make, root, BATCH, seconds))
            if not budget.has(1.5 * len(ways) * seconds):
                break
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    per_clip = {name: [1 / rate for rate in found] for name, found in rates.items()}
    found = ratios(per_clip, "ours")
    case = (
        f"{FRAMES} latents of {side}x{side} and a caption, {WORKERS} processes, batches of {BATCH}, cold cache, "
        f"{size / 1e6:,.0f} MB in scenes of {scene_frames} frames"
    )
    for name, title in TITLES.items():
        taken = Seconds.of(per_clip[name])
        row = Row("loader", case, title, taken, found.get(name), rate=1 / taken.median)
        keys = {"ours": (f"{kind} clips", row.rate), "webdataset": (f"{kind} webdataset", 1 / (row.ratio or 1))}
        key, value = keys.get(name, ("", 0.0))
        row.found = {key: value} if key in GOALS else {}
        yield row
