"""All kinds of things of the procedural world, and the cache of their pictures in all sizes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ldm.data.world.objects import OBJECTS
from ldm.data.world.plants import PLANTS
from ldm.data.world.sketch import Painter, Sketch, glow, rgb


def _car_rear(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    """Seen from behind; the second colour is that of its lights."""
    _car_body(s, main)
    for x in (-0.42, 0.42):
        s.paint(s.box(x - 0.1, 0.42, x + 0.1, 0.52), second, 1.1)
    s.paint(s.box(-0.16, 0.3, 0.16, 0.4), "#e8e4c8")


def _car_front(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    _car_body(s, main)
    s.paint(s.box(-0.25, 0.3, 0.25, 0.44), "#202228", 1 + 0.3 * np.sign(np.sin(s.y * 120)))
    for x in (-0.42, 0.42):
        s.paint(s.disc(x, 0.44, 0.085), second, 1.2)


def _car_body(s: Sketch, main: np.ndarray) -> None:
    s.paint(s.disc(0, 0.02, 0.66, 0.12), "#08080a", 1, 0.6)
    for x in (-0.43, 0.43):
        s.paint(s.box(x - 0.1, 0, x + 0.1, 0.3), "#16161a")
    cabin = np.maximum(np.abs(s.x) - 0.52 + 0.32 * (s.y - 0.5), np.maximum(0.5 - s.y, s.y - 0.95))
    s.paint(cabin, main, 0.92)
    s.paint(cabin + 0.055, "#28323c", 1 + 1.2 * np.clip(s.y - 0.6 + 0.3 * s.x, 0, 1))
    s.paint(s.box(-0.58, 0.16, 0.58, 0.62), main, 0.85 + 0.5 * (s.y - 0.3))
    s.paint(s.box(-0.58, 0.14, 0.58, 0.22), main * 0.4)


def _house_front(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    """The gable: walls in the first colour, roof in the second."""
    gable = np.maximum(s.y - 0.98 + 0.42 * np.abs(s.x) / s.half, -1 - s.x)
    s.paint(gable, second, s.grain(14, 0.25))
    wall = np.maximum(gable + 0.06, np.abs(s.x) - s.half * 0.94)
    s.paint(wall, main, (0.92 + 0.12 * s.y) * s.grain(12, 0.14))
    for x in (-0.5, 0.0, 0.5):
        for y in (0.12, 0.38):
            _window(s, x * s.half * 1.1, y, 0.07)
    s.paint(s.box(-0.06, 0, 0.06, 0.26), second * 0.6)


def _house_side(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.paint(s.box(-1, -0.1, 1, 0.6), main, 0.78 * s.grain(12, 0.14))
    s.paint(s.box(-1, 0.56, 1, 0.97), second, (0.95 + 0.12 * np.sign(np.sin(s.y * 80))) * s.grain(16, 0.25))
    for x in np.arange(-0.8, 0.9, 0.4):
        _window(s, x * s.half, 0.3, 0.075)


def _window(s: Sketch, x: float, y: float, half: float) -> None:
    s.paint(s.box(x - half, y - 0.01, x + half, y + 0.17), "#f0ece0", 0.9)
    glass = "#ffe09c" if s.rng.uniform() < 0.35 else "#3c4858"
    s.paint(s.box(x - half + 0.015, y, x + half - 0.015, y + 0.155), glass, 1 + 0.4 * (s.y - y))


def _tower(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    """A facade of windows, some of them lit, with a band of light."""
    s.paint(s.box(-s.half * 0.98, -0.1, s.half * 0.98, 0.97), main, s.grain(8, 0.3))
    columns, rows = 4, 15
    lit = [0.42 * colour + 0.58 * main for colour in (second, rgb("#ffd87a"), rgb("#6fe8ff"))]
    colours = [*lit, main * 0.7, main * 0.7, main * 1.4]
    for row in range(rows):
        for column in range(columns):
            x, y = s.half * (-0.8 + 1.6 * column / (columns - 1)), 0.03 + 0.92 * row / rows
            s.paint(s.box(x - 0.15 * s.half, y, x + 0.15 * s.half, y + 0.038), colours[s.rng.integers(len(colours))])
    x = s.half * s.rng.choice([-0.95, 0.95])
    glow(s, s.box(x - 0.008, 0.05, x + 0.008, 0.95), second)
    if s.rng.uniform() < 0.7:
        y = s.rng.uniform(0.15, 0.6)
        s.paint(s.box(-0.6 * s.half, y, 0.6 * s.half, y + 0.12), second * 0.4)
        glow(s, np.abs(s.box(-0.5 * s.half, y + 0.02, 0.5 * s.half, y + 0.10)) - 0.004, second)


def _hut_front(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.paint(
        s.box(-s.half * 0.85, -0.05, s.half * 0.85, 0.6),
        second,
        s.grain(20, 0.35) * (1 + 0.15 * np.sign(np.sin(s.x * 80))),
    )
    s.paint(np.maximum(s.y - 0.98 + 0.5 * np.abs(s.x) / s.half, 0.45 - s.y), main, s.grain(24, 0.4))
    s.paint(s.box(-0.09, 0, 0.09, 0.38), "#2c2018")


def _hut_side(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.paint(s.box(-1, -0.1, 1, 0.6), second, 0.8 * s.grain(20, 0.3))
    s.paint(s.box(-1, 0.48, 1, 0.97), main, 0.9 * s.grain(24, 0.4))


def _rail(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    """A piece of guard rail, five metres long."""
    for x in (-0.5, 0.5):
        s.paint(s.box(x * s.half - 0.08, -0.1, x * s.half + 0.08, 0.75), main * 0.55)
    s.paint(s.box(-9, 0.5, 9, 0.93), main, 0.8 + 0.35 * np.cos((s.y - 0.71) * 16) + 0.12 * np.sign(np.sin(s.x * 4)))
    for x in (-0.8, 0.2):
        s.paint(s.box(x * s.half - 0.1, 0.6, x * s.half + 0.1, 0.82), second)


def _fence(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.paint(s.box(-9, 0.25, 9, 0.38), main, 0.85)
    s.paint(s.box(-9, 0.62, 9, 0.75), main, 0.85)
    for x in np.arange(-0.9, 1, 0.2):
        s.paint(
            np.maximum(s.box(x * s.half - 0.13, -0.1, x * s.half + 0.13, 0.97), s.y - 0.97 + np.abs(s.x - x * s.half)),
            main,
            s.rng.uniform(0.86, 1.02),
        )


CARS: dict[str, tuple[Painter, float]] = {"car rear": (_car_rear, 1.35), "car front": (_car_front, 1.35)}
# kind: front and side of a box, their widths over its height
BOXES: dict[str, tuple[Painter, float, Painter, float]] = {
    "house": (_house_front, 1.1, _house_side, 1.5),
    "hut": (_hut_front, 1.1, _hut_side, 1.2),
    "tower": (_tower, 0.45, _tower, 0.5),
}
WALLS: dict[str, tuple[Painter, float, float]] = {
    "rail": (_rail, 0.85, 5.5),
    "fence": (_fence, 1.1, 4.5),
}  # height, width


BILLBOARDS: dict[str, tuple[Painter, float]] = {**PLANTS, **OBJECTS, **CARS}  # always face the camera
NUM_VARIANTS = 4
STEPS = 3  # sizes of a picture per octave


@lru_cache(maxsize=1024)
def levels_of(kind: str, colours: tuple[str, str], variant: int, resolution: int) -> tuple[np.ndarray, ...]:
    """The picture of a thing, premultiplied float32 `4 h w` in 0..255, and smaller ones, each with an empty border.

    kind: of a box with its face, "house front" or "house side".
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
    """The matrix `after before` that downsamples a row of pixels by area averaging."""
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
