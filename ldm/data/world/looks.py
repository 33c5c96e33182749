"""The styles of the procedural world: colours, ground, roadside things, hills and weather, read from `looks.yaml`.

Nothing here is random: a clip's seed only chooses among what its style allows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldm.errors import UserError

STYLES_FILE = Path(__file__).with_name("looks.yaml")
_COLOUR = re.compile("#[0-9a-f]{6}")


@dataclass(frozen=True)
class Things:
    """Things of one kind beside the road: `per_100m` of them on each side, `near` to `far` metres from its middle.

    `near == far == 0` spans the road. height: least and greatest, metres. glow: 0 takes the haze as everything does, 1
    shines through it.
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
    """One style.

    phrases: its names in captions; prompts use the first. sky: zenith, horizon. haze: the colour of everything
    `visible` metres away; `haze_power` below 1 is fog, 2 is clear air. ground: base, patches, specks. road: asphalt,
    marks, shoulder. hills: (kind, colour, height as an angle), far ones first. sun: (colour, height as an angle, radius
    as an angle). clouds: (colour, share of the sky). stars: their number. rail: kind and colour of the barrier beside
    the road. sea: its colour, to the left of the road. weather: what falls or floats. night: cars have their lights on.
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


def read_styles(path: Path) -> dict[str, Look]:
    """The styles of a YAML file by name, in its order; raises UserError."""
    styles: dict[str, Look] = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for name, given in yaml.load(path.read_text(encoding="utf-8"), loader).items():
        try:
            values = _frozen(given)
            styles[name] = Look(name, **{**values, "things": tuple(Things(**things) for things in values["things"])})
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"{path}: {name}: expected the keys of a style and colours as #rrggbb ({error})") from error
    return styles


def _frozen(value: Any) -> Any:
    """Lists as tuples, all the way down; raises ValueError for a malformed colour."""
    if isinstance(value, dict):
        return {key: _frozen(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    if isinstance(value, str) and value.startswith("#") and not _COLOUR.fullmatch(value):
        raise ValueError(f"found the colour {value!r}")
    return value


LOOKS: dict[str, Look] = read_styles(STYLES_FILE)
