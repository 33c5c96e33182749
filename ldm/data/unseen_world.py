"""Scenes of the drawn world that nothing is trained on: what prompts are taken from, and true clips to hold beside."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm.config import nearest
from ldm.data.drive_world import LOOKS, MOVING_LOOKS, STILL_LOOKS, WorldClip, draw_clip
from ldm.errors import UserError

FIRST_SEED = 2**41  # beyond all that is trained on and held out from it
GROUPS = {"all": LOOKS, "moving": MOVING_LOOKS, "still": STILL_LOOKS}


@dataclass(frozen=True)
class UnseenScene:
    """One look and the seed of its road, things and weather."""

    look: str
    seed: int

    def draw(self, num_frames: int, size: tuple[int, int], fps: float, truth: bool = False) -> WorldClip:
        """The scene's clip, size (h, w), at one of the usual speeds; raises UserError for what cannot be drawn."""
        return draw_clip(self.look, self.seed, num_frames, size, fps, truth=truth)

    def caption_of(self, clip: WorldClip) -> str:
        """One of the clip's captions, always the same."""
        return clip.captions[np.random.default_rng((self.seed, 1)).integers(len(clip.captions))]


def choose_looks(text: str) -> tuple[str, ...]:
    """The looks that `--looks` names: all, moving or still ones, or names with commas between; raises UserError.

    Moving are those that the experiment shows in motion in training, still those it does not.
    """
    if text in GROUPS:
        return GROUPS[text]
    looks = tuple(dict.fromkeys(" ".join(word.split()) for word in text.split(",")))
    for look in looks:
        if look not in LOOKS:
            known = (*GROUPS, *LOOKS)
            raise UserError(f"--looks: expected {', '.join(GROUPS)} or looks, found {look!r}; {nearest(look, known)}")
    return looks


def unseen_scenes(looks: tuple[str, ...], num: int, first: int = 0) -> list[UnseenScene]:
    """Scenes number `first` and following, the looks in turn."""
    return [UnseenScene(looks[number % len(looks)], FIRST_SEED + first + number) for number in range(num)]
