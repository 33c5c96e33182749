"""Measures of motion: does a clip move as a drive moves? And control clips, which each measure must tell from a drive.

Each measure is one number with its formula, its range and what it cannot see; all are in `MEASURES`. None is worth much
alone (a zoom into a photograph expands like a drive, a frozen clip never flickers) or on a single clip: compare means
over many clips with those of true clips and of their controls. Reversed, all expansion must change its sign; frozen, it
must vanish; shuffled, smoothness must fall; a zoom into a still has expansion without parallax. A clip without texture
has a reason instead of a number.

Notation: F flow from one frame to the next in pixels at the working size (`flow.py`), S the same without camera
rotation, e the focus of expansion, (dx, dy) = d a pixel relative to e (dy down), r = d / |d|, h and w height and width,
tau = 0.25 px. Only textured pixels count.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

from ldm.evaluation.flow import TAU, Motion, lengths, measure_motion, positions

MIN_TEXTURE = 0.002  # of the picture: textured share that a region needs
MIN_TEXTURE_ANYWHERE = 0.005  # of the picture: textured share that a clip needs
NO_TEXTURE = "the picture is black, constant or has too little texture to show motion"
MOVING_SHARE = 0.02  # of the textured pixels: a pair in which fewer move is frozen
BRIGHTNESS_BLUR = 4.0  # pixels; flicker is measured in patches of about this size
STRIPS = (0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3)  # of the height, below the focus
MIN_OVERLAP = 0.25  # of the picture: share that motion compensation must keep inside


class NotMeasurableError(Exception):
    """The clip lacks what the measure needs; the message names it."""


@dataclass(frozen=True)
class Reading:
    """One measure of one clip: a number, or None and the reason."""

    value: float | None
    reason: str = ""


@dataclass(frozen=True)
class Measure:
    """A measure and its description.

    better: +1 if true clips score high, -1 low, 0 neither. places: decimals worth printing.
    """

    title: str
    formula: str
    scale: str
    blind_to: str
    better: int
    places: int


@dataclass(frozen=True)
class MotionMeasure(Measure):
    """A measure of a clip's motion alone."""

    compute: Callable[[Motion], float]


def read_measures(motion: Motion) -> dict[str, Reading]:
    """All measures of a clip by their names in `MEASURES`; of a clip without texture none has a value."""
    if not has_texture(motion):
        return dict.fromkeys(MEASURES, Reading(None, NO_TEXTURE))
    readings = {}
    for name, measure in MEASURES.items():
        try:
            readings[name] = Reading(measure.compute(motion))
        except NotMeasurableError as reason:
            readings[name] = Reading(None, str(reason))
    return readings


def has_texture(motion: Motion) -> bool:
    """Whether the clip has enough texture to be measured."""
    return bool(motion.textured.mean() >= MIN_TEXTURE_ANYWHERE)


def sides_region(motion: Motion) -> np.ndarray:
    """The roadside given the focus, `h w` bool: beside the road, from well above the horizon to below it."""
    height, width = motion.grey.shape[1:]
    dx, dy = np.moveaxis(motion.offset, -1, 0)
    beside = (abs(dx) > 2.6 * np.maximum(dy, 0)) & (abs(dx) > 0.12 * width)
    return beside & (dy > -0.35 * height) & (dy < 0.12 * height)


def road_region(motion: Motion) -> np.ndarray:
    """The road given the focus, `h w` bool: a cone below it."""
    dx, dy = np.moveaxis(motion.offset, -1, 0)
    return (dy > 0.06 * motion.grey.shape[1]) & (abs(dx) < 1.2 * dy)


def ground_region(motion: Motion) -> np.ndarray:
    """Road and verge, `h w` bool, without what is too near for flow to follow."""
    height = motion.grey.shape[1]
    dx, dy = np.moveaxis(motion.offset, -1, 0)
    return (dy > 0.06 * height) & (dy < 0.3 * height) & (abs(dx) < 2.6 * dy)


def roadside_expansion(motion: Motion) -> float:
    """The share of the roadside's motion that points outward."""
    return _expansion(motion, sides_region(motion), "at the roadside")


def road_expansion(motion: Motion) -> float:
    """The share of the road's motion that points towards the camera."""
    return _expansion(motion, road_region(motion), "on the road")


def _expansion(motion: Motion, region: np.ndarray, where: str) -> float:
    """Mean over pairs of the mean of outward / (length + tau) over the region's texture."""
    pairs = [
        (outward[seen] / (lengths(stream[seen]) + TAU)).mean()
        for outward, stream, seen in zip(motion.outward, motion.stream, motion.textured & region, strict=True)
        if seen.mean() >= MIN_TEXTURE
    ]
    if 2 * len(pairs) < len(motion.flow):
        raise NotMeasurableError(f"too little texture {where} in more than half of the frames")
    return float(np.mean(pairs))


def smoothness(motion: Motion) -> float:
    """How much of the motion continues from one pair of frames to the next."""
    if len(motion.flow) < 2:
        raise NotMeasurableError("smoothness needs 3 frames, the clip has 2")
    pixels = positions(motion.grey.shape[1:])
    scores = []
    for now, then, seen in zip(motion.flow[:-1], motion.flow[1:], motion.textured[:-1], strict=True):
        arrived = pixels + now
        inside = seen & _inside(arrived)
        if inside.mean() < MIN_TEXTURE:
            continue
        later = cv2.remap(then, arrived[..., 0], arrived[..., 1], cv2.INTER_LINEAR)[inside]
        both = lengths(now[inside]) + lengths(later)
        scores.append(((both - lengths(later - now[inside])) / (both + 2 * TAU)).mean())
    if not scores:
        raise NotMeasurableError("nothing textured stays inside the picture for three frames")
    return float(np.mean(scores))


def parallax_order(motion: Motion) -> float:
    """How much faster the near ground grows than objects at the horizon beside the road."""
    height, width = motion.grey.shape[1:]
    dy = motion.offset[..., 1]
    near = motion.textured & ground_region(motion) & (dy > 0.08 * height)
    far = motion.textured & sides_region(motion) & (dy < 0.04 * height)
    if min(near.mean(), far.mean()) < MIN_TEXTURE:
        raise NotMeasurableError("too little texture on the ground or at the horizon to compare the two")
    growth = motion.outward / motion.distance
    near_growth, far_growth = float(np.median(growth[near])), float(np.median(growth[far]))
    return (near_growth - far_growth) / (abs(near_growth) + abs(far_growth) + 4 * TAU / width)


def speed(motion: Motion) -> float:
    """How fast the ground approaches, per frame.

    The fastest of several strips counts: flow loses near ground, which moves too far, and blurs far ground, which moves
    little; both read too slow.
    """
    height = motion.grey.shape[1]
    dy = motion.offset[..., 1]
    seen = motion.textured & ground_region(motion)
    if seen.mean() < MIN_TEXTURE:
        raise NotMeasurableError("too little texture on the road and its verge")
    approach = motion.outward / (motion.distance * np.maximum(dy, 1)) * height
    strips = [seen & (dy >= top * height) & (dy < bottom * height) for top, bottom in pairwise(STRIPS)]
    medians = [float(np.median(approach[strip])) for strip in strips if strip.mean() >= MIN_TEXTURE / len(strips)]
    return max(medians, key=abs)


def frozen_share(motion: Motion) -> float:
    """The share of frame pairs in which nothing moves."""
    return float(np.mean(moving_shares(motion) < MOVING_SHARE))


def moving_shares(motion: Motion) -> np.ndarray:
    """Share of textured pixels that move by more than tau, for each pair, `p`."""
    moving = (lengths(motion.flow) > TAU) & motion.textured
    return moving.sum(axis=(1, 2)) / np.maximum(motion.textured.sum(axis=(1, 2)), 1)


def flicker(motion: Motion) -> float:
    """Change of brightness of patches that are followed along their motion."""
    pixels = positions(motion.grey.shape[1:])
    changes = []
    for now, then, flow in zip(motion.grey[:-1], motion.grey[1:], motion.flow, strict=True):
        arrived = pixels + flow
        inside = _inside(arrived).astype(np.float32)
        share = cv2.GaussianBlur(inside, (0, 0), BRIGHTNESS_BLUR)
        followed = cv2.remap(then, arrived[..., 0], arrived[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        change = (followed.astype(np.float32) - now) * inside
        patches = cv2.GaussianBlur(change, (0, 0), BRIGHTNESS_BLUR)[inside > 0] / share[inside > 0]
        if inside.mean() >= MIN_OVERLAP:
            changes.append(abs(patches).mean() / 255)
    if not changes:
        raise NotMeasurableError("no two consecutive frames overlap")
    return float(np.mean(changes))


def _inside(pixels: np.ndarray) -> np.ndarray:
    """Which positions `h w 2` (x, y) lie inside the picture, `h w` bool."""
    height, width = pixels.shape[:2]
    return (pixels >= 0).all(axis=-1) & (pixels[..., 0] <= width - 1) & (pixels[..., 1] <= height - 1)


MEASURES = {
    "roadside_expansion": MotionMeasure(
        "roadside expansion",
        "mean of (S . r) / (|S| + tau) over |dx| > 2.6 max(dy, 0), |dx| > 0.12 w, -0.35 h < dy < 0.12 h",
        "-1 to 1: +1 the roadside streams outward, 0 it stands still or moves in all directions, -1 driving backwards",
        "speed; whether near objects move faster than far ones (a zoom into a still scores high); the road",
        1,
        2,
        roadside_expansion,
    ),
    "road_expansion": MotionMeasure(
        "road expansion",
        "mean of (S . r) / (|S| + tau) over dy > 0.06 h, |dx| < 1.2 dy",
        "-1 to 1, as above",
        "the same, and the roadside; a plain road without marks has no value",
        1,
        2,
        road_expansion,
    ),
    "smoothness": MotionMeasure(
        "motion smoothness",
        "mean of (|a| + |b| - |a - b|) / (|a| + |b| + 2 tau), a = F at a pixel, b = the next pair's F where it went",
        "0 to 1: 1 all motion continues, 0 none does or nothing moves",
        "direction: a reversed drive is as smooth; camera shake lowers true footage too",
        1,
        2,
        smoothness,
    ),
    "parallax_order": MotionMeasure(
        "parallax order",
        "(n - f) / (|n| + |f| + 4 tau / w), the medians of (S . r) / |d| on the near ground, 0.08 h < dy < 0.3 h, "
        "|dx| < 2.6 dy, and beside the road at the horizon and above, dy < 0.04 h",
        "-1 to 1: above 0 near grows faster than far, 0 a zoomed or frozen still, below 0 driving backwards",
        "order among the near or among the far; noisy for one clip, plain roads and shuffled frames: average",
        1,
        2,
        parallax_order,
    ),
    "frozen_share": MotionMeasure(
        "frozen share",
        "share of the frame pairs in which fewer than 2% of the textured pixels move by more than tau",
        "0 to 1: 0 every frame moves, 1 a still",
        "the cause: a car waiting at a light is frozen too; motion in a part of the picture counts as motion",
        -1,
        2,
        frozen_share,
    ),
    "flicker": MotionMeasure(
        "brightness flicker",
        "mean of |blurred (next frame fetched along F - frame)| / 255, blur of 4 px, where F stays inside",
        "0 to 1: 0 every patch keeps its brightness; true clips have some, where objects appear",
        "changes of colour alone and of texture finer than the blur; a frozen clip scores best",
        -1,
        3,
        flicker,
    ),
    "speed": MotionMeasure(
        "ground speed",
        "h times the median of (S . r) / (|d| dy), the fastest of seven strips of 0.06 h < dy < 0.3 h, |dx| < 2.6 dy",
        "camera heights travelled per frame, times picture height over focal length; negative backwards",
        "metres: camera height and lens are unknown, so only clips of one camera compare",
        0,
        2,
        speed,
    ),
}


ZOOM_LIMITS = (0.01, 0.15)  # per frame


def reversed_clip(frames: np.ndarray) -> np.ndarray:
    """The clip played backwards."""
    return frames[::-1].copy()


def frozen_clip(frames: np.ndarray) -> np.ndarray:
    """The first frame, repeated."""
    return np.repeat(frames[:1], len(frames), axis=0)


def shuffled_clip(frames: np.ndarray) -> np.ndarray:
    """The frames in a random order, the same for the same clip; with 3 frames or more neither in order nor reversed."""
    order = np.arange(len(frames))
    rng = np.random.default_rng(zlib.crc32(frames.tobytes()))
    while len(frames) > 2 and abs(np.diff(order)).max() == 1:
        order = rng.permutation(len(frames))
    return frames[order]


def zoomed_still(frames: np.ndarray, motion: Motion | None = None) -> np.ndarray:
    """A zoom into the first frame at the clip's focus of expansion, as fast as its picture grows on average.

    motion: of the clip; None: measured here.
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


CONTROLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "reversed": reversed_clip,
    "frozen": frozen_clip,
    "shuffled": shuffled_clip,
    "zoomed still": zoomed_still,
}
