"""Motion of the picture: dense optical flow, its reliable region, camera rotation and the focus of expansion.

A camera that drives ahead makes everything stream away from one point, the focus of expansion; a camera that rotates
moves the whole picture, near and far alike. The far band around the focus shows rotation alone, which is subtracted;
the focus is then fitted to the directions of the remaining flow. Directions, not lengths or signs: a reversed clip has
the same focus.

All lengths are pixels at one working size, 256 on the longer side, whatever the size of the clip. `t` frames make
`p` = t - 1 pairs; flow is `p h w 2`, (x right, y down), from one frame to the next.
Flow: Kroeger et al. 2016, "Fast Optical Flow using Dense Inverse Search".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise

import cv2
import numpy as np

from ldm.errors import UserError

WORKING_SIDE, NARROWEST_SIDE = 256, 16
TAU = 0.25  # pixels; smaller motion counts as none
MIN_CORNER = 0.7  # grey levels per pixel: least value of the weaker of both gradients
PRIOR_FOCUS = (0.5, 0.45)  # of width and height: the usual view of a camera on a car
PRIOR_SPREAD = 0.25  # of the width
PRIOR_WEIGHT = 0.01  # of the weight of all measured directions
FOCUS_LIMITS = ((0.15, 0.2), (0.85, 0.8))  # of width and height
MIN_DIRECTIONS, MAX_DIRECTIONS = 50, 4000  # pixels that a fit needs, and that it uses
ANGLE_SCALE = 0.15  # sine of the angle beyond which a direction is an outlier
BAND = (0.2, 0.06)  # of width and height: half the far band around the focus
MAX_BAND = 1000  # pixels of it that a fit uses


@dataclass(frozen=True)
class Motion:
    """The motion of one clip at the working size."""

    grey: np.ndarray  # `t h w` uint8
    flow: np.ndarray  # `p h w 2` float32
    textured: np.ndarray  # `p h w` bool: where the flow is reliable
    rotation: np.ndarray  # `p 2`: the flow that camera rotation adds everywhere
    focus: np.ndarray  # `2`: x, y of the focus of expansion

    @cached_property
    def stream(self) -> np.ndarray:
        """The flow without camera rotation, `p h w 2`."""
        return self.flow - self.rotation[:, None, None].astype(np.float32)

    @cached_property
    def offset(self) -> np.ndarray:
        """Each pixel relative to the focus, `h w 2`."""
        return positions(self.grey.shape[1:]) - self.focus.astype(np.float32)

    @cached_property
    def distance(self) -> np.ndarray:
        """Distance of each pixel from the focus, `h w`, at least 1."""
        return np.maximum(lengths(self.offset), 1)

    @cached_property
    def outward(self) -> np.ndarray:
        """The component of the stream away from the focus, `p h w`; negative towards it."""
        along = self.stream[..., 0] * self.offset[..., 0] + self.stream[..., 1] * self.offset[..., 1]
        return along / self.distance


def measure_motion(frames: np.ndarray, flow: np.ndarray | None = None) -> Motion:
    """Frames uint8 RGB `t h w 3`, two or more -> their motion.

    flow: the true flow `p h w 2` in pixels of the frames; None: measured. Raises UserError for a single frame and for a
    narrow strip.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"expected uint8 frames `t h w 3`, found {frames.dtype} {list(frames.shape)}")
    if len(frames) < 2:
        raise UserError(f"expected a clip of at least 2 frames, found {len(frames)}; nothing moves in a picture")
    if min(working_size(*frames.shape[1:3])) < NARROWEST_SIDE:
        height, width = frames.shape[1:3]
        raise UserError(
            f"expected clips at most {WORKING_SIDE // NARROWEST_SIDE} times as long as narrow, found {width}x{height} "
            "pixels; flow cannot be measured on a strip"
        )
    grey = working_grey(frames)
    flow = dense_flow(grey) if flow is None else working_flow(flow)
    textured = np.stack([find_texture(picture) for picture in grey[:-1]])
    focus = focus_of_expansion(flow, textured)
    for _ in range(2):  # each needs the other; ambiguous flow counts as expansion
        rotation = np.stack([camera_rotation(*pair, focus) for pair in zip(flow, textured, strict=True)])
        focus = focus_of_expansion(flow - rotation[:, None, None], textured, focus)
    return Motion(grey, flow, textured, rotation, focus)


def working_size(height: int, width: int) -> tuple[int, int]:
    """Height and width -> the same scaled to 256 pixels on the longer side."""
    scale = WORKING_SIDE / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def working_grey(frames: np.ndarray) -> np.ndarray:
    """Frames uint8 RGB `t h w 3` of any size -> grey, `t h w` uint8 at the working size."""
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
    return np.stack([_resize(picture) for picture in grey])


def working_flow(flow: np.ndarray) -> np.ndarray:
    """Flow `p h w 2` in pixels of any size -> at the working size and in its pixels."""
    height, width = flow.shape[1:3]
    new_height, new_width = working_size(height, width)
    scale = np.array([new_width / width, new_height / height], np.float32)
    return np.stack([_resize(pair.astype(np.float32)) for pair in flow]) * scale


def _resize(picture: np.ndarray) -> np.ndarray:
    height, width = working_size(*picture.shape[:2])
    if picture.shape[:2] == (height, width):
        return picture
    method = cv2.INTER_AREA if width < picture.shape[1] else cv2.INTER_LINEAR
    return cv2.resize(picture, (width, height), interpolation=method)


@cache
def _finder() -> cv2.DISOpticalFlow:
    return cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)


def dense_flow(grey: np.ndarray) -> np.ndarray:
    """Grey pictures `t h w` uint8 -> flow `p h w 2` float32."""
    return np.stack([_finder().calc(a, b, None) for a, b in pairwise(grey)])


def find_texture(grey: np.ndarray) -> np.ndarray:
    """Where a picture `h w` changes in both directions -> `h w` bool.

    By the smaller eigenvalue of the structure tensor (Shi and Tomasi 1994): along a straight edge or on a plain surface
    motion is ambiguous.
    """
    smooth = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 1.0)
    across, down = (cv2.Sobel(smooth, cv2.CV_32F, *order, ksize=3) / 8 for order in ((1, 0), (0, 1)))
    xx, yy, xy = (cv2.GaussianBlur(part, (0, 0), 2.5) for part in (across**2, down**2, across * down))
    smaller = (xx + yy) / 2 - np.sqrt(((xx - yy) / 2) ** 2 + xy**2)
    return smaller > MIN_CORNER**2


def camera_rotation(flow: np.ndarray, textured: np.ndarray, focus: np.ndarray) -> np.ndarray:
    """The flow that camera rotation adds to one pair's flow `h w 2` -> `2`, zero if it is not identifiable.

    In the far band around the focus, flow is fitted as rotation + growth d by least absolute deviations, with d a pixel
    relative to the focus and separate growth left and right of it. The rotation counts only if it is larger than the
    median residual. Rotation is modelled as a shift of the picture, which is exact near the focus and 20 to 30% too
    small at the edges of a wide picture.
    """
    height, width = textured.shape
    offset = positions(textured.shape) - focus.astype(np.float32)
    band = np.flatnonzero(textured & (abs(offset[..., 0]) < BAND[0] * width) & (abs(offset[..., 1]) < BAND[1] * height))
    chosen = _thin_out(band, MAX_BAND)
    point, moved = offset.reshape(-1, 2)[chosen].astype(float), flow.reshape(-1, 2)[chosen].astype(float)
    is_left = point[:, :1] < 0
    if min(is_left.sum(), (~is_left).sum()) < MIN_DIRECTIONS:
        return np.zeros(2)
    ones = np.tile(np.eye(2), (len(point), 1))
    terms = np.concatenate([ones, (point * is_left).reshape(-1, 1), (point * ~is_left).reshape(-1, 1)], axis=1)
    near_focus = 1 / (lengths(point) + 0.05 * width)
    weight = near_focus
    for _ in range(15):
        weighted = terms * np.repeat(weight, 2)[:, None]
        matrix = weighted.T @ terms
        fit = np.linalg.solve(matrix + 1e-9 * np.trace(matrix) * np.eye(4), weighted.T @ moved.reshape(-1))
        left_over = lengths(moved - (terms @ fit).reshape(-1, 2))
        weight = near_focus / np.maximum(left_over, 0.1)
    rotation = fit[:2]
    return rotation if np.median(left_over) < np.linalg.norm(rotation) else np.zeros(2)


def focus_of_expansion(stream: np.ndarray, textured: np.ndarray, guess: np.ndarray | None = None) -> np.ndarray:
    """The point from or towards which the stream `p h w 2` leads -> `2`, x and y; the prior if little moves.

    Reweighted least squares over the angles between each pixel's direction and its line to the point: outliers
    (Geman-McClure) and short vectors count little, and a weak Gaussian prior decides ambiguous cases.
    guess: the start; None: the prior.
    """
    size = np.array(textured.shape[:0:-1])
    prior = np.array(PRIOR_FOCUS) * size
    length = lengths(stream)
    chosen = np.flatnonzero(textured & (length > TAU))
    if len(chosen) < MIN_DIRECTIONS:
        return prior
    chosen = _thin_out(chosen, MAX_DIRECTIONS)
    point = positions(textured.shape[1:]).reshape(-1, 2)[chosen % textured[0].size].astype(float)
    direction = stream.reshape(-1, 2)[chosen] / length.reshape(-1)[chosen, None]
    normal = np.stack([-direction[:, 1], direction[:, 0]], axis=-1)
    at_normal = (normal * point).sum(axis=1)
    trust = length.reshape(-1)[chosen] / (length.reshape(-1)[chosen] + 1)
    pull = PRIOR_WEIGHT * trust.sum() / (PRIOR_SPREAD * size[0]) ** 2
    focus = prior if guess is None else guess
    for _ in range(20):
        distance = lengths(point - focus) + 0.03 * size[0]  # angles are unstable near the focus
        sine = (at_normal - normal @ focus) / distance
        weight = trust / (1 + (sine / ANGLE_SCALE) ** 2) ** 2 / distance**2
        matrix = (normal * weight[:, None]).T @ normal + pull * np.eye(2)
        vector = (normal * weight[:, None]).T @ at_normal + pull * prior
        moved = np.clip(np.linalg.solve(matrix, vector), *(np.array(limit) * size for limit in FOCUS_LIMITS))
        step, focus = np.linalg.norm(moved - focus), moved
        if step < 0.05:
            break
    return focus


def _thin_out(chosen: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the chosen pixels, evenly spread."""
    return chosen[np.linspace(0, len(chosen) - 1, min(len(chosen), most)).astype(int)]


def endpoint_error(flow: np.ndarray, true_flow: np.ndarray, where: np.ndarray) -> float:
    """Mean distance in pixels between two flows `p h w 2` over the pixels `where` (`p h w` bool, not all false)."""
    return float(lengths(flow - true_flow)[where].mean())


def lengths(vectors: np.ndarray) -> np.ndarray:
    """Vectors `... 2` -> their lengths `...`; much faster than a norm over the short axis."""
    return np.sqrt(np.square(vectors[..., 0]) + np.square(vectors[..., 1]))


def positions(size: tuple[int, ...]) -> np.ndarray:
    """x and y of every pixel of a picture of (height, width), `h w 2` float32."""
    height, width = size
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)
