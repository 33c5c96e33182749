"""What one training step gets, and which parts of the prepared scenes it may come from."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.shards import DatasetError, PreparedSet, SceneEntry


@dataclass(frozen=True)
class Unreadable:
    """A clip in whose place another was taken. about: which one, as `clip_reading.Window` says it."""

    position: int
    about: dict[str, Any]
    reason: str


@dataclass
class Batch:
    """Clips for one step, and single frames beside them. A sample is a clip, or as many single frames as it has.

    `moments` `b t 2c h w` (float16, mean and log-variance, unscaled), `context` `b n d` (float16), `fps` `b` (float32,
    of the clip as sampled), `positions` in the stream of samples and scene `keys`, one per clip. There may be no clip:
    b is 0 then, and t still the frames of one.

    `stills`: `t` single frames for each of the other samples, `k*t 1 2c h w`, each with a caption of its own, `k*t n
    d`; None for none. Their `positions` are all different, but may be those of clips: random draws that are seeded by
    a position need another stream for them.

    `unreadable`: the clips that should have been in it; those of stills are listed with the stills.
    """

    moments: Tensor
    context: Tensor
    fps: Tensor
    positions: list[int]
    keys: list[str]
    stills: Batch | None = None
    unreadable: list[Unreadable] = field(default_factory=list)

    def __len__(self) -> int:
        """Samples: clips and groups of stills."""
        num_stills = 0 if self.stills is None else len(self.stills.positions)
        return len(self.positions) + num_stills // self.moments.shape[1]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            moments=function(self.moments),
            context=function(self.context),
            fps=function(self.fps),
            stills=self.stills and self.stills._map(function),
        )

    def outline(self) -> Batch:
        """All but the numbers: enough to say which clips they were."""
        return self._map(lambda tensor: torch.empty(0))

    def all_unreadable(self) -> list[Unreadable]:
        """Those of clips and of single frames."""
        return [*self.unreadable, *(self.stills.unreadable if self.stills is not None else [])]

    @staticmethod
    def cat(batches: Sequence[Batch]) -> Batch:
        stills = [batch.stills for batch in batches if batch.stills is not None]
        return Batch(
            moments=torch.cat([batch.moments for batch in batches]),
            context=torch.cat([batch.context for batch in batches]),
            fps=torch.cat([batch.fps for batch in batches]),
            positions=[position for batch in batches for position in batch.positions],
            keys=[key for batch in batches for key in batch.keys],
            stills=Batch.cat(stills) if stills else None,
            unreadable=[clip for batch in batches for clip in batch.unreadable],
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
    scenes: Sequence[SceneEntry], reaches: Sequence[int], val_share: float
) -> tuple[list[SceneRange], list[SceneRange]]:
    """Training and held-out parts for clips that reach over these numbers of source frames, one for each stride.

    Scenes too short for every stride are left out. A scene is held out by the hash of its key, so that new footage
    never moves an old scene to the other side. Where no scene held out is long enough for some stride (or none is held
    out: few scenes), the last frames of the longest training scene are held out too, if enough remain to train on.
    """
    parts = [SceneRange(scene, 0, scene.num_frames) for scene in scenes if scene.num_frames >= min(reaches)]
    held_out = [part for part in parts if _hash_share(part.scene.key) < val_share]
    training = [part for part in parts if _hash_share(part.scene.key) >= val_share]
    if not training:
        training, held_out = parts, []
    if val_share == 0:
        return training, held_out
    covered = max((part.num_frames for part in held_out), default=0)
    longest = max(training, key=lambda part: part.num_frames)
    for reach in sorted(set(reaches), reverse=True):
        tail = max(reach, 0 if held_out else round(val_share * longest.num_frames))
        if reach <= covered:
            break
        if longest.num_frames - tail >= reach:
            cut = longest.stop - tail
            training = [replace(part, stop=cut) if part is longest else part for part in training]
            return training, [*held_out, replace(longest, start=cut)]
    return training, held_out


def _hash_share(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def read_clip(
    prepared: PreparedSet, part: SceneRange, start: int, frames: int, stride: int, context: np.ndarray, position: int
) -> Batch:
    """A `Batch` of one clip: `frames` frames from frame `start` of the scene, every `stride`-th."""
    moments = prepared.read_moments(part.scene, start, frames, stride)
    return Batch(
        moments=torch.from_numpy(moments)[None],
        context=torch.from_numpy(np.array(context))[None],
        fps=torch.tensor([part.scene.fps / stride], dtype=torch.float32),
        positions=[position],
        keys=[part.scene.key],
    )


log = logging.getLogger(__name__)
FIRST_PAUSE = 0.1  # seconds before the first time that something is read again; twice as long before each other
MOST_TRIED = 10  # clips, at one position


@dataclass(frozen=True)
class Window:
    """Which clip: every `stride`-th frame of a scene from `start`, `frames` of them, and which of the scene's captions;
    None: the empty one."""

    part: SceneRange
    start: int
    frames: int
    stride: int
    caption: int | None

    def about(self) -> dict[str, Any]:
        """In words and numbers; frames are counted in the source, at the prepared frame rate."""
        scene = self.part.scene
        first = scene.start + self.start
        return {
            "source": scene.source,
            "frames": [first + self.stride * frame for frame in range(self.frames)],
            "caption": "" if self.caption is None else scene.captions[self.caption],
            "scene": scene.key,
            "shard": scene.shard,
        }


def drawn_caption(part: SceneRange, caption_dropout: float, random: np.random.Generator) -> int | None:
    """One of the scene's captions; None, the empty one, with this probability."""
    number = int(random.integers(len(part.scene.contexts)))
    return None if random.random() < caption_dropout else number


def read_window(prepared: PreparedSet, window: Window, position: int) -> Batch:
    """A `Batch` of one clip."""
    context = (
        prepared.empty_context if window.caption is None else prepared.read_caption(window.part.scene, window.caption)
    )
    return read_clip(prepared, window.part, window.start, window.frames, window.stride, context, position)


def read_or_replace(prepared: PreparedSet, window_of: Callable[[int], Window], position: int, retries: int) -> Batch:
    """The clip `window_of(0)`, or the first of `window_of(1)` and so on that can be read; what could not is listed.

    retries: how often each is read again before it is given up. Raises DatasetError where `MOST_TRIED` could not.
    """
    lost: list[Unreadable] = []
    for attempt in range(MOST_TRIED):
        window = window_of(attempt)
        try:
            batch = _read_again(prepared, window, position, retries)
        except (OSError, DatasetError) as error:
            lost.append(Unreadable(position, window.about(), str(error)))
            continue
        return replace(batch, unreadable=lost) if lost else batch
    raise DatasetError(
        f"{prepared.root}: expected a clip that can be read among {MOST_TRIED} tried for position {position}, each "
        f"{1 + retries} times, found none, the first for this: {lost[0].reason}"
    )


def _read_again(prepared: PreparedSet, window: Window, position: int, retries: int) -> Batch:
    for number in range(retries):
        try:
            return read_window(prepared, window, position)
        except (OSError, DatasetError) as error:
            log.debug("position %d is read again: %s", position, error)
            time.sleep(FIRST_PAUSE * 2**number)
    return read_window(prepared, window, position)
