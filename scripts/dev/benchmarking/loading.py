"""The section `loader`: clips per second that reach the training process with a cold page cache, beside WebDataset."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader

from ldm.data.clips import ClipDataModule
from ldm.data.shards.index import DATASET_FILE, EMPTY_FILE, INDEX_FILE, SCHEMA_VERSION, DatasetInfo
from ldm.data.shards.writer import ShardWriter, npy_bytes
from ldm.errors import UserError
from scripts.dev.benchmarking.rows import GOALS, BenchmarkRow
from scripts.dev.benchmarking.timing import Budget, Seconds, ratios

SCENES_PER_SHARD = 16
CAN_EVICT = hasattr(os, "posix_fadvise")


def write_shards(root: Path, num_scenes: int, scene_frames: int, side: int = 64) -> int:
    """A prepared folder of random latents in the form of Stable Diffusion v1; returns its bytes. Not for training."""
    root.mkdir(parents=True)
    random = np.random.default_rng(42)
    moments_shape, context_shape = [8, side, side], [77, 768]
    context = random.standard_normal(context_shape).astype("<f2")
    entries = []
    for first in range(0, num_scenes, SCENES_PER_SHARD):
        name = f"shard-{first // SCENES_PER_SHARD:06d}.tar"
        with ShardWriter(root / name, name) as shard:
            for number in range(first, min(first + SCENES_PER_SHARD, num_scenes)):
                moments = random.integers(0, 2**14, [scene_frames, *moments_shape], dtype=np.uint16).view("<f2")
                about = {"source": "random", "start": 0, "fps": 10.0, "captions": ["random numbers"]}
                entries.append(shard.add(f"{number:032x}", about, moments, [context]))
    empty, index = npy_bytes(context), "".join(entry.to_line() for entry in entries).encode()
    (root / EMPTY_FILE).write_bytes(empty)
    (root / INDEX_FILE).write_bytes(index)
    info = DatasetInfo(
        schema_version=SCHEMA_VERSION, first_stage="none", text_encoder="none", scale_factor=1.0, fps=10.0,
        size=[8 * side, 8 * side], num_tokens=77, moments_shape=moments_shape, context_shape=context_shape,
        empty_context_crc32=zlib.crc32(empty), num_videos=num_scenes, num_scenes=num_scenes,
        num_frames=num_scenes * scene_frames, index_crc32=zlib.crc32(index),
    )  # fmt: skip
    (root / DATASET_FILE).write_text(json.dumps(asdict(info)), encoding="utf-8")
    return sum(path.stat().st_size for path in root.iterdir())


def evict(root: Path) -> None:
    """Make the system forget what it holds of a folder's files. Raises UserError where it cannot be asked to."""
    if not CAN_EVICT:
        raise UserError("loader: expected a system with posix_fadvise to empty the page cache with, found none")
    for path in root.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def our_clips(root: Path, frames: int, batch_size: int, workers: int) -> DataLoader:
    """The loader of training: clips at random."""
    data = ClipDataModule(str(root), frames, batch_size=batch_size, num_workers=workers, val_share=0.0, verify=False)
    data.setup()
    return data.train_dataloader()


def webdataset_clips(root: Path, frames: int, batch_size: int, workers: int, whole_scenes: bool) -> DataLoader:
    """The same shards as a WebDataset stream: a random clip of each scene or, with `whole_scenes`, all of its clips
    side by side, shuffled in a buffer of 64."""

    def cut(samples: Iterable[dict[str, Any]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        random = np.random.default_rng(42)
        for sample in samples:
            moments, context = sample["latents.npy"], torch.from_numpy(sample["context.npy"])
            last = len(moments) - frames
            starts = range(0, last + 1, frames) if whole_scenes else [random.integers(last + 1)]
            for start in starts:
                yield torch.from_numpy(np.ascontiguousarray(moments[start : start + frames])), context

    shards = sorted(map(str, root.glob("*.tar")))
    stream = webdataset.WebDataset(
        shards, shardshuffle=False, workersplitter=webdataset.split_by_worker, empty_check=False
    )
    stream = stream.decode().compose(cut)
    stream = stream.shuffle(64) if whole_scenes else stream
    return DataLoader(stream.batched(batch_size), batch_size=None, num_workers=workers)


def clips_per_second(make: Callable[[], DataLoader], root: Path, batch_size: int, seconds: float) -> float:
    """Clips that arrive in up to so many seconds of one pass; the first batch, and starting the processes, left out."""
    evict(root)
    batches = iter(make())
    next(batches)
    begin, num = time.perf_counter(), 0
    for _ in batches:
        num, taken = num + batch_size, time.perf_counter() - begin
        if taken > seconds:
            break
    if not num:
        raise UserError(f"loader: expected at least two batches of clips in {root}, found one")
    return num / taken


WORKERS, BATCH, FRAMES = 2, 2, 5
TITLES = {
    "ours": "ours: clips at random, each checked",
    "webdataset": "WebDataset: a clip of each scene, at random",
    "side by side": "WebDataset: all clips of each scene in turn, shuffled in a buffer",
}


def compare_loaders(
    scenes: int, scene_frames: int, side: int, seconds: float, rounds: int, budget: Budget, kind: str = "cpu"
) -> Iterator[BenchmarkRow]:
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
        row = BenchmarkRow("loader", case, title, taken, found.get(name), rate=1 / taken.median)
        keys = {"ours": (f"{kind} clips", row.rate), "webdataset": (f"{kind} webdataset", 1 / (row.ratio or 1))}
        key, value = keys.get(name, ("", 0.0))
        row.found = {key: value} if key in GOALS else {}
        yield row
