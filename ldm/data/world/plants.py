"""Pictures of the plants of the procedural world."""

from __future__ import annotations

import numpy as np

from ldm.data.world.sketch import Painter, Sketch, blotches


def _crown(
    s: Sketch, centre: float, spread: tuple[float, float], lumps: int, radius: tuple[float, float], colour: np.ndarray
) -> None:
    """Balls of leaves around a centre, lower ones first."""
    grain = s.grain(14, 0.42)
    angle, reach = s.rng.uniform(0, 2 * np.pi, lumps), np.sqrt(s.rng.uniform(0, 1, lumps))
    places = np.stack([reach * np.cos(angle) * spread[0], centre + reach * np.sin(angle) * spread[1]], 1)
    for x, y in places[np.argsort(places[:, 1])]:
        light = 0.86 + 0.34 * (y - centre) / spread[1] - 0.16 * x / spread[0] + s.rng.uniform(-0.12, 0.12)
        s.ball(x, y, s.rng.uniform(*radius), colour * light, grain)


def _tree(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.26)
    lean = s.rng.uniform(-0.04, 0.04)
    s.paint(s.bar((0, 0), (lean, 0.6), (0.035, 0.02)), second, s.round_shade(0, 0.035) * s.grain(24, 0.3))
    for side in (-1, 1):
        s.paint(s.bar((lean * 0.6, 0.33), (side * 0.17, 0.6), (0.016, 0.008)), second, s.grain(24, 0.3))
    _crown(s, 0.67, (0.2, 0.19), 16, (0.085, 0.14), main)


def _acacia(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.4)
    for end in (-0.22, 0.03, 0.25):
        s.paint(s.bar((0, 0), (end, 0.78), (0.03, 0.012)), second, s.grain(20, 0.3))
    _crown(s, 0.82, (0.4, 0.06), 16, (0.07, 0.11), main)


def _birch(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.16)
    bark = np.where(blotches(s.rng, s.height, s.width, 30) > 0.28, 0.35, 1.0)
    s.paint(s.bar((0, 0), (0.02, 0.85), (0.022, 0.008)), second, bark * s.round_shade(0, 0.022))
    _crown(s, 0.68, (0.12, 0.24), 14, (0.055, 0.095), main)


def _bare_tree(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.2)
    grain = s.grain(20, 0.3)

    def branch(start: np.ndarray, angle: float, length: float, thick: float, depth: int) -> None:
        end = start + length * np.array([np.sin(angle), np.cos(angle)])
        end[0] = np.clip(end[0], -s.half * 0.9, s.half * 0.9)
        colour = main if depth < 2 else (main + second) / 2
        s.paint(s.bar(tuple(start), tuple(end), (thick, thick * 0.6)), colour, grain)
        if depth < 3:
            for turn in (-1, 1):
                branch(
                    end,
                    angle + turn * s.rng.uniform(0.3, 0.65),
                    length * s.rng.uniform(0.6, 0.75),
                    thick * 0.6,
                    depth + 1,
                )

    branch(np.zeros(2), s.rng.uniform(-0.08, 0.08), 0.36, 0.04, 0)


def _pine(s: Sketch, main: np.ndarray, second: np.ndarray, snow: bool = False) -> None:
    s.shadow(0.24)
    s.paint(s.bar((0, 0), (0, 0.3), (0.025, 0.02)), second if not snow else main * 0.5, s.grain(24, 0.3))
    fringe = blotches(s.rng, s.height, s.width, 18)
    grain = s.grain(22, 0.45)
    tiers = 6
    for tier in range(tiers):
        bottom = 0.1 + 0.8 * tier / tiers
        top = min(0.995, bottom + 0.3)
        reach = 0.25 * (1 - tier / tiers) + 0.04
        along = (s.y - bottom) / (top - bottom)
        distance = (
            np.maximum((np.abs(s.x) - reach * (1 - along)) * 0.8, bottom - s.y + 0.12 * np.abs(s.x)) + 0.02 * fringe
        )
        light = np.clip(0.62 + 0.55 * along - 1.3 * s.x, 0.45, 1.35)
        s.paint(distance, main, light * grain)
        if snow:
            s.paint(
                np.maximum(distance + 0.012, 0.36 - along - 0.5 * fringe), second, np.clip(0.95 - 0.7 * s.x, 0.75, 1.05)
            )


def _snowy_pine(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    _pine(s, main, second, snow=True)


def _cypress(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.12)
    s.paint(s.bar((0, 0), (0, 0.2), (0.02, 0.02)), second)
    fringe = blotches(s.rng, s.height, s.width, 16)
    shape = 0.105 * np.sqrt(np.clip((1 - s.y) * (s.y - 0.03) * 4, 0, 1)) * (1.25 - 0.5 * s.y)
    s.paint(np.abs(s.x) - shape + 0.02 * fringe, main, np.clip(1 - 3 * s.x, 0.6, 1.4) * (1 + 0.4 * fringe))


def _palm(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.2)
    grain = s.grain(26, 0.4)
    lean = s.rng.uniform(-0.12, 0.12)
    rings = 1 + 0.2 * np.sign(np.sin(s.y * 90))
    s.paint(s.bar((0, 0), (lean * 0.4, 0.4), (0.024, 0.019)), second, s.round_shade(0, 0.03) * rings)
    s.paint(s.bar((lean * 0.4, 0.4), (lean, 0.78), (0.019, 0.014)), second, s.round_shade(0.4 * lean, 0.03) * rings)
    for number, angle in enumerate(np.linspace(-2.0, 2.0, 9) + s.rng.uniform(-0.1, 0.1, 9)):
        tip = np.array([lean + 0.3 * np.sin(angle), 0.78 + 0.2 * np.cos(angle) - 0.03])
        middle = np.array([lean + 0.17 * np.sin(angle), 0.80 + 0.17 * np.cos(angle)])
        light = (0.78, 1.05, 1.25)[number % 3]
        for start, end, widths in (((lean, 0.78), middle, (0.012, 0.03)), (middle, tip, (0.03, 0.004))):
            s.paint(s.bar(tuple(start), tuple(end), widths), main * light, grain)


def _fern(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.4)
    grain = s.grain(16, 0.35)
    for angle in s.rng.permutation(np.linspace(-1.35, 1.35, 13)):
        length = s.rng.uniform(0.7, 0.95)
        tip = (0.55 * length * np.sin(angle), max(0.12, length * np.cos(angle) * 0.95))
        mix = s.rng.uniform(0, 1)
        s.paint(s.bar((0, 0), tip, (0.045, 0.012)), main * (1 - mix) + second * mix, grain)


def _tuft(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    grain = s.grain(14, 0.25)
    for _ in range(22):
        foot, angle = s.rng.uniform(-0.3, 0.3), s.rng.uniform(-0.5, 0.5)
        length, mix = s.rng.uniform(0.55, 0.95), s.rng.uniform(0, 1)
        s.paint(
            s.bar((foot, -0.01), (foot + length * np.sin(angle) * 0.6, length * np.cos(angle)), (0.028, 0.008)),
            main * (1 - mix) + second * mix,
            grain,
        )


def _flowers(s: Sketch, main: np.ndarray, second: np.ndarray, radius: float = 0.075, squash: float = 1.25) -> None:
    """Stems in the second colour with heads in the first."""
    for _ in range(16):
        foot, top = s.rng.uniform(-0.5, 0.5), s.rng.uniform(0.55, 0.88)
        s.paint(s.bar((foot, -0.01), (foot * 1.1, top), (0.018, 0.014)), second, s.rng.uniform(0.7, 1.1))
        s.paint(s.disc(foot * 1.1, top, radius, squash), main, s.rng.uniform(0.72, 1.2))


def _lavender(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    _flowers(s, main, second, 0.045, 3.2)


def _bush(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.6)
    grain = s.grain(10, 0.42)
    for x in s.rng.permutation(np.linspace(-0.36, 0.36, 7)):
        s.ball(x, 0.28 + 0.18 * s.rng.uniform(), s.rng.uniform(0.2, 0.27), main * s.rng.uniform(0.75, 1), grain)
    for x in np.linspace(-0.2, 0.2, 3):
        s.ball(x, 0.6, s.rng.uniform(0.18, 0.24), main * s.rng.uniform(1, 1.15), grain)
    spots = blotches(s.rng, s.height, s.width, 12)
    inside = 0.5 - s.picture[3]
    s.paint(np.maximum(inside, (0.42 - spots) * 0.06) + 0.12 * (s.y < 0.12), second, 1)


def _cactus(s: Sketch, main: np.ndarray, second: np.ndarray) -> None:
    s.shadow(0.2)
    ribs = 1 + 0.28 * np.sin(s.x * 150)
    s.paint(s.bar((0, 0), (0, 0.9), (0.07, 0.065)), main, s.round_shade(0, 0.09) * ribs)
    for side in (-1, 1):
        low, top, out = s.rng.uniform(0.3, 0.5), s.rng.uniform(0.6, 0.82), side * s.rng.uniform(0.17, 0.22)
        s.paint(s.bar((0, low), (out, low + 0.04), (0.045, 0.045)), second, ribs)
        s.paint(s.bar((out, low + 0.03), (out, top), (0.048, 0.042)), main, s.round_shade(out, 0.06) * ribs)


# kind: painter, width over height
PLANTS: dict[str, tuple[Painter, float]] = {
    "tree": (_tree, 0.72), "acacia": (_acacia, 1.1), "birch": (_birch, 0.5), "bare tree": (_bare_tree, 0.95),
    "pine": (_pine, 0.62), "snowy pine": (_snowy_pine, 0.62), "cypress": (_cypress, 0.34), "palm": (_palm, 0.85),
    "fern": (_fern, 1.25), "tuft": (_tuft, 1.2), "wheat": (_tuft, 1.2), "tulip": (_flowers, 1.35),
    "lavender": (_lavender, 1.3), "bush": (_bush, 1.25), "cactus": (_cactus, 0.58),
}  # fmt: skip
