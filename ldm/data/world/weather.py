"""Weather of the procedural world: falling or floating particles such as snow, rain, leaves and embers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm.data.world.backdrop import smoothstep
from ldm.data.world.painting import NEAR, Canvas
from ldm.data.world.sketch import rgb


@dataclass(frozen=True)
class Falling:
    """Particles in a periodic box around the camera: positions, metres per second, radius, colour, streak, cover."""

    places: np.ndarray
    velocity: np.ndarray
    radius: np.ndarray
    colour: np.ndarray
    streak: float
    cover: float


# kind: count, colours, radius in metres, fall and wind in metres per second, seconds of a streak, cover
WEATHER: dict[str, tuple[int, tuple[str, ...], float, float, float, float, float]] = {
    "snow": (260, ("#ffffff",), 0.035, 1.1, 0.5, 0, 0.85),
    "rain": (170, ("#d4dce6",), 0.012, 8.0, 0.6, 0.035, 0.34),
    "embers": (90, ("#ff9a2c", "#ffce5c", "#ff5c1c"), 0.03, -0.9, 0.7, 0, 0.9),
    "leaves": (50, ("#d8742c", "#e8b43c", "#a8481c"), 0.055, 0.9, 0.7, 0, 0.95),
    "petals": (70, ("#fcc8dc", "#f8a8c8", "#fff0f4"), 0.04, 0.7, 0.5, 0, 0.95),
    "fireflies": (45, ("#e8ff8c", "#a8ffb4"), 0.035, -0.05, 0.15, 0, 0.9),
    "bubbles": (60, ("#d8f8ff", "#a8e8f4"), 0.045, -0.7, 0.1, 0, 0.5),
}
SPAN = np.array([16.0, 9.0, 24.0])  # metres of the box to the right, up and ahead
BEGIN = np.array([-8.0, -2.5, 0.5])


def draw_weather(kind: str, rng: np.random.Generator) -> Falling:
    number, colours, radius, fall, wind, streak, cover = WEATHER[kind]
    velocity = np.array([wind, -fall, 0]) * rng.uniform(0.8, 1.2, (number, 1)) + rng.normal(0, 0.15, (number, 3))
    palette = np.stack([rgb(colour) for colour in colours])[rng.integers(len(colours), size=number)]
    return Falling(
        rng.uniform(0, 1, (number, 3)) * SPAN, velocity, radius * rng.uniform(0.7, 1.4, number), palette, streak, cover
    )


def paint_weather(canvas: Canvas, falling: Falling, seconds: float) -> np.ndarray:
    """Paint soft dots or streaks over the frame; returns their cover, `h w`."""
    camera = canvas.camera
    here = np.array([camera.x, camera.y, camera.z])
    offset = (falling.places + falling.velocity * seconds - here - BEGIN) % SPAN + BEGIN
    edge = np.minimum((offset - BEGIN) / SPAN, 1 - (offset - BEGIN) / SPAN).min(1)
    samples = int(np.clip(camera.height / 10, 8, 40)) if falling.streak else 1
    times = np.linspace(0, falling.streak, samples)
    places = offset + here
    dots = places[:, None] - falling.velocity[:, None] * times[:, None]
    columns, rows, depth = camera.project(dots[..., 0], dots[..., 1], dots[..., 2])
    strength = smoothstep(edge, 0, 0.12) * falling.cover
    radius = np.clip(falling.radius[:, None] * camera.focal / np.maximum(depth, 0.8), 0.3, camera.height * 0.03)
    reach = int(np.ceil(min(radius.max(), camera.height * 0.03) + 0.5))
    steps = np.arange(-reach, reach + 1)
    at_row = np.floor(rows)[..., None, None].astype(int) + steps[:, None]
    at_column = np.floor(columns)[..., None, None].astype(int) + steps
    gap = np.hypot(at_row + 0.5 - rows[..., None, None], at_column + 0.5 - columns[..., None, None])
    weight = np.clip(radius[..., None, None] + 0.5 - gap, 0, 1) * np.minimum(1, 2 * radius[..., None, None])
    weight *= (strength[:, None] * (depth > NEAR))[..., None, None]
    fits = (at_row >= 0) & (at_row < camera.height) & (at_column >= 0) & (at_column < camera.width) & (weight > 0)
    index = (at_row * camera.width + at_column)[fits]
    weight = weight[fits] * (min(1.0, 4 / samples) if samples > 1 else 1)
    size = camera.height * camera.width
    total = np.bincount(index, weight, size)
    owner = np.broadcast_to(np.arange(len(offset))[:, None, None, None], fits.shape)[fits]
    cover = np.minimum(total, falling.cover).astype(np.float32).reshape(camera.height, camera.width)
    colour = [np.bincount(index, weight * falling.colour[owner, channel], size) for channel in range(3)]
    colour = (np.stack(colour) / np.maximum(total, 1e-6)).astype(np.float32).reshape(3, camera.height, camera.width)
    canvas.picture += (colour - canvas.picture) * cover
    return cover
