"""Drawing the pictures of things from signed distances to shapes: premultiplied RGBA, antialiased at any size.

The painters are in `plants.py`, `objects.py` and `things.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

GROUND_LINE = 0.04  # share of a picture below the foot of the thing, for its shadow on the ground


def rgb(colour: str) -> np.ndarray:
    """ "#rrggbb" -> float32 `3` in 0..255."""
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], np.float32)


def blotches(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth value noise in -1..1, float32 `h w`: three octaves, the first with `cells` cells to the height."""
    total = np.zeros((height, width), np.float32)
    for octave in range(3):
        count = cells * 2**octave
        grid = rng.uniform(-1, 1, (count + 2, max(2, round(count * width / height)) + 2)).astype(np.float32)
        for axis, length in enumerate((height, width)):
            place = np.linspace(0, grid.shape[axis] - 1.001, length)
            low = place.astype(int)
            part = (place - low).astype(np.float32)
            part = part * part * (3 - 2 * part)
            part = part[:, None] if axis == 0 else part[None]
            grid = grid.take(low, axis) * (1 - part) + grid.take(low + 1, axis) * part
        total += grid * 0.5**octave
    return total / 1.75


class Sketch:
    """A picture being drawn; `x` right from the middle and `y` up from the foot, in heights of the thing."""

    def __init__(self, rng: np.random.Generator, resolution: int, aspect: float) -> None:
        self.rng = rng
        self.height, self.width = resolution, max(4, round(resolution * aspect))
        self.pixel = (1 + GROUND_LINE) / self.height
        rows = np.arange(self.height, dtype=np.float32)[:, None] + 0.5
        columns = np.arange(self.width, dtype=np.float32)[None] + 0.5
        self.y = 1 - rows * self.pixel + 0 * columns
        self.x = (columns - self.width / 2) * self.pixel + 0 * rows
        self.half = self.width * self.pixel / 2
        self.picture = np.zeros((4, self.height, self.width), np.float32)

    def paint(
        self, distance: np.ndarray, colour: np.ndarray | str, shade: np.ndarray | float = 1, cover: float = 1
    ) -> None:
        """Fill the inside (`distance` < 0, in heights) with a colour times `shade`."""
        alpha = np.clip(0.5 - distance / self.pixel, 0, 1)
        rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
        if not len(rows):
            return
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))  # the rest stays as it is
        alpha = alpha[box] * cover
        colour = rgb(colour) if isinstance(colour, str) else colour
        shade = np.broadcast_to(shade, distance.shape)[box]
        part = self.picture[:, *box]
        part *= 1 - alpha
        part[:3] += np.minimum(colour[:, None, None] * shade, 255) * alpha
        part[3] += alpha

    def disc(self, x: float, y: float, radius: float, squash: float = 1) -> np.ndarray:
        return (np.hypot(self.x - x, (self.y - y) / squash) - radius) * min(1, squash)

    def bar(self, start: tuple[float, float], end: tuple[float, float], widths: tuple[float, float]) -> np.ndarray:
        """Distance to a straight limb whose half width goes from the first to the second."""
        direction = np.subtract(end, start)
        along = ((self.x - start[0]) * direction[0] + (self.y - start[1]) * direction[1]) / (direction @ direction)
        along = np.clip(along, 0, 1)
        gap = np.hypot(self.x - start[0] - along * direction[0], self.y - start[1] - along * direction[1])
        return gap - (widths[0] + along * (widths[1] - widths[0]))

    def box(self, left: float, bottom: float, right: float, top: float) -> np.ndarray:
        dx = np.maximum(left - self.x, self.x - right)
        return np.maximum(dx, np.maximum(bottom - self.y, self.y - top))

    def grain(self, cells: int, strength: float) -> np.ndarray:
        return 1 + strength * blotches(self.rng, self.height, self.width, cells)

    def round_shade(self, x: float, radius: float) -> np.ndarray:
        """Shade of an upright cylinder lit from the upper left."""
        return 1 - 0.35 * np.clip((self.x - x) / radius, -1, 1)

    def shadow(self, half_width: float) -> None:
        self.paint(
            self.disc(0, 0.0, min(half_width, self.half * 0.95), 0.07 if half_width > 0.2 else 0.12), "#101014", 1, 0.38
        )

    def ball(self, x: float, y: float, radius: float, colour: np.ndarray, grain: np.ndarray, squash: float = 1) -> None:
        """A shaded ball of leaves or stone."""
        light = 1 - 0.3 * (self.x - x) / radius + 0.34 * (self.y - y) / (radius * squash)
        edge = 0.10 * radius * (grain - 1) / 0.3
        self.paint(self.disc(x, y, radius, squash) + edge, colour, np.clip(light, 0.5, 1.45) * grain)


def glow(sketch: Sketch, distance: np.ndarray, colour: np.ndarray) -> None:
    """A neon tube: bright inside, with soft edges."""
    for wider, cover in ((0.03, 0.25), (0.017, 0.35), (0.006, 0.5)):
        sketch.paint(distance - wider, colour, 1, cover)


Painter = Callable[[Sketch, np.ndarray, np.ndarray], None]  # sketch, first and second colour
