"""What Frechet distances are taken between: features of frames and of clips, by our own judge of looks and from motion.

They are cheap, need no weights from elsewhere and know the drawn world; published figures are made with other
extractors (`extractor_i3d.py`), and no two extractors' distances compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ldm.evaluation.flow import Motion

GRID = 4  # cells across and down


class LooksAtFrames(Protocol):
    """What is needed of a judge (`judge.py`): it tells the looks of frames uint8 `t h w 3` and has features of them."""

    looks: tuple[str, ...]
    accuracy: float
    name: str

    def predict(self, frames: np.ndarray) -> np.ndarray:
        """Places in `looks`, `t`."""

    def features(self, frames: np.ndarray) -> np.ndarray:
        """One vector a frame, `t d` float32."""


@dataclass(frozen=True)
class Extractor:
    """Makes feature vectors `n d` of a clip's frames uint8 `t h w 3` and motion, and says how.

    places: decimals of a distance worth printing; shortest: frames that a clip must have.
    """

    title: str
    name: str
    formula: str
    blind_to: str
    places: int
    extract: Callable[[np.ndarray, Motion], np.ndarray]
    shortest: int = 2


def own_extractors(judge: LooksAtFrames) -> dict[str, Extractor]:
    """Those of frames and of clips by the judge."""
    return {
        "frechet_frames": Extractor(
            "frames",
            judge.name,
            "each frame's features, the judge's last layer before its answer",
            "all motion, and the order of frames: a clip played backwards is at 0 from itself",
            2,
            lambda frames, motion: judge.features(frames),
        ),
        "frechet_clips": Extractor(
            "clips",
            f"{judge.name}, over time",
            "of each clip the mean over frames of the judge's features, and beside it their root mean square change "
            "from one frame to the next",
            "the direction of time: a clip played backwards has the same features",
            2,
            lambda frames, motion: features_over_time(judge.features(frames)),
        ),
    }


MOTION_ON_A_GRID = Extractor(
    "motion",
    f"flow on a grid of {GRID} by {GRID}",
    "of each clip the mean and the standard deviation over time of the flow F in each cell, in pixels, over its "
    "texture (0 in a cell without any)",
    "what the clip shows; how things move within a cell",
    0,
    lambda frames, motion: flow_on_a_grid(motion),
)


def features_over_time(features: np.ndarray) -> np.ndarray:
    """Features of a clip's frames `t d` -> `1 2d`: their mean, and their root mean square change between frames."""
    change = np.sqrt((np.diff(features, axis=0) ** 2).mean(axis=0))
    return np.concatenate([features.mean(axis=0), change])[None]


def flow_on_a_grid(motion: Motion) -> np.ndarray:
    """Motion of `p` pairs of frames -> `1 (2 cells 2)`: the flow's mean and standard deviation over time, by cells."""
    seen = motion.textured[..., None].astype(np.float32)
    flows, counts = (_sum_cells(part) for part in (motion.flow * seen, seen))
    cells = flows / np.maximum(counts, 1)
    return np.concatenate([cells.mean(axis=0).ravel(), cells.std(axis=0).ravel()])[None]


def _sum_cells(values: np.ndarray) -> np.ndarray:
    """`p h w c` -> `p GRID GRID c`."""
    for axis, size in ((1, values.shape[1]), (2, values.shape[2])):
        values = np.add.reduceat(values, np.arange(GRID) * size // GRID, axis=axis)
    return values
