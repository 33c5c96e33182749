"""What a look of the drawn world is made of: colours, ground, roadside things, hills and weather.

Colours are "#rrggbb"; lengths are metres, angles radians. Nothing here is random: a clip's seed only chooses among what
its look allows. The looks themselves are in `world_looks.py` and `world_looks_dreamt.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Things:
    """Things of one kind beside the road: `per_100m` of them on each side, `near` to `far` metres from its middle.

    `near == far == 0` spans the road. `glow` 1 shines by itself, 0 takes the haze like everything else.
    """

    kind: str
    per_100m: float
    near: float
    far: float
    height: tuple[float, float]
    colours: tuple[str, str]
    glow: float = 0.0


@dataclass(frozen=True)
class Look:
    """One look of the world.

    phrases: what captions call it, the first is the one of the prompts. sky: zenith, horizon. haze: what the distance
    turns into, at `visible` metres wholly; `haze_power` below 1 is fog, 2 is clear air. ground: base, patches, specks.
    road: asphalt, marks, shoulder. hills: (kind, colour, height as an angle), far ones first. sun: (colour, height as
    an angle, radius as an angle). clouds: (colour, share of the sky). stars: how many. rail: what runs beside the road.
    sea: its colour, to the left of the road. weather: what falls or floats. night: cars have their lights on.
    banded_sun: the sun is cut into bands. aurora: the clouds are one.
    """

    name: str
    phrases: tuple[str, ...]
    sky: tuple[str, str]
    haze: str
    ground: tuple[str, str, str]
    pattern: str
    road: tuple[str, str, str]
    things: tuple[Things, ...]
    hills: tuple[tuple[str, str, float], ...]
    sun: tuple[str, float, float] | None = None
    clouds: tuple[str, float] | None = None
    stars: int = 0
    visible: float = 115.0
    haze_power: float = 1.6
    rail: tuple[str, str] | None = None
    sea: str | None = None
    weather: str | None = None
    night: bool = False
    banded_sun: bool = False
    aurora: bool = False


ASPHALT = ("#6a6a70", "#eeeadc", "#9b8f7a")  # with its marks and shoulder
