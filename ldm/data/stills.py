"""Single frames in place of some clips, so that a video run goes on learning from images, also of other footage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ldm.data.batch import Batch, SceneRange, draw_caption, read_clip
from ldm.data.shards import DatasetError, PreparedSet

SHARE_STREAM, STILL_STREAM = 3, 4  # of random draws; (seed, position) alone is the clips'


@dataclass
class StillFrames:
    """Samples of the training stream that are `frames` single frames, of as many scenes where there are enough.

    parts: what the frames are taken from, every part as often as any other.
    share: of the positions that are such samples.
    """

    prepared: PreparedSet
    parts: Sequence[SceneRange]
    frames: int
    share: float
    caption_dropout: float
    seed: int

    @property
    def num_samples(self) -> int:
        """As many samples as there are frames for, at least one."""
        return max(1, sum(part.num_frames for part in self.parts) // self.frames)

    def is_at(self, position: int) -> bool:
        """Whether the sample at this position is one of stills; depends on seed and position alone."""
        return np.random.default_rng((self.seed, position, SHARE_STREAM)).random() < self.share

    def __getitem__(self, position: int) -> Batch:
        """A `Batch` without clips; its stills have the positions `position * frames` and following."""
        random = np.random.default_rng((self.seed, position, STILL_STREAM))
        chosen = random.choice(len(self.parts), self.frames, replace=len(self.parts) < self.frames)
        stills = []
        for number, part in enumerate(self.parts[index] for index in chosen.tolist()):
            frame = part.start + int(random.integers(part.num_frames))
            context = draw_caption(self.prepared, part, self.caption_dropout, random)
            stills.append(read_clip(self.prepared, part, frame, 1, 1, context, position * self.frames + number))
        return no_clips(stills[0], self.frames, Batch.cat(stills))


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
