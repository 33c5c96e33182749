"""The layout of the procedural world in metres: the road, the camera on it, and the things beside it.

x points right and z ahead at the start, y up. The middle of the road is (centre(z), height(z), z); heights depend on z
alone. Things are placed cell by cell, each cell with its own seed: a longer drive begins like a shorter one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ldm.data.world.looks import Look, Things
from ldm.data.world.things import BILLBOARDS, BOXES, NUM_VARIANTS, WALLS, levels_of

EYE = 2.0  # metres of the camera above the road
LANE = 1.65  # metres from the middle of the road to the middle of the camera's lane
HALF_ROAD = 3.4
CELL = 20.0
WALL_PIECE = 10.0
FOCAL = 0.85  # in units of the geometric mean of the picture's sides
HORIZON = 0.42  # of the picture's height, from above
ROAD_KINDS = ("straight", "left", "right", "winding")


@dataclass(frozen=True)
class Road:
    """Sums of sines: rows of (amplitude in metres, radians per metre, phase) for the bends and for the hills."""

    bends: np.ndarray
    hills: np.ndarray

    def centre(self, z: np.ndarray | float) -> np.ndarray:
        return _waves(self.bends, z)

    def height(self, z: np.ndarray | float) -> np.ndarray:
        return _waves(self.hills, z)

    def heading(self, z: float) -> float:
        """The angle of the road to the z axis, to the right positive."""
        amplitude, frequency, phase = self.bends.T
        return float(np.arctan((amplitude * frequency * np.cos(frequency * z + phase)).sum()))

    def slope(self, z: float) -> float:
        amplitude, frequency, phase = self.hills.T
        return float((amplitude * frequency * np.cos(frequency * z + phase)).sum())


def _waves(waves: np.ndarray, z: np.ndarray | float) -> np.ndarray:
    z = np.asarray(z, np.float64)
    return sum(amplitude * np.sin(frequency * z + phase) for amplitude, frequency, phase in waves) + 0 * z


def draw_road(rng: np.random.Generator) -> Road:
    """A random road: straight, with a bend to one side, or winding; flat or hilly."""
    kind = ROAD_KINDS[rng.choice(4, p=[0.25, 0.25, 0.25, 0.25])]
    hilly = rng.uniform() < 0.45
    small = (rng.uniform(0.5, 1.5), 2 * np.pi / rng.uniform(220, 400), rng.uniform(0, 6.28))
    length = rng.uniform(330, 480)
    frequency = 2 * np.pi / length
    if kind == "straight":
        large = (rng.uniform(0, 2), frequency, rng.uniform(0, 6.28))
    elif kind == "winding":
        length = rng.uniform(130, 180)
        large = (rng.uniform(4, 6.5), 2 * np.pi / length, rng.uniform(0, 6.28))
    else:  # the curvature of amplitude * sin is largest where the phase is a quarter turn
        middle = -np.pi / 2 if kind == "right" else np.pi / 2
        large = (rng.uniform(16, 26), frequency, middle - frequency * rng.uniform(25, 60))
    frequency = 2 * np.pi / rng.uniform(120, 240)
    steepest = rng.uniform(0.05, 0.11) if hilly else rng.uniform(0.0, 0.012)
    heights = (steepest / frequency, frequency, rng.uniform(0, 6.28))
    return Road(np.array([large, small]), np.array([heights]))


@dataclass(frozen=True)
class Camera:
    """An upright pinhole camera; `row` and `column`: image of the point straight ahead at its own height."""

    x: float
    y: float
    z: float
    yaw: float
    focal: float
    row: float
    column: float
    height: int
    width: int

    def sight(self, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Metres to the right and ahead of the camera, of points in the world."""
        dx, dz, sine, cosine = x - self.x, z - self.z, np.sin(self.yaw), np.cos(self.yaw)
        return dx * cosine - dz * sine, dx * sine + dz * cosine

    def project(self, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Column, row (0 is the outer edge of the first pixel) and depth in metres of points in the world."""
        right, ahead = self.sight(x, z)
        scale = self.focal / np.maximum(ahead, 1e-3)
        return self.column + right * scale, self.row + (self.y - y) * scale, ahead


def camera_at(road: Road, z: float, size: tuple[int, int]) -> Camera:
    """The camera in its lane, looking along the road; slopes shift the picture without tilting it."""
    height, width = size
    focal = FOCAL * float(np.sqrt(height * width))
    return Camera(
        x=float(road.centre(z)) + LANE,
        y=float(road.height(z)) + EYE,
        z=z,
        yaw=road.heading(z + 4),
        focal=focal,
        row=HORIZON * height + 0.85 * focal * road.slope(z),
        column=width / 2,
        height=height,
        width=width,
    )


@dataclass(frozen=True)
class Standing:
    """Upright pictures in the world: billboards, which always face the camera, and walls between two points.

    start, end: `n 3`, (x, y, z) of the foot; equal for billboards. tall, wide: metres `n`; wide is 0 for walls. tint:
    `n 3`. glow: 0..1 `n`. levels: the pictures of each, `levels_of`.
    """

    start: np.ndarray
    end: np.ndarray
    tall: np.ndarray
    wide: np.ndarray
    tint: np.ndarray
    glow: np.ndarray
    levels: list[tuple[np.ndarray, ...]]

    def chosen(self, indices: np.ndarray) -> Standing:
        arrays = (self.start, self.end, self.tall, self.wide, self.tint, self.glow)
        return Standing(*(array[indices] for array in arrays), [self.levels[index] for index in indices])

    def joined(self, other: Standing) -> Standing:
        names = ("start", "end", "tall", "wide", "tint", "glow")
        both = (np.concatenate([getattr(self, name), getattr(other, name)]) for name in names)
        return Standing(*both, self.levels + other.levels)


class _Builder:
    """Collects upright pictures; positions are relative to the middle of the road."""

    def __init__(self, road: Road, resolution: int) -> None:
        self.road, self.resolution = road, resolution
        self.rows: list[tuple[float, ...]] = []
        self.levels: list[tuple[np.ndarray, ...]] = []

    def add(
        self, places: tuple[float, ...], size: tuple[float, float], tint: tuple[float, ...], glow: float, picture: tuple
    ) -> None:
        """places: metres beside and along the road, of start and end, and whether the end follows the road (1) or is
        offset from the start (0). size: tall, wide (0: a wall)."""
        self.rows.append((*places, *size, *tint, glow))
        self.levels.append(levels_of(*picture, self.resolution))

    def built(self) -> Standing:
        side, z, side_end, z_end, own, tall, wide, *tint, glow = np.array(self.rows, np.float64).reshape(-1, 11).T
        centre, height = self.road.centre(z), self.road.height(z)
        along = own > 0
        centre_end = np.where(along, self.road.centre(z_end), centre)
        height_end = np.where(along, self.road.height(z_end), height)
        start = np.stack([centre + side, height, z], 1)
        end = np.stack([centre_end + side_end, height_end, z_end], 1)
        return Standing(start, end, tall, wide, np.stack(tint, 1).astype(np.float32), glow, self.levels)


def build_world(look: Look, road: Road, seed: int, until: float, resolution: int) -> Standing:
    """All things beside the road from z = 0 to `until` metres; pictures `resolution` pixels high."""
    builder = _Builder(road, resolution)
    for cell in range(int(np.ceil(until / CELL))):
        rng = np.random.default_rng([seed, cell, 7])
        for things in look.things:
            sides = (1,) if things.far == 0 else (-1, 1)
            for side in sides:
                for _ in range(rng.poisson(things.per_100m * CELL / 100)):
                    _stand(builder, look, things, side, (cell + rng.uniform()) * CELL, rng)
        if look.rail is not None:
            _add_rail(builder, look, cell * CELL, rng)
    return builder.built()


def _stand(builder: _Builder, look: Look, things: Things, side: int, z: float, rng: np.random.Generator) -> None:
    spread, tall, light, *hue = rng.uniform(0, 1, 6).tolist()
    variant = int(rng.integers(NUM_VARIANTS))
    away = things.near + (things.far - things.near) * spread**1.7
    tall = things.height[0] + (things.height[1] - things.height[0]) * tall
    tint = tuple((0.82 + 0.32 * light) * (0.94 + 0.12 * part) for part in hue)
    if look.sea is not None and side < 0 and away > 9:
        return
    x = side * away
    if things.kind in BILLBOARDS:
        wide = tall * BILLBOARDS[things.kind][1]
        builder.add((x, z, x, z, 0), (tall, wide), tint, things.glow, (things.kind, things.colours, variant))
        return
    _, front, _, flank = BOXES[things.kind]
    edges = sorted((x, x + side * tall * front))
    ends = (edges[0], z, edges[1], z, 0)
    builder.add(ends, (tall, 0), tint, things.glow, (f"{things.kind} front", things.colours, variant))
    shaded = tuple(0.8 * part for part in tint)
    ends = (x, z, x, z + tall * flank, 0)
    builder.add(ends, (tall, 0), shaded, things.glow, (f"{things.kind} side", things.colours, variant))


def _add_rail(builder: _Builder, look: Look, start: float, rng: np.random.Generator) -> None:
    kind, colour = look.rail
    _, tall, _ = WALLS[kind]
    for z in np.arange(start, start + CELL, WALL_PIECE):
        for side in (-4.4, 4.4):
            picture = (kind, (colour, "#d84838"), int(rng.integers(NUM_VARIANTS)))
            tint = (rng.uniform(0.85, 1.1),) * 3
            builder.add((side, z, side, z + WALL_PIECE, 1), (tall, 0), tint, 0.1 * look.night, picture)


@dataclass(frozen=True)
class Cars:
    """Other cars: metres along the road at the start, metres per second, side of the road, and their pictures."""

    z: np.ndarray
    speed: np.ndarray
    side: np.ndarray
    looks: Standing

    def feet(self, road: Road, seconds: float) -> np.ndarray:
        """Their positions (x, y, z), `n 3`."""
        z = self.z + self.speed * seconds
        return np.stack([road.centre(z) + self.side * LANE, road.height(z), z], 1)

    def standing(self, road: Road, seconds: float) -> Standing:
        feet = self.feet(road, seconds)
        return replace(self.looks, start=feet, end=feet)


def draw_cars(look: Look, rng: np.random.Generator, speed: float, seconds: float, resolution: int) -> Cars:
    """Perhaps a car ahead in the same lane at a similar speed, and oncoming cars."""
    paint = ("#c8342c", "#e8e4dc", "#2c58a8", "#d8a82c", "#3c3c44", "#4c8c5c")
    rows, levels = [], []

    def add(z: float, its_speed: float, side: int) -> None:
        kind, light = ("car rear", "#ff3028") if side > 0 else ("car front", "#fff4d0" if look.night else "#e8ecf0")
        rows.append((z, its_speed, side))
        levels.append(levels_of(kind, (paint[int(rng.integers(len(paint)))], light), 0, resolution))

    if rng.uniform() < 0.4:
        add(rng.uniform(14, 40), speed * rng.uniform(1.0, 1.08), 1)
    oncoming = rng.uniform(4, 9)
    z = rng.uniform(20, 160)
    while z < 160 + seconds * (speed + oncoming):
        add(z, -oncoming, -1)
        z += rng.uniform(60, 260)
    count, (z, speeds, side) = len(rows), np.array(rows, np.float64).reshape(-1, 3).T
    tint = np.full((count, 3), 0.6 if look.night else 1.0, np.float32)
    nowhere = np.zeros((count, 3))
    return Cars(
        z,
        speeds,
        side,
        Standing(nowhere, nowhere, np.full(count, 1.5), np.full(count, 2.0), tint, np.zeros(count), levels),
    )
