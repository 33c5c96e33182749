"""Single frames in place of some clips, so that a video run goes on learning from images, also of other footage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ldm.data.batch import Batch, SceneRange
from ldm.data.clip_reading import Window, drawn_caption, read_or_replace
from ldm.data.shards import DatasetError, PreparedSet

SHARE_STREAM, STILL_STREAM, REPLACING_STREAM = 3, 4, 6  # of random draws; (seed, position) alone is the clips'


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
        return no_clips(stills[0], self.frames, Batch.cat(stills))

    def window(self, place: int, attempt: int = 0) -> Window:
        """The frame at `place`, position times `frames` and its number; or what is tried in the stead of that."""
        if attempt > 0:
            random = np.random.default_rng((self.seed, place, REPLACING_STREAM, attempt))
            return self._drawn(self.parts[int(random.integers(len(self.parts)))], random)
        position, number = divmod(place, self.frames)
        random = np.random.default_rng((self.seed, position, STILL_STREAM))
        chosen = random.choice(len(self.parts), self.frames, replace=len(self.parts) < self.frames).tolist()
        return [self._drawn(self.parts[index], random) for index in chosen[: number + 1]][-1]

    def _drawn(self, part: SceneRange, random: np.random.Generator) -> Window:
        frame = part.start + int(random.integers(part.num_frames))
        return Window(part, frame, 1, 1, drawn_caption(part, self.caption_dropout, random))


def no_clips(like: Batch, frames: int, stills: Batch) -> Batch:
    """A batch of stills and of no clips, which would be `frames` long and otherwise `like` this one."""
    moments = like.moments[:0].new_empty(0, frames, *like.moments.shape[2:])
    return replace(
        like, moments=moments, context=like.context[:0], fps=like.fps[:0], positions=[], keys=[], stills=stills
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
