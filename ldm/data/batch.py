"""What one training step gets, and which parts of the prepared scenes it may come from."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ldm.data.shards import DatasetError, PreparedSet, SceneEntry
from ldm.data.shards.index import keys_of, lengths_of


@dataclass(frozen=True)
class Unreadable:
    """A clip that another one replaced. about: which one, as `ClipWindow.about` describes it."""

    position: int
    about: dict[str, Any]
    reason: str


@dataclass
class Clips:
    """Clips of equal shape, or single frames as clips of one frame.

    `moments` `b t 2c h w` (float16, mean and log-variance, unscaled), `context` `b n d` (float16), `fps` `b` (float32,
    of the clip as sampled), `positions` in the stream of samples and scene `keys`, one per clip. `arrays`: whatever
    else `MEMBERS` stores per frame, `b t ...`. `unreadable`: the clips that were replaced.
    """

    moments: Tensor
    context: Tensor
    fps: Tensor
    positions: list[int]
    keys: list[str]
    arrays: dict[str, Tensor] = field(default_factory=dict)
    unreadable: list[Unreadable] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self.map(Tensor.pin_memory)

    def outline(self) -> Self:
        """Everything except the numbers: enough to say which clips they were."""
        return self.map(lambda tensor: torch.empty(0))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return replace(
            self,
            moments=function(self.moments),
            context=function(self.context),
            fps=function(self.fps),
            arrays={name: function(array) for name, array in self.arrays.items()},
        )

    @classmethod
    def cat(cls, parts: Sequence[Clips]) -> Self:
        """Join clips. Raises `DatasetError` unless all have the same arrays: a set may have grown another array."""
        if len(found := {tuple(part.arrays) for part in parts}) > 1:
            names = " and ".join(", ".join(names) or "none" for names in sorted(found))
            raise DatasetError(
                f"expected the same arrays with every scene of the set, found {names}; prepare it into a fresh folder"
            )
        return cls(
            moments=_joined([part.moments for part in parts]),
            context=_joined([part.context for part in parts]),
            fps=_joined([part.fps for part in parts]),
            positions=[position for part in parts for position in part.positions],
            keys=[key for part in parts for key in part.keys],
            arrays={name: _joined([part.arrays[name] for part in parts]) for name in parts[0].arrays},
            unreadable=[clip for part in parts for clip in part.unreadable],
        )


@dataclass
class Batch(Clips):
    """What a training step gets: clips, and single frames beside them.

    A sample is a clip, or as many single frames as a clip has. There may be no clip: b is 0 then, and t still the
    frames of one. `stills`: `t` single frames for each of the other samples, `k*t 1 2c h w`, each with its own caption;
    None for none. Positions of stills differ from each other but may equal those of clips: random draws that are seeded
    by a position need another stream for them.
    """

    stills: Clips | None = None

    def __len__(self) -> int:
        """Samples: clips and groups of stills."""
        num_stills = 0 if self.stills is None else len(self.stills)
        return len(self.positions) + num_stills // self.moments.shape[1]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return replace(super().map(function), stills=self.stills and self.stills.map(function))

    def all_unreadable(self) -> list[Unreadable]:
        """Those of clips and of single frames."""
        return [*self.unreadable, *(self.stills.unreadable if self.stills is not None else [])]

    @classmethod
    def cat(cls, parts: Sequence[Clips]) -> Self:
        stills = [part.stills for part in parts if getattr(part, "stills", None) is not None]
        return replace(super().cat(parts), stills=Clips.cat(stills) if stills else None)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Joined along the first axis by one thread: torch's several wait for each other while other threads read."""
    if tensors[0].device.type != "cpu":
        return torch.cat(list(tensors))
    return torch.from_numpy(np.concatenate([tensor.numpy() for tensor in tensors]))


@dataclass(frozen=True)
class SceneRange:
    """Frames `start` to `stop` (not included) of the scene `number` of a set.

    It holds no entry: of a million scenes, only those that are read are parsed.
    """

    scenes: Sequence[SceneEntry]
    number: int
    start: int
    stop: int

    @classmethod
    def whole(cls, scenes: Sequence[SceneEntry]) -> list[SceneRange]:
        """Every scene of a set from its first to its last frame."""
        return [cls(scenes, number, 0, int(length)) for number, length in enumerate(lengths_of(scenes))]

    @property
    def scene(self) -> SceneEntry:
        return self.scenes[self.number]

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

    Scenes too short for every stride are left out. A scene is held out by the hash of its key: new footage
    never moves an old scene to the other side. Where no scene held out is long enough for some stride (or none is held
    out: few scenes), the last frames of the longest training scene are held out too, if enough remain to train on.
    """
    parts = [part for part in SceneRange.whole(scenes) if part.num_frames >= min(reaches)]
    keys = keys_of(scenes)
    held_out = [part for part in parts if _hash_share(keys[part.number]) < val_share]
    training = [part for part in parts if _hash_share(keys[part.number]) >= val_share]
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


log = logging.getLogger(__name__)
FIRST_PAUSE = 0.1  # seconds before the first time that something is read again; twice as long before each other
MOST_TRIED = 10  # clips, at one position


@dataclass(frozen=True)
class ClipWindow:
    """Which clip: every `stride`-th frame of a scene from `start`, `frames` of them, and which of the scene's captions;
    None: the empty one."""

    part: SceneRange
    start: int
    frames: int
    stride: int
    caption: int | None

    def about(self) -> dict[str, Any]:
        """Source, frames, caption, scene and shard; frames are counted in the source, at the prepared frame rate."""
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


def read_window(prepared: PreparedSet, window: ClipWindow, position: int) -> Batch:
    """A `Batch` of one clip."""
    scene, number = window.part.scene, window.caption
    context = prepared.empty_context.copy() if number is None else prepared.read_caption(scene, number).copy()
    arrays = {
        name: torch.from_numpy(prepared.read_frames(scene, name, window.start, window.frames, window.stride))[None]
        for name in ("latents", *scene.arrays)
    }
    return Batch(
        moments=arrays.pop("latents"),
        context=torch.from_numpy(context)[None],
        fps=torch.tensor([scene.fps / window.stride], dtype=torch.float32),
        positions=[position],
        keys=[scene.key],
        arrays=arrays,
    )


def read_or_replace(
    prepared: PreparedSet, window_of: Callable[[int], ClipWindow], position: int, retries: int
) -> Batch:
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


def _read_again(prepared: PreparedSet, window: ClipWindow, position: int, retries: int) -> Batch:
    for number in range(retries):
        try:
            return read_window(prepared, window, position)
        except (OSError, DatasetError) as error:
            log.debug("position %d is read again: %s", position, error)
            time.sleep(FIRST_PAUSE * 2**number)
    return read_window(prepared, window, position)
