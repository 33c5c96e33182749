"""Everything that can stand in the drawn world, and its pictures in all sizes, drawn once and kept."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ldm.data.world_buildings import BOXES, CARS, WALLS
from ldm.data.world_objects import OBJECTS
from ldm.data.world_plants import PLANTS
from ldm.data.world_sketch import Painter, Sketch, rgb

BILLBOARDS: dict[str, tuple[Painter, float]] = {**PLANTS, **OBJECTS, **CARS}  # what faces the camera
NUM_VARIANTS = 4
STEPS = 3  # sizes of a picture to every halving


@lru_cache(maxsize=1024)
def levels_of(kind: str, colours: tuple[str, str], variant: int, resolution: int) -> tuple[np.ndarray, ...]:
    """The picture of a thing, float32 `4 h w` in 0..255, premultiplied, and smaller ones, each in an empty border.

    Kinds of boxes are asked for as "house front" and "house side".
    """
    painter, aspect = _painter_of(kind)
    rng = np.random.default_rng([variant, *kind.encode()])
    sketch = Sketch(rng, resolution // 2 if kind in WALLS else resolution, aspect)  # walls are long and plain
    painter(sketch, *map(rgb, colours))
    _, height, width = sketch.picture.shape
    shares = 2.0 ** -(np.arange(STEPS * int(np.log2(height))) / STEPS)
    levels = []
    for share in shares[np.maximum(shares * min(height, width), 1.5) > 1.5]:
        rows, columns = _shrinking(height, round(height * share)), _shrinking(width, round(width * share))
        levels.append(np.pad(rows @ sketch.picture @ columns.T, ((0, 0), (1, 1), (1, 1))))
    return tuple(levels)


def _shrinking(before: int, after: int) -> np.ndarray:
    """The matrix `after before` that makes a row of pixels shorter: every new one is the mean of what it covers."""
    edges = np.linspace(0, before, after + 1)
    starts = np.arange(before)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return (np.maximum(overlap, 0) * (after / before)).astype(np.float32)


def _painter_of(kind: str) -> tuple[Painter, float]:
    if kind in BILLBOARDS:
        return BILLBOARDS[kind]
    if kind in WALLS:
        return WALLS[kind][0], WALLS[kind][2] / WALLS[kind][1]
    name, _, face = kind.rpartition(" ")
    front, front_aspect, side, side_aspect = BOXES[name]
    return (front, front_aspect) if face == "front" else (side, side_aspect)
