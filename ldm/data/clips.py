"""Training clips: random windows of prepared scenes, in an order that survives stopping and resuming.

Every sample of a run has a position 0, 1, 2, ... What lies at a position depends on the seed and the position alone, so
a run is the same stream however it is cut into batches, workers, processes, epochs or sessions. The data module counts
the positions whose gradients have reached the weights and saves that one number.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.shards import DatasetError, DatasetInfo, PreparedSet, SceneEntry
from ldm.data.stream import StreamDataModule, StreamOrder

log = logging.getLogger(__name__)
LONG_READ = 10**9  # bytes; checking more is announced


@dataclass
class Batch:
    """Clips for one step. `moments` `b t 2c h w` (float16, mean and log-variance, unscaled), `context` `b n d`
    (float16), `fps` `b` (float32, of the clip as sampled), `positions` and scene `keys` one per clip. `stills` are
    single frames trained on beside the clips, `t` = 1."""

    moments: Tensor
    context: Tensor
    fps: Tensor
    positions: list[int]
    keys: list[str]
    stills: Batch | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self, moments=function(self.moments), context=function(self.context), fps=function(self.fps))

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        return Batch(
            moments=torch.cat([batch.moments for batch in batches]),
            context=torch.cat([batch.context for batch in batches]),
            fps=torch.cat([batch.fps for batch in batches]),
            positions=[position for batch in batches for position in batch.positions],
            keys=[key for batch in batches for key in batch.keys],
        )


@dataclass(frozen=True)
class SceneRange:
    """Frames `start` to `stop` (not included) of a scene."""

    scene: SceneEntry
    start: int
    stop: int

    @property
    def num_frames(self) -> int:
        return self.stop - self.start


def frames_needed(frames: int, stride: int) -> int:
    """Source frames that a clip of `frames` frames, every `stride`-th, reaches over."""
    return (frames - 1) * stride + 1


def split_scenes(
    scenes: Sequence[SceneEntry], shortest: int, val_share: float
) -> tuple[list[SceneRange], list[SceneRange]]:
    """Training and held-out parts of at least `shortest` frames; shorter scenes are left out.

    A scene is held out by the hash of its key, so that new footage never moves an old scene to the other side. Where
    that picks nothing (few scenes), the last frames of the longest scene are held out, if enough remain to train on.
    """
    parts = [SceneRange(scene, 0, scene.num_frames) for scene in scenes if scene.num_frames >= shortest]
    held_out = [part for part in parts if _hash_share(part.scene.key) < val_share]
    training = [part for part in parts if _hash_share(part.scene.key) >= val_share]
    if val_share == 0 or (held_out and training):
        return training, held_out
    longest = max(parts, key=lambda part: part.num_frames)
    tail = max(shortest, round(val_share * longest.num_frames))
    if longest.num_frames - tail < shortest:
        return parts, []
    cut = longest.stop - tail
    training = [replace(part, stop=cut) if part is longest else part for part in parts]
    return training, [replace(longest, start=cut)]


def _hash_share(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


class ClipDataset(Dataset):
    """The endless stream of training clips; `len` is one pass: as many clips as fit into the footage side by side.

    Item `position` is a `Batch` of one clip. Each pass goes through the scenes in an order of its own, long scenes
    several times; start, stride and caption are drawn anew, and the caption is the empty one for `caption_dropout` of
    the clips.
    """

    def __init__(
        self,
        prepared: PreparedSet,
        parts: Sequence[SceneRange],
        frames: int,
        strides: Sequence[int],
        caption_dropout: float,
        seed: int,
    ) -> None:
        self.prepared, self.frames, self.strides = prepared, frames, tuple(strides)
        self.caption_dropout, self.seed = caption_dropout, seed
        shortest = frames_needed(frames, min(strides))
        self.slots = [part for part in parts for _ in range(max(1, (part.num_frames - shortest + 1) // frames))]
        self._order = StreamOrder(seed, len(self.slots))

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, position: int) -> Batch:
        turn, index = divmod(position, len(self))
        part = self.slots[self._order(turn)[index]]
        random = np.random.default_rng((self.seed, position))
        strides = [stride for stride in self.strides if frames_needed(self.frames, stride) <= part.num_frames]
        stride = strides[random.integers(len(strides))]
        start = part.start + random.integers(part.num_frames - frames_needed(self.frames, stride) + 1)
        captions = self.prepared.read_context(part.scene)
        context = captions[random.integers(len(captions))]
        if random.random() < self.caption_dropout:
            context = self.prepared.empty_context
        return read_clip(self.prepared, part, int(start), self.frames, stride, context, position)


class HeldOutClips(Dataset):
    """Fixed clips of the held-out parts, side by side, at the smallest stride, with their first caption."""

    def __init__(self, prepared: PreparedSet, parts: Sequence[SceneRange], frames: int, stride: int) -> None:
        self.prepared, self.frames, self.stride = prepared, frames, stride
        reach = frames_needed(frames, stride)
        self.windows = [(part, start) for part in parts for start in range(part.start, part.stop - reach + 1, reach)]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, position: int) -> Batch:
        if position >= len(self):
            raise IndexError(position)
        part, start = self.windows[position]
        context = self.prepared.read_context(part.scene)[0]
        return read_clip(self.prepared, part, start, self.frames, self.stride, context, position)


def read_clip(
    prepared: PreparedSet, part: SceneRange, start: int, frames: int, stride: int, context: np.ndarray, position: int
) -> Batch:
    """A `Batch` of one clip: `frames` frames from frame `start` of the scene, every `stride`-th."""
    moments = prepared.read_moments(part.scene, start, frames, stride)
    return Batch(
        moments=torch.from_numpy(np.array(moments))[None],
        context=torch.from_numpy(np.array(context))[None],
        fps=torch.tensor([part.scene.fps / stride], dtype=torch.float32),
        positions=[position],
        keys=[part.scene.key],
    )


def check_prepared(
    prepared: PreparedSet,
    first_stage: str,
    text_encoder: str,
    scale_factor: float,
    latent_channels: int,
    context_dim: int,
) -> None:
    """Raise `DatasetError` unless a prepared set was made for a model: by its encoders (`ldm.checkpoint.identity`), for
    its scale factor, with as many latent channels and as wide text embeddings as its network takes."""
    prepared.check_encoders(first_stage, text_encoder, scale_factor)
    for name, found, wanted in (
        ("latent channels", prepared.info.latent_channels, latent_channels),
        ("values per text token", prepared.info.context_shape[-1], context_dim),
    ):
        if found != wanted:
            raise DatasetError(
                f"{prepared.root}: expected {wanted} {name}, as the model's network takes, found {found}; prepare the "
                "footage again, into a fresh folder, with this config"
            )


class ClipDataModule(StreamDataModule):
    """Prepared clips for training and validation.

    Args:
        root: folder written by scripts/prepare.py.
        frames: frames per clip.
        strides: a clip takes every n-th source frame, n drawn from these.
        batch_size: clips per process and micro-batch.
        num_workers: reading processes; 0 reads in the training process.
        caption_dropout: share of training clips that get the empty caption.
        val_share: share of the scenes held out; 0 for none.
        seed: of the order and of every draw.
        verify: check the checksum of every tensor at the start; each clip is checked as it is read anyhow.

    Raises `DatasetError` when the folder is not a prepared set or no scene is long enough.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the words of the config
        self,
        root: str,
        frames: int,
        strides: int | Sequence[int] = (1,),
        batch_size: int = 1,
        num_workers: int = 2,
        caption_dropout: float = 0.1,
        val_share: float = 0.05,
        seed: int = 23,
        verify: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, Batch.cat)
        strides = tuple(strides) if isinstance(strides, Sequence) else (strides,)
        for name, value, least in (
            ("frames", frames, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
            ("strides", min(strides, default=0), 1),
        ):
            if not isinstance(value, int) or value < least:
                raise DatasetError(f"data.params.{name}: expected a whole number of at least {least}, found {value!r}")
        for name, share in (("caption_dropout", caption_dropout), ("val_share", val_share)):
            if not 0 <= share <= (1 if name == "caption_dropout" else 0.5):
                raise DatasetError(f"data.params.{name}: expected a share from 0 to 1 (val_share: 0.5), found {share}")
        self.root, self.frames, self.strides = root, frames, strides
        self.caption_dropout, self.val_share, self.seed, self.verify = caption_dropout, val_share, seed, verify
        self.prepared: PreparedSet | None = None
        self.summary = ""

    @property
    def info(self) -> DatasetInfo:
        """What dataset.json says, for checks against the model."""
        self.setup()
        return self.prepared.info

    def setup(self, stage: str | None = None) -> None:
        """Open the prepared set and divide its scenes; a second call does nothing."""
        if self.prepared is not None:
            return
        prepared = PreparedSet(self.root)
        shortest = frames_needed(self.frames, min(self.strides))
        longest = max((scene.num_frames for scene in prepared.scenes), default=0)
        if longest < shortest:
            raise DatasetError(
                f"{self.root}: no scene is long enough for {self.frames} frames at stride {min(self.strides)}, which "
                f"reach over {shortest} frames; the longest of {len(prepared.scenes)} scenes has {longest}. Ask for "
                "fewer frames, a smaller stride or more frames per second when preparing"
            )
        training, held_out = split_scenes(prepared.scenes, shortest, self.val_share)
        self.train_clips = ClipDataset(prepared, training, self.frames, self.strides, self.caption_dropout, self.seed)
        self.val_clips = HeldOutClips(prepared, held_out, self.frames, min(self.strides))
        self.prepared = prepared
        short = sum(scene.num_frames < shortest for scene in prepared.scenes)
        self.summary = (
            f"{self.root}: {len(training)} scenes to train on ({len(self.train_clips)} clips side by side), "
            f"{len(held_out)} held out ({len(self.val_clips)} clips), {short} too short for {shortest} frames"
        )

    def prepare_data(self) -> None:
        """Read everything once and compare it with its checksums; Lightning does this in one process of a machine."""
        if not self.verify:
            return
        self.setup()
        num_bytes = sum(span.length for scene in self.prepared.scenes for span in (scene.latents, *scene.contexts))
        if num_bytes > LONG_READ:
            log.info("%s: checking %.1f GB; data.params.verify=false leaves this out", self.root, num_bytes / 1e9)
        for scene in self.prepared.scenes:
            self.prepared.verify(scene)

    def train_dataloader(self) -> DataLoader:
        return self.stream_loader(self.train_clips)

    def val_dataloader(self) -> DataLoader | list:
        return self.loader(self.val_clips) if len(self.val_clips) else []
