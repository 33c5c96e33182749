"""Single frames of the drawn world, drawn as they are needed: for the image autoencoder and for what reads frames and
captions. No frame is ever seen twice, and nothing lies on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.drive_world import LOOKS, draw_clip
from ldm.data.frames import FrameBatch
from ldm.data.stream import StreamDataModule
from ldm.errors import UserError
from ldm.video import from_uint8

PASS = 10_000  # frames that count as one pass of the endless stream
HELD_OUT_SEED = 2**40  # scenes from here on are never trained on
FPS = 8.0  # of the clips that the frames begin; a single frame does not show it


@dataclass
class DrawnBatch(FrameBatch):
    """A batch of drawn frames, with one caption and the number of the look (its place in `LOOKS`) for each."""

    captions: list[str]
    looks: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DrawnBatch:
        pixels, looks = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.pixels, self.looks))
        return DrawnBatch(pixels, self.positions, self.captions, looks)

    def pin_memory(self) -> DrawnBatch:
        return DrawnBatch(self.pixels.pin_memory(), self.positions, self.captions, self.looks.pin_memory())

    @staticmethod
    def cat(batches: Sequence[DrawnBatch]) -> DrawnBatch:
        pixels, looks = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("pixels", "looks"))
        positions = [position for batch in batches for position in batch.positions]
        return DrawnBatch(pixels, positions, [caption for batch in batches for caption in batch.captions], looks)


class DrawnFrames(Dataset):
    """Frames `1 c size size` of the drawn world: position p shows scene `first_seed + p` in one of `looks`."""

    def __init__(self, looks: Sequence[str], size: int, first_seed: int, length: int) -> None:
        self.looks, self.size, self.first_seed, self.length = list(looks), size, first_seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> DrawnBatch:
        turn, place = divmod(position, len(self.looks))
        order = np.random.default_rng((self.first_seed, turn)).permutation(len(self.looks))  # every look equally often
        look, seed = self.looks[order[place]], self.first_seed + position
        clip = draw_clip(look, seed, 1, self.size, FPS)
        caption = clip.captions[np.random.default_rng((seed, 1)).integers(len(clip.captions))]
        return DrawnBatch(from_uint8(clip.frames), [position], [caption], torch.tensor([LOOKS.index(look)]))


class DriveFrameDataModule(StreamDataModule):
    """Frames of the drawn world for training and validation.

    looks: names of looks; None for all. size: pixels of a side. batch_size: frames per process and step. num_workers:
    drawing processes; a frame takes about 20 ms. val_frames: frames held out, of scenes that are never trained on.
    seed: training draws scenes `seed * 10**9` and following; held-out ones begin at 2**40.
    """

    def __init__(
        self,
        looks: Sequence[str] | None = None,
        size: int = 128,
        batch_size: int = 4,
        num_workers: int = 0,
        val_frames: int = 62,
        seed: int = 23,
    ) -> None:
        super().__init__(batch_size, num_workers, DrawnBatch.cat)
        self.looks = list(looks or LOOKS)
        unknown = [look for look in self.looks if look not in LOOKS]
        if unknown:
            raise UserError(f"data.params.looks: expected names among {', '.join(LOOKS)}; found {', '.join(unknown)}")
        if not 0 <= seed <= 1000:
            raise UserError(f"data.params.seed: expected 0 to 1000, found {seed!r}")
        self.train_frames = DrawnFrames(self.looks, size, seed * 10**9, PASS)
        self.val_frames = DrawnFrames(self.looks, size, HELD_OUT_SEED, val_frames)
        self.summary = f"frames of {len(self.looks)} looks, drawn as they are needed; {val_frames} held out"

    def train_dataloader(self) -> DataLoader:
        return self.stream_loader(self.train_frames)

    def val_dataloader(self) -> DataLoader | list:
        return self.loader(self.val_frames) if len(self.val_frames) else []
