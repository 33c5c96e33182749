"""Single frames of footage, for training the image autoencoder: decoded once, held in memory, cropped at random.

As with the clips, what lies at a position of the training stream depends on the seed and the position alone, so that a
run stopped and resumed sees what a straight one sees. Captions, cuts and latents play no part here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.footage import FootageError, list_videos, probe, read_frames
from ldm.data.stream import StreamDataModule, StreamOrder
from ldm.errors import UserError
from ldm.video import from_uint8

MAX_HELD_OUT = 64  # frames that one validation looks at


@dataclass
class FrameBatch:
    """`pixels` `b c h w` in [-1, 1] and their `positions` in the training stream."""

    pixels: Tensor
    positions: list[int]

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FrameBatch:
        return FrameBatch(self.pixels.to(device, non_blocking=non_blocking), self.positions)

    def pin_memory(self) -> FrameBatch:
        return FrameBatch(self.pixels.pin_memory(), self.positions)

    @staticmethod
    def cat(batches: Sequence[FrameBatch]) -> FrameBatch:
        pixels = torch.cat([batch.pixels for batch in batches])
        return FrameBatch(pixels, [position for batch in batches for position in batch.positions])


class RandomCrops(Dataset):
    """The endless stream of training crops `1 c size size`; `len` is one pass, every frame once.

    frames: one uint8 array `t h w c` per video; sizes may differ between videos.
    """

    def __init__(self, frames: Sequence[np.ndarray], size: int, seed: int) -> None:
        self.frames, self.size, self.seed = frames, size, seed
        self.slots = [(video, t) for video, array in enumerate(frames) for t in range(len(array))]
        self._order = StreamOrder(seed, len(self.slots))

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, position: int) -> FrameBatch:
        turn, index = divmod(position, len(self))
        video, t = self.slots[self._order(turn)[index]]
        frame = self.frames[video][t]
        random = np.random.default_rng((self.seed, position))
        y, x = (int(random.integers(side - self.size + 1)) for side in frame.shape[:2])
        crop = frame[y : y + self.size, x : x + self.size]
        if random.random() < 0.5:
            crop = crop[:, ::-1]
        return FrameBatch(from_uint8(crop[None]), [position])


class CentreCrops(Dataset):
    """Held-out frames, at most `MAX_HELD_OUT` evenly spaced ones, cropped in the middle: `1 c size size` each."""

    def __init__(self, frames: Sequence[np.ndarray], size: int) -> None:
        every = [frame for array in frames for frame in array]
        chosen = np.linspace(0, len(every) - 1, min(MAX_HELD_OUT, len(every))).round().astype(int)
        self.frames, self.size = [every[index] for index in chosen], size

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, position: int) -> FrameBatch:
        frame = self.frames[position]
        y, x = ((side - self.size) // 2 for side in frame.shape[:2])
        return FrameBatch(from_uint8(frame[None, y : y + self.size, x : x + self.size]), [position])


class FrameDataModule(StreamDataModule):
    """Frames of videos for training and validation.

    Args:
        videos: files or folders, one or several; damaged ones are reported and left out.
        size: side of a crop in pixels.
        fps: frames taken per second of footage.
        batch_size: crops per process and step.
        num_workers: reading processes; frames lie in memory, so 0 is fast enough for most machines.
        val_share: share of each video, its end, that is held out; 0 for none.
        seed: of the order and of every draw.
        max_frames: bound on the frames held in memory (88 kB each for 16:9 footage at size 128); when the footage has
            more, fewer are taken per second.

    Frames are held at the size at which their shorter side is `size`, so a crop shows their full height (or width).
    """

    def __init__(
        self,
        videos: str | Sequence[str],
        size: int = 128,
        fps: float = 10,
        batch_size: int = 4,
        num_workers: int = 0,
        val_share: float = 0.1,
        seed: int = 23,
        max_frames: int = 20_000,
    ) -> None:
        super().__init__(batch_size, num_workers, FrameBatch.cat)
        whole = {"size": (size, 8), "batch_size": (batch_size, 1), "num_workers": (num_workers, 0)}
        for name, (value, least) in {**whole, "seed": (seed, 0), "max_frames": (max_frames, 2)}.items():
            if not isinstance(value, int) or value < least:
                raise UserError(f"data.params.{name}: expected a whole number of at least {least}, found {value!r}")
        if not 0 <= val_share <= 0.5:
            raise UserError(f"data.params.val_share: expected 0 to 0.5, found {val_share!r}")
        self.videos = [videos] if isinstance(videos, str | Path) else list(videos)
        self.size, self.fps = size, fps
        self.val_share, self.seed, self.max_frames = val_share, seed, max_frames
        self.train_frames: RandomCrops | None = None
        self.summary = ""

    def setup(self, stage: str | None = None) -> None:
        """Decode the footage; a second call does nothing. Raises FootageError when none of it can be used."""
        if self.train_frames is not None:
            return
        training, held_out = [], []
        arrays, notes = self._read_all()
        for frames in arrays:
            num_held_out = round(self.val_share * len(frames))
            training.append(frames[: len(frames) - num_held_out])
            held_out.append(frames[len(frames) - num_held_out :])
        self.train_frames = RandomCrops(training, self.size, self.seed)
        self.val_frames = CentreCrops(held_out, self.size)
        num_held_out = sum(map(len, held_out))
        found = f"{len(training)} videos: {len(self.train_frames)} frames to train on, {num_held_out} held out"
        self.summary = "\n".join([found, *notes])

    def _read_all(self) -> tuple[list[np.ndarray], list[str]]:
        """The frames of each video that can be used, and lines on what is left out."""
        infos, problems, notes = [], [], []
        for path in list_videos(self.videos):
            try:
                infos.append(probe(path))
            except FootageError as error:
                problems.append(error)
        expected = sum(info.duration for info in infos) * self.fps
        thinning = max(1.0, expected / self.max_frames)
        if thinning > 1:
            notes.append(
                f"about {expected:.0f} frames at {self.fps:g} a second are more than max_frames = {self.max_frames}: "
                f"taking {self.fps / thinning:.3g} a second instead"
            )
        arrays = []
        for info in infos:
            enlarge = self.size / min(info.width, info.height)
            size = tuple(max(self.size, round(side * enlarge)) for side in (info.height, info.width))
            try:
                frames = read_frames(info.path, self.fps / thinning, size)
                arrays.append(np.stack(list(islice(frames, 2 * self.max_frames))))  # of a file that says it has fewer
            except FootageError as error:
                problems.append(error)
        if not arrays:
            raise problems[0]
        return arrays, notes + [f"left out: {problem}" for problem in problems]

    def train_dataloader(self) -> DataLoader:
        return self.stream_loader(self.train_frames)

    def val_dataloader(self) -> DataLoader | list:
        return self.loader(self.val_frames) if len(self.val_frames) else []
