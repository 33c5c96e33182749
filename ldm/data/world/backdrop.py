"""The background of the procedural world: sky, hills and the texture of the ground.

Sky and hills are pictures on a cylinder around the camera, columns by azimuth, rows by height over distance; near hills
shift more than far ones when the camera moves sideways. The ground is a tile of three planes: grain (mean 0), patches
and specks (0..1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ldm.data.world.looks import Look
from ldm.data.world.sketch import blotches, rgb

AZIMUTH = 1.75  # radians to either side that a cylinder covers
TEXELS = 8  # of the ground per metre
TILE = (512, 256)  # texels of the ground along and across the road before it repeats
LEVELS = (7, 5)  # mipmap levels along and across, in all combinations


@dataclass(frozen=True)
class Cylinder:
    """Planes `c h w` by azimuth -AZIMUTH..AZIMUTH and by height over distance, `top` first, down to `bottom`.

    distance: metres to the camera; sets the parallax.
    """

    planes: np.ndarray
    top: float
    bottom: float
    distance: float


def smoothstep(values: np.ndarray, low: float, high: float) -> np.ndarray:
    part = np.clip((values - low) / (high - low), 0, 1)
    return part * part * (3 - 2 * part)


def draw_sky(look: Look, rng: np.random.Generator, focal: float) -> Cylinder:
    """Gradient, stars, sun or moon, clouds or an aurora: planes `3 h w` in 0..255."""
    top, bottom = 1.0, -0.15
    scale = min(max(focal * 1.1, 60), 500)
    height, width = round((top - bottom) * scale), round(2 * AZIMUTH * scale)
    up = np.linspace(top, bottom, height, dtype=np.float32)[:, None]
    azimuth = np.linspace(-AZIMUTH, AZIMUTH, width, dtype=np.float32)[None]
    zenith, horizon, haze = rgb(look.sky[0]), rgb(look.sky[1]), rgb(look.haze)
    part = np.clip(up / 0.6, 0, 1) ** 0.7
    planes = horizon[:, None, None] + (zenith - horizon)[:, None, None] * part[None]
    planes = planes + (haze - horizon)[:, None, None] * (1 - smoothstep(up, 0.0, 0.10))[None]
    planes = np.repeat(planes, width, 2).astype(np.float32)
    for _ in range(look.stars):
        row, column = int(rng.uniform(0, 0.75 * height)), int(rng.uniform(0, width - 2))
        light = rng.uniform(30, 120) * float(smoothstep(up[row, 0], 0.2, 0.5))  # faint in the haze
        planes[:, row : row + 2, column : column + 2] += light * np.array([[0.8, 0.5], [0.5, 0.3]])
    side = rng.choice([-1, 1]) * rng.uniform(0.03, 0.2)
    if look.sun is not None:
        _draw_sun(planes, up, azimuth - side, look)
    if look.clouds is not None:
        _draw_clouds(planes, up, azimuth, look, rng)
    return Cylinder(np.clip(planes, 0, 255), top, bottom, np.inf)


def _draw_sun(planes: np.ndarray, up: np.ndarray, azimuth: np.ndarray, look: Look) -> None:
    colour, height, radius = look.sun
    gap = np.hypot(azimuth, up - height)
    glow = 0.5 * np.exp(-((gap / (radius * 3)) ** 1.2)) + 0.12 * np.exp(-gap * 3)
    disc = np.clip(0.5 - (gap - radius) * planes.shape[1] / 1.15, 0, 1)
    light = rgb(colour)[:, None, None]
    if look.banded_sun:
        bands = np.clip(
            0.5 - np.sin((up - height) / radius * 16) * 2 + 2 * smoothstep(up, height, height + radius), 0, 1
        )
        light = light + np.array([0, -140, 60], np.float32)[:, None, None] * smoothstep(
            -up, -height - radius, radius - height
        )
        disc = disc * bands
    elif look.stars and radius < 0.07:  # a moon, with its seas
        seas = blotches(np.random.default_rng(5), planes.shape[1], planes.shape[2], 40)
        light = light * (1 - 0.1 * smoothstep(seas, 0.0, 0.4))
        glow = glow * 0.5
    planes += (light - planes) * np.maximum(glow * 0.75, disc)


def _draw_clouds(planes: np.ndarray, up: np.ndarray, azimuth: np.ndarray, look: Look, rng: np.random.Generator) -> None:
    colour, share = look.clouds
    height, width = planes.shape[1:]
    if look.aurora:
        line = 0.3 + rng.uniform(-0.06, 0.06) * azimuth + 0.03 * np.sin(1.4 * azimuth + rng.uniform(0, 6))
        rays = 0.85 + 0.3 * np.sin(azimuth * 2.3 + rng.uniform(0, 6))
        for shift, strength, tint in ((0.0, 1.0, rgb(colour)), (0.12, 0.6, rgb("#8c5cf0"))):
            above = up - line - shift
            veil = np.where(above > 0, np.exp(-above / 0.16), np.exp(above / 0.05)) * rays * strength * share * 1.6
            planes += tint[:, None, None] * np.clip(veil, 0, 1) * 0.8
        return
    flat = blotches(rng, height, width // 4, 4)  # seen from below, clouds are wider than high
    place = np.linspace(0, flat.shape[1] - 1.001, width)
    part = (place - place.astype(int)).astype(np.float32)
    density = flat[:, place.astype(int)] * (1 - part) + flat[:, place.astype(int) + 1] * part
    high = smoothstep(up, 0.18, 0.5)  # low over the horizon they are soft bands, above they have shape
    density = density + 0.3 * blotches(rng, height, width, 9) * high
    alpha = smoothstep(density, 0.45 - 1.1 * share, 1.05 - 1.1 * share) * smoothstep(up, 0.02, 0.2) * (0.3 + 0.7 * high)
    lit = 1 + 0.66 * np.clip(np.roll(density, -max(1, height // 40), 0) - density, -1, 1) * high
    planes += (np.clip(rgb(colour)[:, None, None] * lit, 0, 255) - planes) * (0.85 * alpha)


def draw_hills(look: Look, rng: np.random.Generator, focal: float) -> list[Cylinder]:
    """The hills of a style, far ones first: premultiplied planes `4 h w`."""
    layers = []
    for number, (kind, colour, high) in enumerate(look.hills):
        top, bottom = high * 1.7 + 0.02, -0.12
        scale = min(max(focal * 1.1, 60), 500)
        height, width = round((top - bottom) * scale), round(2 * AZIMUTH * scale)
        up = np.linspace(top, bottom, height, dtype=np.float32)[:, None]
        azimuth = np.linspace(-AZIMUTH, AZIMUTH, width, dtype=np.float32)[None]
        line = _skyline(kind, azimuth, rng) * high
        alpha = np.clip(0.5 + (line - up) * scale / 2, 0, 1)
        slope = np.gradient(line[0])[None] * scale
        rough = blotches(rng, height, width, max(5, round(height / 9)))
        shade = 1 + 0.05 * np.clip(slope * 2, -1, 1) + 0.03 * rough + 0.3 * (up / high - 0.4)
        pale = (0.3 if kind == "volcano" else 0.38) * (
            1 if number == 0 else 0.6
        )  # far things take the colour of the air
        planes = (rgb(colour) * (1 - pale) + rgb(look.haze) * pale)[:, None, None] * shade
        planes = _dress(kind, planes, up / high, line / high, azimuth, rough, rng)
        mist = smoothstep(-up, -0.3 * high - 0.01, 0.0)
        planes = planes + (rgb(look.haze)[:, None, None] - planes) * mist
        planes = np.concatenate([np.clip(planes, 0, 255) * alpha, alpha[None]]).astype(np.float32)
        layers.append(Cylinder(planes, top, bottom, (3000.0, 900.0, 500.0)[min(number + (len(look.hills) == 1), 2)]))
    return layers


def _skyline(kind: str, azimuth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Height of the hills by azimuth, about 0.3 to 1.6."""
    width = azimuth.shape[1]

    def wave(cells: int) -> np.ndarray:
        return _line(rng, width, cells)

    if kind in ("mountains", "snow mountains", "volcano"):
        line = 1.2 - 1.2 * np.abs(wave(6)) - 0.1 * np.abs(wave(14))
        if kind == "volcano":
            gap = np.abs(azimuth - rng.uniform(-0.15, 0.15))
            cone = np.minimum(1.45 - 2.6 * np.maximum(gap, 0.06) ** 0.75 + 0.25, 1.45)
            line = np.maximum(line * 0.4, cone)
        return np.maximum(line, 0.25)
    if kind == "mesas":
        return 0.35 + 0.75 * smoothstep(wave(8), 0.0, 0.2) * (1 + 0.2 * np.round(wave(9) * 2))
    if kind == "skyline":
        steps = np.cumsum(rng.uniform(0.02, 0.075, 400)) - AZIMUTH
        tall = rng.uniform(0.3, 1.0, 400) ** 1.4 * 1.3 + 0.25
        return tall[np.searchsorted(steps, azimuth[0]).clip(0, 399)][None].astype(np.float32)
    if kind == "dunes":
        return 0.75 + 0.5 * wave(8)
    return 0.8 + 0.55 * wave(7) + 0.05 * wave(25)


def _line(rng: np.random.Generator, width: int, cells: int) -> np.ndarray:
    """Smooth noise along one line, float32 `1 w`, with `cells` bumps."""
    return sum(
        0.5**octave
        * np.interp(
            np.linspace(0, cells * 2**octave, width),
            np.arange(cells * 2**octave + 2),
            _bumps(rng, cells * 2**octave + 2),
        )
        for octave in range(3)
    )[None].astype(np.float32)


def _bumps(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.uniform(-0.6, 0.6, count)


def _dress(
    kind: str,
    planes: np.ndarray,
    up: np.ndarray,
    line: np.ndarray,
    azimuth: np.ndarray,
    rough: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Add snow, lava, windows or layers of rock; `up` and `line` in heights of the hills."""
    if kind == "snow mountains":
        cover = smoothstep(up + 0.12 * rough, 0.45, 0.75)
        return planes + (np.array([240, 246, 252], np.float32)[:, None, None] * (0.96 + 0.04 * rough) - planes) * cover
    if kind == "mesas":
        return planes * (1 + 0.14 * np.sin(up * 26))
    if kind == "volcano":
        streams = smoothstep(0.16 - np.abs(np.sin(azimuth * 24 + 1.6 * up + 0.8 * rough)), 0.0, 0.16) * smoothstep(
            up, 0.45, 1.35
        )
        glow = np.maximum(streams, 0.8 * smoothstep(up, 1.28, 1.46) * (line > 1.3))
        return planes + (np.array([255, 120, 24], np.float32)[:, None, None] - planes) * glow
    if kind == "skyline":
        across, high = azimuth * 34, up * 9
        cell = (np.floor(across) * 57 + np.floor(high) * 131) % 97
        window = smoothstep(0.46 - np.abs(across % 1 - 0.5), 0, 0.3) * smoothstep(0.46 - np.abs(high % 1 - 0.5), 0, 0.3)
        window = window * (cell % 7 < 3) * (up < line - 0.08)
        colours = np.array([[255, 214, 120], [255, 70, 190], [90, 230, 255]], np.float32)
        light = colours[(cell % 3).astype(int)].transpose(2, 0, 1)
        return planes + (light - planes) * (0.22 * window)
    return planes


@lru_cache(maxsize=16)
def ground_levels(pattern: str) -> tuple[np.ndarray, np.ndarray]:
    """A ground tile in all mipmap levels: concatenated planes `3 n`, and the offset of each, int `along across`."""
    planes = _draw_ground(pattern, np.random.default_rng(list(pattern.encode())))
    pieces, starts, count = [], np.zeros(LEVELS, np.int64), 0
    for along in range(LEVELS[0]):
        level = planes
        for across in range(LEVELS[1]):
            starts[along, across] = count
            pieces.append(level.reshape(3, -1))
            count += pieces[-1].shape[1]
            level = (level[:, :, ::2] + level[:, :, 1::2]) / 2
        planes = (planes[:, ::2] + planes[:, 1::2]) / 2
    return np.ascontiguousarray(np.concatenate(pieces, 1)), starts


def tiled_noise(rng: np.random.Generator, wavelength: float) -> np.ndarray:
    """Noise that tiles seamlessly, mean 0, deviation 1; features about `wavelength` texels wide."""
    along, across = np.fft.fftfreq(TILE[0])[:, None], np.fft.rfftfreq(TILE[1])[None]
    strength = np.exp(-((np.hypot(along, across) * wavelength) ** 2))
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(TILE)) * strength, TILE)
    noise -= noise.mean()
    return (noise / noise.std()).astype(np.float32)


def _draw_ground(pattern: str, rng: np.random.Generator) -> np.ndarray:
    along, across = np.arange(TILE[0])[:, None] / TEXELS, np.arange(TILE[1])[None] / TEXELS
    fine, middle, coarse = (tiled_noise(rng, wavelength) for wavelength in (3, 8, 22))
    grain = 0.55 * fine + 0.6 * middle
    patch = smoothstep(0.8 * coarse + 0.4 * middle, -0.7, 0.7)
    speck = smoothstep(tiled_noise(rng, 4), 1.7, 2.3)
    if pattern == "sand":
        grain = 0.5 * fine + 0.5 * middle + 0.5 * np.sin(2 * np.pi * (along * 0.75 + across * 0.25) + 1.2 * coarse)
        speck = smoothstep(tiled_noise(rng, 6), 2.0, 2.4)
    elif pattern == "snow":
        grain, speck = 0.3 * fine + 0.5 * middle, smoothstep(middle + 0.3 * fine, 1.7, 2.0)
    elif pattern == "scree":
        stones = tiled_noise(rng, 6)
        grain = 0.5 * fine + 0.7 * np.sign(stones) * np.minimum(np.abs(stones) * 3, 1)
    elif pattern == "lava":
        speck = smoothstep(0.13 - np.abs(tiled_noise(rng, 18)), -0.03, 0.09)
    elif pattern == "rows":
        patch = smoothstep(np.cos(2 * np.pi * across / 2) + 0.25 * middle, -0.3, 0.4)
        speck = smoothstep(np.cos(2 * np.pi * (across - 1) / 4) + 0.2 * middle + 0.15 * fine, 0.75, 0.95)
    elif pattern in ("grid", "paving"):
        line = np.minimum(np.abs(along % 2 - 1), np.abs(across % 2 - 1))  # metres to the nearest joint
        tiles = rng.uniform(0, 1, (TILE[0] // (2 * TEXELS), TILE[1] // (2 * TEXELS))).astype(np.float32)
        patch = np.kron(tiles, np.ones((2 * TEXELS, 2 * TEXELS), np.float32))
        patch = np.roll(patch, (TEXELS, TEXELS), (0, 1))
        speck = smoothstep(0.2 - line, 0.0, 0.16)
        if pattern == "paving":
            speck = 0.35 * speck + smoothstep(tiled_noise(rng, 10), 1.6, 1.9)
    return np.stack([np.clip(grain, -2.2, 2.2), patch, np.clip(speck, 0, 1)]).astype(np.float32)
