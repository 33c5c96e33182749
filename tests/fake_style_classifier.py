"""A style classifier without training, for tests: the mean colour of a frame decides, a thumbnail is its features."""

from __future__ import annotations

import cv2
import numpy as np

from ldm.data.world import draw_clip

LOOKS = ("snow", "night", "mars")
SIDE = 4


class FakeStyleClassifier:
    """The style with the nearest mean colour."""

    looks = LOOKS
    accuracy = 0.75
    name = "fake classifier"

    def __init__(self) -> None:
        self.colours = np.stack([draw_clip(look, 0, 1, 32, 8).frames.mean(axis=(0, 1, 2)) for look in LOOKS])

    def predict(self, frames: np.ndarray) -> np.ndarray:
        """Indices in `looks`, `t`."""
        colours = frames.mean(axis=(1, 2))
        return ((colours[:, None] - self.colours) ** 2).sum(axis=-1).argmin(axis=1)

    def features(self, frames: np.ndarray) -> np.ndarray:
        """One vector per frame, `t d`."""
        small = [cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for frame in frames]
        return np.stack(small).reshape(len(frames), -1).astype(np.float32) / 64
