"""Frames of footage, one by one or a few in a row, for training autoencoders: decoded once, held in memory, cropped at
random.

As with the clips, what lies at a position of the training stream depends on the seed and the position alone, so a
run stopped and resumed sees what a straight one sees. Captions, cuts and latents play no part here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.preparing.footage import FootageError, list_videos, probe, read_frames
from ldm.data.stream import StreamDataModule, StreamOrder
from ldm.errors import UserError
from ldm.video import from_uint8

MAX_HELD_OUT = 64  # frames that one validation looks at


@dataclass
class FrameBatch:
    """`pixels` `(b t) c h w` in [-1, 1] and the `positions` in the training stream, b of them.

    t is the number of frames in a row, one after the other in the batch; 1 where frames stand alone. `rates` are the
    frames a second of each row.
    """

    pixels: Tensor
    positions: list[int]
    rates: list[float] = field(kw_only=True)

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FrameBatch:
        return FrameBatch(self.pixels.to(device, non_blocking=non_blocking), self.positions, rates=self.rates)

    def pin_memory(self) -> FrameBatch:
        return FrameBatch(self.pixels.pin_memory(), self.positions, rates=self.rates)

    @staticmethod
    def cat(batches: Sequence[FrameBatch]) -> FrameBatch:
        pixels = torch.cat([batch.pixels for batch in batches])
        positions, rates = (joined(batches, name) for name in ("positions", "rates"))
        return FrameBatch(pixels, positions, rates=rates)


def joined(batches: Sequence[FrameBatch], name: str) -> list:
    """The lists that batches have at `name`, as one."""
    return [value for batch in batches for value in getattr(batch, name)]


@dataclass(frozen=True)
class Rows:
    """Frames in a row: `length` of them, one of `strides` from each to the next, of footage at `fps` a second."""

    length: int
    strides: tuple[int, ...]
    fps: float

    @property
    def reach(self) -> int:
        """How far the last frame of the longest row lies behind its first."""
        return (self.length - 1) * max(self.strides)


class RandomCrops(Dataset):
    """The endless stream of training crops `t c size size`; `len` is one pass, every frame first of a row once.

    frames: one uint8 array `t h w c` per video; sizes may differ between videos. rows: frames in a row.
    """

    def __init__(self, frames: Sequence[np.ndarray], size: int, seed: int, rows: Rows) -> None:
        self.frames, self.size, self.seed, self.rows = frames, size, seed, rows
        self.slots = [(video, t) for video, array in enumerate(frames) for t in range(len(array) - rows.reach)]
        self._order = StreamOrder(seed, len(self.slots))

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, position: int) -> FrameBatch:
        turn, index = divmod(position, len(self))
        video, t = self.slots[self._order(turn)[index]]
        random = np.random.default_rng((self.seed, position))
        y, x = (int(random.integers(side - self.size + 1)) for side in self.frames[video].shape[1:3])
        is_flipped = random.random() < 0.5
        stride = self.rows.strides[random.integers(len(self.rows.strides))]
        row = self.frames[video][t : t + stride * self.rows.length : stride]
        crops = row[:, y : y + self.size, x : x + self.size]
        pixels = from_uint8(crops[:, :, ::-1] if is_flipped else crops)
        return FrameBatch(pixels, [position], rates=[self.rows.fps / stride])


class CentreCrops(Dataset):
    """Held-out rows of frames, at most `MAX_HELD_OUT` evenly spaced ones, cropped in the middle: `t c size size` each.

    A row has the first of the strides.
    """

    def __init__(self, frames: Sequence[np.ndarray], size: int, rows: Rows) -> None:
        stride = rows.strides[0]
        length = (rows.length - 1) * stride
        every = [array[t : t + length + 1 : stride] for array in frames for t in range(len(array) - length)]
        chosen = np.linspace(0, len(every) - 1, min(MAX_HELD_OUT, len(every))).round().astype(int)
        self.rows, self.size, self.rate = [every[index] for index in chosen], size, rows.fps / stride

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> FrameBatch:
        row = self.rows[position]
        y, x = ((side - self.size) // 2 for side in row.shape[1:3])
        return FrameBatch(from_uint8(row[:, y : y + self.size, x : x + self.size]), [position], rates=[self.rate])


class FrameDataModule(StreamDataModule):
    """Frames of videos for training and validation.

    Args:
        videos: files or folders, one or several; damaged ones are reported and left out.
        size: side of a crop in pixels.
        fps: frames taken per second of footage.
        batch_size: crops, or rows of crops, per process and step.
        num_workers: threads that read ahead; frames lie in memory, so 0 is fast enough for most machines.
        val_share: share of each video, its end, that is held out; 0 for none.
        seed: of the order and of every draw.
        max_frames: bound on the frames held in memory (88 kB each for 16:9 footage at size 128); when the footage has
            more, fewer are taken per second.
        frames: in a row, cropped alike; 1 for single ones. strides: how many frames of the footage lie from one to the
            next, one of them drawn for each row; held-out rows have the first.

    Frames are held at the size at which their shorter side is `size`, so a crop shows their full height (or width).
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the words of the config
        self,
        videos: str | Sequence[str],
        size: int = 128,
        fps: float = 10,
        batch_size: int = 4,
        num_workers: int = 0,
        val_share: float = 0.1,
        seed: int = 23,
        max_frames: int = 20_000,
        frames: int = 1,
        strides: Sequence[int] = (1,),
    ) -> None:
        super().__init__(batch_size, num_workers, FrameBatch.cat)
        whole = {"size": (size, 8), "batch_size": (batch_size, 1), "num_workers": (num_workers, 0)}
        whole |= {"seed": (seed, 0), "max_frames": (max_frames, 2), "frames": (frames, 1)}
        whole |= {f"strides[{place}]": (stride, 1) for place, stride in enumerate(strides)}
        for name, (value, least) in whole.items():
            if not isinstance(value, int) or value < least:
                raise UserError(f"data.params.{name}: expected a whole number of at least {least}, found {value!r}")
        if not 0 <= val_share <= 0.5:
            raise UserError(f"data.params.val_share: expected 0 to 0.5, found {val_share!r}")
        self.videos = [videos] if isinstance(videos, str | Path) else list(videos)
        self.size, self.fps = size, fps
        self.val_share, self.seed, self.max_frames = val_share, seed, max_frames
        self.frames, self.strides = frames, tuple(strides)
        self.train_frames: RandomCrops | None = None
        self.summary = ""

    def setup(self, stage: str | None = None) -> None:
        """Decode the footage; a second call does nothing. Raises FootageError when none of it can be used."""
        if self.train_frames is not None:
            return
        training, held_out = [], []
        arrays, notes, fps = self._read_all()
        rows = Rows(self.frames, self.strides, fps)
        for frames in arrays:
            num_held_out = round(self.val_share * len(frames))
            training.append(frames[: len(frames) - num_held_out])
            held_out.append(frames[len(frames) - num_held_out :])
        self.train_frames = RandomCrops(training, self.size, self.seed, rows)
        self.val_frames = CentreCrops(held_out, self.size, rows)
        if not len(self.train_frames):
            raise UserError(
                f"data.params.videos: expected a video of more than {rows.reach} frames to train on, as many as "
                f"{self.frames} frames at the largest stride take, found {max(map(len, training))}; give longer "
                "ones, a higher fps, or smaller strides"
            )
        what = "frames" if self.frames == 1 else f"rows of {self.frames} frames"
        num_held_out = sum(map(len, held_out)) if self.frames == 1 else len(self.val_frames)
        found = f"{len(training)} videos: {len(self.train_frames)} {what} to train on, {num_held_out} held out"
        self.summary = "\n".join([found, *notes])

    def _read_all(self) -> tuple[list[np.ndarray], list[str], float]:
        """The frames of each video that can be used, lines on what is left out, and frames a second."""
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
        return arrays, notes + [f"left out: {problem}" for problem in problems], self.fps / thinning

    def train_dataloader(self) -> DataLoader:
        return self.stream_loader(self.train_frames)

    def val_dataloader(self) -> DataLoader | list:
        return self.loader(self.val_frames) if len(self.val_frames) else []
