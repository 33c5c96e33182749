"""Training clips: random windows of prepared scenes, in an order that survives stopping and resuming.

Every sample of a run has a position 0, 1, 2, ... What lies at a position depends on the seed and the position alone, so
a run is the same stream however it is cut into batches, workers, processes, epochs or sessions. The data module counts
the positions whose gradients have reached the weights and saves that one number.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.data.batch import (
    Batch,
    Clips,
    ClipWindow,
    SceneRange,
    drawn_caption,
    frames_needed,
    read_or_replace,
    split_scenes,
)
from ldm.data.shards import DatasetError, DatasetInfo, PreparedSet
from ldm.data.shards.index import lengths_of
from ldm.data.stream import StreamDataModule, StreamOrder

SHARE_STREAM, STILL_STREAM, REPLACING_STILL_STREAM = 3, 4, 6  # of random draws; (seed, position) alone is the clips'


@dataclass
class StillFrames:
    """Samples of the training stream that are `frames` single frames, of as many scenes where there are enough.

    parts: what the frames are taken from, every part as often as any other.
    share: of the positions that are such samples.
    retries: of `read_or_replace`, for each frame.
    """

    prepared: PreparedSet
    parts: Sequence[SceneRange]
    frames: int
    share: float
    caption_dropout: float
    seed: int
    retries: int = 0

    @property
    def num_samples(self) -> int:
        """As many samples as there are frames for, at least one."""
        return max(1, sum(part.num_frames for part in self.parts) // self.frames)

    def is_at(self, position: int) -> bool:
        """Whether the sample at this position is one of stills; depends on seed and position alone."""
        return np.random.default_rng((self.seed, position, SHARE_STREAM)).random() < self.share

    def __getitem__(self, position: int) -> Batch:
        """A `Batch` without clips; its stills have the positions `position * frames` and following."""
        stills = [
            read_or_replace(self.prepared, partial(self.window, place), place, self.retries)
            for place in range(position * self.frames, (position + 1) * self.frames)
        ]
        return no_clips(stills[0], self.frames, Clips.cat(stills))

    def window(self, place: int, attempt: int = 0) -> ClipWindow:
        """The frame at `place`, position times `frames` and its number; or what is tried in the stead of that."""
        if attempt > 0:
            random = np.random.default_rng((self.seed, place, REPLACING_STILL_STREAM, attempt))
            return self._drawn(self.parts[int(random.integers(len(self.parts)))], random)
        position, number = divmod(place, self.frames)
        random = np.random.default_rng((self.seed, position, STILL_STREAM))
        chosen = random.choice(len(self.parts), self.frames, replace=len(self.parts) < self.frames).tolist()
        return [self._drawn(self.parts[index], random) for index in chosen[: number + 1]][-1]

    def _drawn(self, part: SceneRange, random: np.random.Generator) -> ClipWindow:
        frame = part.start + int(random.integers(part.num_frames))
        return ClipWindow(part, frame, 1, 1, drawn_caption(part, self.caption_dropout, random))


def no_clips(like: Batch, frames: int, stills: Clips) -> Batch:
    """A batch of stills and of no clips, which would be `frames` long and otherwise `like` this one."""

    def nothing(array: Tensor) -> Tensor:
        return array.new_empty(0, frames, *array.shape[2:])

    return Batch(
        moments=nothing(like.moments),
        context=like.context[:0],
        fps=like.fps[:0],
        positions=[],
        keys=[],
        arrays={name: nothing(array) for name, array in like.arrays.items()},
        stills=stills,
    )


def check_same_kind(images: PreparedSet, clips: PreparedSet) -> None:
    """Raise `DatasetError` unless a folder that stills come from was prepared as the clips were."""
    for name, found, wanted in (
        ("by another autoencoder", images.info.first_stage, clips.info.first_stage),
        ("by another text encoder", images.info.text_encoder, clips.info.text_encoder),
        ("with another scale factor", images.info.scale_factor, clips.info.scale_factor),
        ("at another size", images.info.size, clips.info.size),
        ("with latents of another shape", images.info.moments_shape, clips.info.moments_shape),
        ("with embeddings of another shape", images.info.context_shape, clips.info.context_shape),
    ):
        if found != wanted:
            raise DatasetError(
                f"data.params.image_root: {images.root} was prepared {name} than {clips.root}: expected "
                f"{str(wanted)[:16]}, found {str(found)[:16]}; prepare it again, into a fresh folder, with the same "
                "config and --size"
            )


log = logging.getLogger(__name__)
LONG_READ = 10**9  # bytes; checking more is announced
REPLACING_STREAM = 5  # of random draws; (seed, position) alone is that of what should lie there


class ClipDataset(Dataset):
    """The endless stream of training samples; `len` is one pass: as many clips as fit into the footage side by side.

    Item `position` is a `Batch` of one clip or, where `stills` says so, of single frames. Each pass goes through the
    scenes in an order of its own, long scenes several times; start, stride and caption are drawn anew, and the caption
    is the empty one for `caption_dropout` of the clips. A clip that cannot be read is read again `retries` times; then
    another one, drawn from all of the footage, takes its place.
    """

    def __init__(
        self,
        prepared: PreparedSet,
        parts: Sequence[SceneRange],
        frames: int,
        strides: Sequence[int],
        caption_dropout: float,
        seed: int,
        stills: StillFrames | None = None,
        retries: int = 0,
    ) -> None:
        self.prepared, self.frames, self.strides, self.retries = prepared, frames, tuple(strides), retries
        self.caption_dropout, self.seed, self.stills = caption_dropout, seed, stills
        shortest = frames_needed(frames, min(strides))
        self.slots = [part for part in parts for _ in range(max(1, (part.num_frames - shortest + 1) // frames))]
        self._order = StreamOrder(seed, len(self.slots))

    def __len__(self) -> int:
        if self.stills is not None and self.stills.share == 1:
            return self.stills.num_samples
        return len(self.slots)

    def __getitem__(self, position: int) -> Batch:
        if self.stills is not None and self.stills.is_at(position):
            return self.stills[position]
        return read_or_replace(self.prepared, partial(self.window, position), position, self.retries)

    def window(self, position: int, attempt: int = 0) -> ClipWindow:
        """The clip at a position; or, after so many that could not be read, what is tried in its place."""
        if attempt == 0:
            turn, index = divmod(position, len(self.slots))
            part, random = self.slots[self._order(turn)[index]], np.random.default_rng((self.seed, position))
        else:
            random = np.random.default_rng((self.seed, position, REPLACING_STREAM, attempt))
            part = self.slots[int(random.integers(len(self.slots)))]
        strides = [stride for stride in self.strides if frames_needed(self.frames, stride) <= part.num_frames]
        stride = strides[random.integers(len(strides))]
        start = part.start + int(random.integers(part.num_frames - frames_needed(self.frames, stride) + 1))
        return ClipWindow(part, start, self.frames, stride, drawn_caption(part, self.caption_dropout, random))

    def describe(self, batch: Batch) -> list[dict[str, Any]]:
        """Which clips and single frames a batch of this stream has, those in the place of others included."""
        clips = [(position, self.window, batch) for position in batch.positions]
        if self.stills is not None and batch.stills is not None:
            clips += [(place, self.stills.window, batch.stills) for place in batch.stills.positions]
        found = []
        for position, window, of in clips:
            attempt = sum(lost.position == position for lost in of.unreadable)
            found.append({"position": position, **window(position, attempt).about()})
        return found


class HeldOutClips(Dataset):
    """Fixed clips of the held-out parts, side by side, once at each stride, with their first caption.

    In the place of one that cannot be read, after `retries`, stands the next one that can.
    """

    def __init__(
        self,
        prepared: PreparedSet,
        parts: Sequence[SceneRange],
        frames: int,
        strides: Sequence[int],
        retries: int = 0,
    ) -> None:
        self.prepared, self.frames, self.retries = prepared, frames, retries
        self.windows = []  # part, first frame, stride
        for part in parts:
            for stride in sorted(set(strides)):
                reach = frames_needed(frames, stride)
                starts = range(part.start, part.stop - reach + 1, reach)
                self.windows += [(part, start, stride) for start in starts]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, position: int) -> Batch:
        if position >= len(self):
            raise IndexError(position)
        return read_or_replace(self.prepared, partial(self._window, position), position, self.retries)

    def _window(self, position: int, attempt: int) -> ClipWindow:
        part, start, stride = self.windows[(position + attempt) % len(self.windows)]
        return ClipWindow(part, start, self.frames, stride, caption=0)

    def summary(self, strides: Sequence[int]) -> str:
        """How many clips there are, and at which stride."""
        found = [stride for _, _, stride in self.windows]
        if len(set(strides)) == 1:
            return f"{len(self)} clips"
        counts = ", ".join(f"{found.count(stride)} at stride {stride}" for stride in sorted(set(strides)))
        return f"{len(self)} clips: {counts}"


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
    if misfit := prepared.info.misfit(latent_channels, context_dim):
        raise DatasetError(
            f"{prepared.root}: {misfit}; prepare the footage again, into a fresh folder, with this config"
        )


class ClipDataModule(StreamDataModule):
    """Prepared clips, and single frames if wanted, for training and validation.

    Args:
        root: folder written by scripts/prepare.py, or its address, such as s3://bucket/set.
        frames: frames per clip.
        strides: a clip takes every n-th source frame, n drawn from these; the network is conditioned on it as
            frames per second. Held-out clips are taken at each stride for which a scene is long enough.
        batch_size: samples per process and micro-batch: clips, or groups of as many single frames.
        num_workers: threads that read clips ahead; 0 reads in the training thread.
        caption_dropout: share of training clips and single frames that get the empty caption.
        val_share: share of the scenes held out; 0 for none.
        seed: of the order and of every draw.
        verify: check the checksum of every tensor at the start, where `root` is a folder; each clip is checked as it is
            read anyhow.
        image_share: share of the training samples that are not a clip but `frames` single frames of different scenes,
            which cost a little less; 1 trains on single frames alone, and what is held out are single frames too.
        image_root: another prepared folder that single frames are taken from; null: the training scenes of `root`.
        retries: how often a clip that cannot be read is read again before another one takes its place.

    Raises `DatasetError` when a folder is not a prepared set or no scene is long enough.
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
        image_share: float = 0.0,
        image_root: str | None = None,
        retries: int = 2,
    ) -> None:
        super().__init__(batch_size, num_workers, Batch.cat)
        strides = tuple(strides) if isinstance(strides, Sequence) else (strides,)
        for name, value, least in (
            ("frames", frames, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
            ("retries", retries, 0),
            ("strides", min(strides, default=0), 1),
        ):
            if not isinstance(value, int) or value < least:
                raise DatasetError(f"data.params.{name}: expected a whole number of at least {least}, found {value!r}")
        shares = {
            "caption_dropout": (caption_dropout, 1),
            "val_share": (val_share, 0.5),
            "image_share": (image_share, 1),
        }
        for name, (share, most) in shares.items():
            if not 0 <= share <= most:
                raise DatasetError(f"data.params.{name}: expected a share from 0 to {most}, found {share}")
        if image_root is not None and image_share == 0:
            raise DatasetError(
                "data.params.image_root: expected data.params.image_share above 0 with it, found 0: nothing would be "
                "taken from it"
            )
        self.root, self.frames, self.strides = root, frames, strides
        self.caption_dropout, self.val_share, self.seed, self.verify = caption_dropout, val_share, seed, verify
        self.image_share, self.image_root, self.retries = image_share, image_root, retries
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
        frames = 1 if self.image_share == 1 else self.frames  # of a clip
        reaches = [frames_needed(frames, stride) for stride in self.strides]
        longest = max(map(int, lengths_of(prepared.scenes)), default=0)
        if longest < min(reaches):
            raise DatasetError(
                f"{self.root}: no scene is long enough for {frames} frames at stride {min(self.strides)}, which "
                f"reach over {min(reaches)} frames; the longest of {len(prepared.scenes)} scenes has {longest}. Ask "
                "for fewer frames, a smaller stride or more frames per second when preparing"
            )
        training, held_out = split_scenes(prepared.scenes, reaches, self.val_share)
        self._stills = self._open_stills(prepared, training)
        self.train_clips = ClipDataset(
            prepared, training, self.frames, self.strides, self.caption_dropout, self.seed, self._stills, self.retries
        )
        strides = self.strides if frames > 1 else self.strides[:1]
        self.val_clips = HeldOutClips(prepared, held_out, frames, strides, self.retries)
        self.prepared = prepared
        short = sum(length < min(reaches) for length in lengths_of(prepared.scenes))
        kind = "clips" if self.image_share < 1 else "samples of single frames"
        self.summary = (
            f"{self.root}: {len(training)} scenes to train on ({len(self.train_clips)} {kind} side by side), "
            f"{len(held_out)} held out ({self.val_clips.summary(strides)}), {short} too short for {min(reaches)} "
            f"frame{'s' if min(reaches) > 1 else ''}"
        )
        if self._stills is not None:
            self.summary += (
                f"; {100 * self.image_share:g}% of the samples are {self.frames} single frames each, out of "
                f"{len(self._stills.parts)} scenes of {self._stills.prepared.root}"
            )

    def _open_stills(self, prepared: PreparedSet, training: Sequence[SceneRange]) -> StillFrames | None:
        if self.image_share == 0:
            return None
        source, parts = prepared, list(training)
        if self.image_root is not None:
            source = PreparedSet(self.image_root)
            check_same_kind(source, prepared)
            parts = SceneRange.whole(source.scenes)
        return StillFrames(source, parts, self.frames, self.image_share, self.caption_dropout, self.seed, self.retries)

    def prepare_data(self) -> None:
        """Read everything once and compare it with its checksums; Lightning does this in one process of a machine."""
        if not self.verify:
            return
        self.setup()
        sets = [self.prepared] if self.image_root is None else [self.prepared, self._stills.prepared]
        for prepared in (prepared for prepared in sets if isinstance(prepared.root, Path)):
            if prepared.num_bytes > LONG_READ:
                size = f"{prepared.num_bytes / 1e9:.1f} GB"
                log.info("%s: checking %s; data.params.verify=false leaves this out", prepared.root, size)
            for scene in prepared.scenes:
                prepared.verify(scene)

    def train_dataloader(self) -> DataLoader:
        """Raises `DatasetError` where processes would wait for each other: one with a batch of single frames alone has
        no gradients of the temporal layers."""
        options = getattr(getattr(self.trainer, "strategy", None), "_ddp_kwargs", None)
        if self.image_share > 0 and options is not None and not options.get("find_unused_parameters"):
            raise DatasetError(
                "data.params.image_share: with several processes expected --strategy ddp_find_unused_parameters_true, "
                "for a batch may have no clip; found another"
            )
        return self.stream_loader(self.train_clips)

    def val_dataloader(self) -> DataLoader | list:
        return self.loader(self.val_clips) if len(self.val_clips) else []
