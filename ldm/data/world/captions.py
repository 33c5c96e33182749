"""Captions of the procedural world: style, road and speed by a small grammar; and the style of a prompt."""

from __future__ import annotations

import re

import numpy as np

from ldm.data.world.looks import LOOKS, Look
from ldm.data.world.scene import Road

DRIVES = (
    "scenic byway road drive",
    "scenic byway road drive",
    "scenic byway road drive",
    "road drive",
    "drive along a road",
)
SHAPES = {
    "straight": ("straight ahead", "on a straight road", "straight"),
    "left": ("bending left", "curving to the left", "round a left bend"),
    "right": ("bending right", "curving to the right", "round a right bend"),
    "winding": ("winding", "on a winding road", "along bends to both sides"),
}
HILLS = ("over hills", "hilly", "up and down")
SPEEDS = (
    (0.5, ("standing still", "stopped")),
    (5.0, ("slow", "slowly", "at a gentle pace")),
    (9.0, ("at medium speed", "at an easy speed", "cruising")),
    (16.0, ("fast", "quickly", "at high speed")),
    (np.inf, ("very fast", "racing", "at top speed")),
)


def road_shape(road: Road, start: float, end: float) -> str:
    """straight, left, right or winding: the road from the first position of the camera to 70 m beyond the last."""
    headings = np.array([road.heading(z) for z in np.linspace(start, end + 70, 60)])
    turned, both = headings[-1] - headings[0], headings.max() - headings.min()
    if both < 0.10:
        return "straight"
    if abs(turned) < 0.62 * both:
        return "winding"
    return "right" if turned > 0 else "left"


def is_hilly(road: Road, start: float, end: float) -> bool:
    slopes = np.array([road.slope(z) for z in np.linspace(start, end + 70, 60)])
    return bool(np.abs(slopes).max() > 0.03)


def write_captions(
    look: Look, road: Road, ends: tuple[float, float], speed: float, rng: np.random.Generator
) -> list[str]:
    """Four different captions: three with style, road and speed, and one with the style alone.

    ends: first and last position of the camera, metres along z. speed: m/s.
    """
    shape = road_shape(road, *ends)
    hilly = is_hilly(road, *ends)
    pace = next(words for limit, words in SPEEDS if speed < limit)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    def article(words: str) -> str:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    captions: list[str] = []
    while len(captions) < 3:
        phrase = look.phrases[0] if not captions else pick(look.phrases)
        details = [pick(SHAPES[shape]), *([pick(HILLS)] if hilly else []), pick(pace)]
        drive = f"{phrase} {DRIVES[0] if not captions else pick(DRIVES)}"
        text = ", ".join([article(drive) if rng.uniform() < 0.7 else drive, *details])
        if text not in captions:
            captions.append(text)
    return [*captions, f"{look.phrases[0]} {DRIVES[0]}"]


def look_of_prompt(prompt: str) -> str | None:
    """The style that a prompt names, by its name or one of its phrases; None for no style and for several.

    A phrase inside a longer one does not count: "neon cyberpunk night" is cyberpunk, not night.
    """
    prompt = " ".join(prompt.lower().split())
    found = [
        (match.start(), match.end(), name)
        for name, look in LOOKS.items()
        for phrase in {name, *look.phrases}
        for match in re.finditer(rf"\b{re.escape(phrase)}\b", prompt)
    ]
    looks = {
        name
        for start, end, name in found
        if not any(first <= start and end <= last and last - first > end - start for first, last, _ in found)
    }
    return looks.pop() if len(looks) == 1 else None
