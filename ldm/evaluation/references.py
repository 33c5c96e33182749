"""Clips that are spoilt on purpose, made from true ones: what each measure must tell apart from a drive.

A row of numbers says little without these beside it. Played backwards, all expansion must turn its sign; frozen, it
must vanish; shuffled, smoothness must fall; a zoom into a still has expansion without parallax. What a model that knows
single frames only makes of a prompt is one more such row, of clips like any others.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import cv2
import numpy as np

from ldm.evaluation.flow import Motion, measure_motion

ZOOM_LIMITS = (0.01, 0.15)  # from frame to frame


def reversed_clip(frames: np.ndarray) -> np.ndarray:
    """The clip from its end to its start."""
    return frames[::-1].copy()


def frozen_clip(frames: np.ndarray) -> np.ndarray:
    """The first frame all along."""
    return np.repeat(frames[:1], len(frames), axis=0)


def shuffled_clip(frames: np.ndarray) -> np.ndarray:
    """The frames in an order drawn by chance, the same for the same clip; never in order or reversed from 3 on."""
    order = np.arange(len(frames))
    rng = np.random.default_rng(zlib.crc32(frames.tobytes()))
    while len(frames) > 2 and abs(np.diff(order)).max() == 1:
        order = rng.permutation(len(frames))
    return frames[order]


def zoomed_still(frames: np.ndarray, motion: Motion | None = None) -> np.ndarray:
    """A zoom into the first frame at the clip's own focus, as fast as its picture grows on the whole.

    `motion` is that of the clip, measured anew when None.
    """
    motion = motion or measure_motion(frames)
    height, width = frames.shape[1:3]
    grown = (motion.outward / motion.distance)[motion.textured]
    rate = float(np.clip(np.median(grown) if grown.size else 0, *ZOOM_LIMITS))
    x, y = motion.focus / motion.grey.shape[:0:-1] * (width, height)
    stills = [frames[0]]
    for number in range(1, len(frames)):
        grow = (1 + rate) ** number
        matrix = np.array([[grow, 0, x * (1 - grow)], [0, grow, y * (1 - grow)]])
        stills.append(cv2.warpAffine(frames[0], matrix, (width, height), flags=cv2.INTER_CUBIC))
    return np.stack(stills)


REFERENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "reversed": reversed_clip,
    "frozen": frozen_clip,
    "shuffled": shuffled_clip,
    "zoomed still": zoomed_still,
}
