"""Frames of the procedural world as training data, drawn on demand: single frames or short clips, with captions.

No frame is used twice, and nothing is stored on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.frames import FrameBatch, joined
from ldm.data.stream import StreamDataModule
from ldm.data.world import GROUPS, LOOKS, draw_clip
from ldm.errors import UserError
from ldm.video import from_uint8

PASS = 10_000  # positions per pass of the endless stream
HELD_OUT_SEED = 2**40  # validation scenes; far above those of training
FPS = 8.0  # without effect on single frames


@dataclass
class DrawnBatch(FrameBatch):
    """A batch of frames with a caption and a style (index in `LOOKS`) for each position."""

    captions: list[str]
    looks: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DrawnBatch:
        pixels, looks = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.pixels, self.looks))
        return DrawnBatch(pixels, self.positions, self.captions, looks, rates=self.rates)

    def pin_memory(self) -> DrawnBatch:
        pixels, looks = self.pixels.pin_memory(), self.looks.pin_memory()
        return DrawnBatch(pixels, self.positions, self.captions, looks, rates=self.rates)

    @staticmethod
    def cat(batches: Sequence[DrawnBatch]) -> DrawnBatch:
        pixels, looks = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("pixels", "looks"))
        positions, captions, rates = (joined(batches, name) for name in ("positions", "captions", "rates"))
        return DrawnBatch(pixels, positions, captions, looks, rates=rates)


class DrawnFrames(Dataset):
    """Frames `t c size size`: position p is scene `first_seed + p` in one of the styles `looks`.

    frames: t. rates: frames per second; one is drawn for each position.
    """

    def __init__(
        self, looks: Sequence[str], size: int, first_seed: int, length: int, frames: int, rates: Sequence[float]
    ) -> None:
        self.looks, self.size, self.first_seed, self.length = list(looks), size, first_seed, length
        self.frames, self.rates = frames, list(rates)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> DrawnBatch:
        turn, place = divmod(position, len(self.looks))
        order = np.random.default_rng((self.first_seed, turn)).permutation(len(self.looks))  # every style equally often
        look, seed = self.looks[order[place]], self.first_seed + position
        rate = self.rates[np.random.default_rng((seed, 2)).integers(len(self.rates))]
        clip = draw_clip(look, seed, self.frames, self.size, rate)
        caption = clip.captions[np.random.default_rng((seed, 1)).integers(len(clip.captions))]
        look = torch.tensor([LOOKS.index(look)])
        return DrawnBatch(from_uint8(clip.frames), [position], [caption], look, rates=[rate])


class DriveFrameDataModule(StreamDataModule):
    """Frames of the procedural world for training and validation.

    looks: names of styles, or one of the groups all, moving and still; None: all. size: side in pixels. batch_size:
    scenes per process and step. num_workers: drawing processes; a frame takes about 20 ms. val_frames: validation
    scenes. seed: training scenes start at `seed * 10**9`, validation scenes at 2**40. frames: consecutive frames per
    scene. rates: frames per second, one drawn for each scene; required if frames > 1, None otherwise.
    """

    loads_in_processes = True

    def __init__(
        self,
        looks: str | Sequence[str] | None = None,
        size: int = 128,
        batch_size: int = 4,
        num_workers: int = 0,
        val_frames: int = 62,
        seed: int = 23,
        frames: int = 1,
        rates: Sequence[float] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, DrawnBatch.cat)
        self.looks = list(GROUPS.get(looks, (looks,)) if isinstance(looks, str) else looks or LOOKS)
        unknown = [look for look in self.looks if look not in LOOKS]
        if unknown:
            known = f"names among {', '.join(LOOKS)}, or one of {', '.join(GROUPS)}"
            raise UserError(f"data.params.looks: expected {known}; found {', '.join(unknown)}")
        if not 0 <= seed <= 1000:
            raise UserError(f"data.params.seed: expected 0 to 1000, found {seed!r}")
        if (frames > 1) != bool(rates):
            raise UserError(
                "data.params.rates: expected frames per second for clips of several frames, none for single frames, "
                f"found {rates!r} with frames: {frames!r}"
            )
        draw = {"frames": frames, "rates": rates or [FPS]}
        self.train_frames = DrawnFrames(self.looks, size, seed * 10**9, PASS, **draw)
        self.val_frames = DrawnFrames(self.looks, size, HELD_OUT_SEED, val_frames, **draw)
        what = "frames" if frames == 1 else f"clips of {frames} frames"
        self.summary = f"{what} of {len(self.looks)} styles, drawn on demand; {val_frames} for validation"

    def train_dataloader(self) -> DataLoader:
        return self.stream_loader(self.train_frames)

    def val_dataloader(self) -> DataLoader | list:
        return self.loader(self.val_frames) if len(self.val_frames) else []
