"""Pictures of single objects of the procedural world: rocks, posts, lamps and others."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ldm.data.world.sketch import Painter, Sketch, blotches, glow


def _rock(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.65)
    corners = np.stack([np.cos(np.linspace(0, np.pi, 8)) * 0.6, np.sin(np.linspace(0, np.pi, 8)) * 0.93], 1)
    corners *= s.rng.uniform(0.78, 1, (8, 1))
    corners[[0, -1], 1] = 0
    outline = np.full_like(s.x, -1)
    for first, last in pairwise(corners):
        normal = np.array([last[1] - first[1], first[0] - last[0]])
        normal /= np.linalg.norm(normal) + 1e-6
        outline = np.maximum(outline, (s.x - first[0]) * normal[0] + (s.y - first[1]) * normal[1])
    outline = np.maximum(outline, -0.01 - s.y)
    rough = blotches(s.rng, s.height, s.width, 5)
    ridge = s.x + 0.28 * rough - s.rng.uniform(-0.1, 0.2)
    facet = np.where(ridge < 0, 1.12, 0.68) + np.where(s.y + 0.2 * rough > 0.55, 0.16, 0)
    s.paint(outline + 0.03 * rough, main, facet * s.grain(12, 0.34))
    s.paint(np.maximum(outline + 0.04, (np.abs(rough) - 0.05) * 0.2), second, 0.9)


def _cliff(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    rough = blotches(s.rng, s.height, s.width, 5)
    top = 0.92 - 0.09 * np.round(2 * rough + 1.2 * np.abs(s.x))
    layers = np.sin((s.y + 0.06 * rough) * 46)
    cracks = np.where(np.abs(blotches(s.rng, s.height, s.width, 7)) < 0.07, 0.6, 1)
    shade = (0.95 + 0.15 * layers + 0.25 * np.sin(9 * s.x + 4 * rough)) * cracks
    inside = np.maximum(s.y - top, np.abs(s.x) - s.half * 0.93 + 0.06 * rough)
    s.paint(inside, main, shade)
    s.paint(np.maximum(inside, np.abs(layers - 0.8) * 0.05 - 0.02), second, shade)


def _flame(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    rough = blotches(s.rng, s.height, s.width, 5)
    for scale, colour in (
        (1, second * 0.8),
        (0.78, second),
        (0.56, main),
        (0.3, np.array([255, 244, 190], np.float32)),
    ):
        reach = 0.26 * scale * np.clip(1 - s.y / (0.95 * scale), 0, 1) ** 0.7 * (1 + 0.5 * rough)
        s.paint(np.abs(s.x + 0.1 * rough * s.y) - reach, colour, 1 + 0.2 * rough)
    s.paint(s.disc(0, 0.02, 0.3, 0.2), "#2c1a16", s.grain(12, 0.5))


def _pole(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    stripes = 1 + 0.25 * np.sign(np.sin(s.y * 40))
    s.paint(s.bar((0, 0), (0, 0.97), (0.017, 0.012)), main, s.round_shade(0, 0.02) * stripes)
    for height in (0.9, 0.82):
        s.paint(s.box(-0.13, height, 0.13, height + 0.018), second)
        for x in (-0.12, -0.07, 0.07, 0.12):
            s.paint(s.disc(x, height + 0.03, 0.011), "#d8dcd8")


def _lamp(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.paint(s.bar((0, 0), (0, 0.92), (0.016, 0.01)), main, s.round_shade(0, 0.02))
    s.paint(s.bar((0, 0.92), (0.1, 0.96), (0.01, 0.009)), main)
    for radius, cover in ((0.11, 0.10), (0.08, 0.18), (0.055, 0.35)):
        s.paint(s.disc(0.1, 0.935, radius), second, 1, cover)
    s.paint(s.disc(0.1, 0.94, 0.035, 0.6), second, 1.2)


def _lantern(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.22)
    s.paint(s.box(-0.06, 0, 0.06, 0.5), main, s.round_shade(0, 0.08) * s.grain(10, 0.3))
    s.paint(s.box(-0.17, 0, 0.17, 0.09), main, s.grain(10, 0.3))
    s.paint(s.box(-0.13, 0.5, 0.13, 0.78), main, 0.8)
    s.paint(s.box(-0.085, 0.54, 0.085, 0.74), second, 1.1)
    roof = (s.y - 0.98) + np.abs(s.x) * 0.9
    s.paint(np.maximum(roof, 0.77 - s.y), main, 0.75 + 0.3 * (s.x < 0))


def _post(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    """A post in bands of two colours."""
    s.shadow(0.16)
    s.paint(s.bar((0, 0), (0, 0.93), (0.05, 0.05)), second, s.round_shade(0, 0.06))
    s.paint(
        np.maximum(s.bar((0, 0), (0, 0.93), (0.05, 0.05)), np.abs((s.y * 3) % 1 - 0.75) / 3 - 0.08),
        main,
        s.round_shade(0, 0.06),
    )


def _fence_post(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.2)
    s.paint(s.bar((0, 0), (0.01, 0.93), (0.06, 0.055)), main, s.round_shade(0, 0.07) * s.grain(9, 0.5))
    for height in (0.42, 0.76):
        s.paint(s.bar((-0.4, height), (0.4, height + 0.03), (0.03, 0.03)), second, s.grain(9, 0.4))


def _sign(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.paint(s.bar((0, 0), (0, 0.9), (0.02, 0.02)), "#8c9094", s.round_shade(0, 0.03))
    diamond = np.abs(s.x) + np.abs(s.y - 0.76) - 0.22
    s.paint(diamond, second)
    s.paint(diamond + 0.02, main)
    s.paint(s.bar((0, 0.66), (0, 0.8), (0.02, 0.02)), second)
    s.paint(s.bar((0, 0.8), (s.rng.choice([-0.07, 0.07]), 0.86), (0.02, 0.02)), second)


def _neon_sign(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    if s.rng.uniform() < 0.5:
        main, second = second, main
    s.paint(s.bar((0, 0), (0, 0.9), (0.025, 0.025)), "#3c3c58", s.round_shade(0, 0.03))
    s.paint(s.box(-0.19, 0.36, 0.19, 0.97) - 0.01, main * 0.4)
    glow(s, np.abs(s.box(-0.17, 0.385, 0.17, 0.95)) - 0.012, main)
    for y in (0.48, 0.67, 0.85):
        for _ in range(2):
            (left, right), (low, high) = s.rng.uniform(-0.11, 0.11, 2), s.rng.uniform(-0.05, 0.05, 2)
            glow(s, s.bar((left, y + low), (right, y + high), (0.016, 0.016)), second)


def _gate(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    """A gantry across the road with luminous letters."""
    for side in (-0.78, 0.78):
        s.paint(s.box(side - 0.03, 0, side + 0.03, 0.9), main, s.grain(20, 0.2))
    s.paint(s.box(-0.84, 0.7, 0.84, 0.95), main, s.grain(16, 0.3))
    glow(s, np.abs(s.box(-0.81, 0.73, 0.81, 0.92)) - 0.006, second)
    for x in np.arange(-0.68, 0.7, 0.17):
        ends = s.rng.uniform(-0.05, 0.05, 4)
        glow(s, s.bar((x + ends[0], 0.825 + ends[1]), (x + ends[2], 0.825 + ends[3]), (0.014, 0.014)), second)


def _torii(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    for side in (-1, 1):
        s.paint(
            s.bar((side * 0.76, 0), (side * 0.7, 0.86), (0.034, 0.03)),
            main,
            s.round_shade(side * 0.73, 0.06) * s.grain(20, 0.2),
        )
        s.paint(s.box(side * 0.75 - 0.045, 0, side * 0.75 + 0.045, 0.08), second)
    s.paint(s.box(-0.84, 0.68, 0.84, 0.74), main, s.grain(16, 0.2))
    rise = 0.06 * s.x**2
    s.paint(np.maximum(np.abs(s.y - 0.89 - rise) - 0.035, np.abs(s.x) - 0.92), main, s.grain(16, 0.2))
    s.paint(np.maximum(np.abs(s.y - 0.935 - rise) - 0.014, np.abs(s.x) - 0.94), second)


def _barrel(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.4)
    s.paint(s.box(-0.3, 0, 0.3, 0.93), main, s.round_shade(0, 0.35) * s.grain(8, 0.3))
    for height in (0.24, 0.62):
        s.paint(s.box(-0.31, height, 0.31, height + 0.14), second, s.round_shade(0, 0.5))


def _dome(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.95)
    ball = np.maximum(s.disc(0, 0, 0.9), -s.y)
    seams = np.where((np.abs(np.sin(7 * s.x)) < 0.16) | (np.abs(np.sin(9 * s.y)) < 0.16), 0.72, 1)
    s.paint(ball, main, (1.02 - 0.3 * s.x + 0.2 * (s.y - 0.5)) * seams * s.grain(10, 0.1))
    for x in (-0.45, 0, 0.45):
        s.paint(s.disc(x, 0.36, 0.11), second)
    s.paint(s.box(-0.12, 0, 0.12, 0.2), "#4c4c54")


def _hay(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.55)
    s.paint(s.disc(0, 0.47, 0.47), main, (1.05 - 0.4 * s.x) * s.grain(20, 0.4))
    rings = np.abs((np.hypot(s.x, s.y - 0.47) * 8) % 1 - 0.5) - 0.12
    s.paint(np.maximum(rings / 8, s.disc(0, 0.47, 0.43)), second, s.grain(20, 0.4))


def _stump(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.6)
    s.paint(s.box(-0.36, 0, 0.36, 0.75), main, s.round_shade(0, 0.5) * s.grain(14, 0.5))
    s.paint(s.disc(0, 0.78, 0.36, 0.35), second, 1 + 0.2 * np.sin(np.hypot(s.x, (s.y - 0.78) * 3) * 60))


def _mound(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.5)
    rough = blotches(s.rng, s.height, s.width, 6)
    reach = 0.42 * np.clip(1 - s.y / 0.95, 0, 1) ** 0.6
    shape = np.maximum(np.abs(s.x + 0.08 * rough) - reach, -s.y)
    s.paint(shape, main, (1 - 0.9 * s.x) * s.grain(12, 0.4))
    s.paint(np.maximum(shape + 0.05, (np.abs(rough) - 0.12) * 0.2), second, 0.9)


def _mushroom(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.3)
    s.paint(s.bar((0, 0), (0, 0.6), (0.1, 0.07)), second, s.round_shade(0, 0.12) * s.grain(10, 0.2))
    cap = np.maximum(s.disc(0, 0.52, 0.45, 0.95), 0.5 - s.y)
    s.paint(s.disc(0, 0.51, 0.44, 0.18), second, 0.6 + 0.12 * np.sign(np.sin(s.x * 60)))
    s.paint(cap, main, np.clip(0.95 - 0.55 * s.x + 0.5 * (s.y - 0.7), 0.5, 1.4))
    for _ in range(7):
        spot = s.disc(s.rng.uniform(-0.32, 0.32), s.rng.uniform(0.56, 0.85), s.rng.uniform(0.035, 0.065))
        s.paint(np.maximum(spot, cap + 0.02), second)


def _crystal(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.36)
    for lean in s.rng.permutation([-0.55, -0.28, 0.0, 0.22, 0.5]):
        length, thick = (0.95 - 0.9 * abs(lean)) * s.rng.uniform(0.85, 1), s.rng.uniform(0.06, 0.1)
        across = s.x * np.cos(lean) - s.y * np.sin(lean)
        along = s.x * np.sin(lean) + s.y * np.cos(lean)
        shape = np.maximum(np.abs(across) - np.minimum(thick, (length - along) * 0.5), -0.02 - s.y)
        mix = np.clip(along / length, 0, 1)[None]
        facet = np.where(across < -0.25 * thick, 1.25, np.where(across < 0.45 * thick, 0.95, 0.62))
        for part in (0.0, 0.34, 0.67):
            s.paint(
                np.maximum(shape, (part - mix[0]) * length),
                second * (1 - part) + main * part,
                facet * s.grain(12, 0.18),
            )


def _coral(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.4)
    grain = s.grain(16, 0.35)
    for angle in s.rng.permutation(np.linspace(-0.85, 0.85, 7)):
        length = s.rng.uniform(0.4, 0.55)
        knee = np.array([0.9 * length * np.sin(angle), length * np.cos(angle)])
        s.paint(s.bar((0, 0), tuple(knee), (0.06, 0.045)), main * 0.85, grain)
        for turn in (-0.45, 0.35):
            tip = knee + s.rng.uniform(0.25, 0.4) * np.array([np.sin(angle + turn), np.cos(angle + turn)])
            s.paint(s.bar(tuple(knee), tuple(tip), (0.045, 0.04)), main, grain)
            s.paint(s.disc(tip[0], tip[1], 0.05), second, grain)


def _kelp(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    for stem in (-0.09, 0.0, 0.08):
        phase, length = s.rng.uniform(0, 6), s.rng.uniform(0.75, 0.97)
        line = stem + 0.035 * np.sin(s.y * 11 + phase)
        s.paint(np.maximum(np.abs(s.x - line) - 0.012, s.y - length), main * 0.8, 1)
        for number, y in enumerate(np.arange(0.05, length, 0.07)):
            x = stem + 0.035 * np.sin(y * 11 + phase)
            tip = (x + (-1) ** number * 0.09, y + 0.06)
            colour = second if s.rng.uniform() < 0.4 else main
            s.paint(s.bar((x, y), tip, (0.022, 0.006)), colour, s.rng.uniform(0.75, 1.15))


def _bamboo(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    for _ in range(5):
        foot, lean = s.rng.uniform(-0.1, 0.1), s.rng.uniform(-0.06, 0.06)
        mix, knots = s.rng.uniform(0, 1), s.rng.uniform(28, 44)
        rings = np.where(np.sin(s.y * knots) > 0.93, 0.6, 1.0)
        colour = main * (1 - mix) + second * mix
        s.paint(
            s.bar((foot, 0), (foot + lean, 0.98), (0.013, 0.008)),
            colour,
            rings * s.round_shade(foot + lean * 0.5, 0.03),
        )
    for _ in range(34):
        x, y, angle = (
            s.rng.uniform(-0.14, 0.14),
            s.rng.uniform(0.45, 0.95),
            s.rng.uniform(1.2, 2.4) * s.rng.choice([-1, 1]),
        )
        s.paint(
            s.bar((x, y), (x + 0.07 * np.sin(angle), y + 0.07 * np.cos(angle)), (0.011, 0.003)),
            main,
            s.rng.uniform(0.7, 1.3),
        )


def _windmill(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.2)
    s.paint(
        np.maximum(np.abs(s.x) - 0.13 + 0.08 * s.y, np.maximum(-s.y, s.y - 0.62)),
        main,
        s.round_shade(0, 0.14) * (1 + 0.16 * np.sign(np.sin(s.y * 70))),
    )
    s.paint(np.maximum(s.disc(0, 0.6, 0.1, 0.9), 0.6 - s.y), main * 0.5)
    for height in (0.2, 0.4):
        s.paint(s.box(-0.02, height, 0.02, height + 0.07), "#3c3c44")
    turn = s.rng.uniform(0, np.pi / 2)
    for angle in turn + np.arange(4) * np.pi / 2:
        tip = (0.33 * np.sin(angle), 0.63 + 0.33 * np.cos(angle))
        s.paint(s.bar((0, 0.63), tip, (0.012, 0.034)), second, 1 - 0.2 * (np.sin(s.x * 130) > 0.3))
        s.paint(s.bar((0, 0.63), tip, (0.008, 0.008)), "#5c4030")


def _lollipop(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.paint(s.bar((0, 0), (0, 0.7), (0.02, 0.02)), "#f4ecdc", s.round_shade(0, 0.03))
    ball = s.disc(0, 0.74, 0.23)
    s.paint(ball, second, 1.0 - 0.5 * s.x)
    turn = np.arctan2(s.y - 0.74, s.x) + 16 * np.hypot(s.x, s.y - 0.74)
    s.paint(np.maximum(ball, -np.sin(2 * turn) * 0.05), main, 1.0 - 0.5 * s.x)


def _cane(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    hook = np.maximum(np.abs(np.hypot(s.x - 0.03, s.y - 0.8) - 0.12) - 0.045, 0.8 - s.y)
    shape = np.minimum(s.bar((-0.09, 0), (-0.09, 0.8), (0.045, 0.045)), hook)
    s.paint(shape, second, 1.0 - 0.8 * (s.x + 0.09))
    s.paint(np.maximum(shape, -np.sin((s.y + s.x) * 38) * 0.04), main, 1.0 - 0.8 * (s.x + 0.09))


# kind: painter, width over height
OBJECTS: dict[str, tuple[Painter, float]] = {
    "rock": (_rock, 1.35), "cliff": (_cliff, 1.1), "flame": (_flame, 0.7), "pole": (_pole, 0.32),
    "lamp": (_lamp, 0.45), "lantern": (_lantern, 0.5), "snow pole": (_post, 0.4), "reflector": (_post, 0.4),
    "fence post": (_fence_post, 0.95), "sign": (_sign, 0.55), "neon sign": (_neon_sign, 0.5), "gantry": (_gate, 1.8),
    "torii": (_torii, 2.0), "barrel": (_barrel, 0.85), "dome": (_dome, 2.0), "hay": (_hay, 1.15),
    "stump": (_stump, 1.3), "mound": (_mound, 1.1), "mushroom": (_mushroom, 1.0), "crystal": (_crystal, 0.95),
    "coral": (_coral, 1.3), "kelp": (_kelp, 0.42), "bamboo": (_bamboo, 0.42), "windmill": (_windmill, 0.8),
    "lollipop": (_lollipop, 0.56), "cane": (_cane, 0.5),
}  # fmt: skip
