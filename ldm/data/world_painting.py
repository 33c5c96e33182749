"""Painting one frame of the drawn world, surface over surface from the far end, and keeping what is seen where.

A picture is float32 `3 h w` in 0..255. When asked for, every surface also writes its ground truth where it covers more
than half of a pixel: where that point of the surface is in the next frame, how far it is, and which surface it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm.data.world_backdrop import AZIMUTH, LEVELS, TEXELS, TILE, Cylinder, ground_levels, smoothstep
from ldm.data.world_looks import Look
from ldm.data.world_scene import HALF_ROAD, Camera, Road
from ldm.data.world_sketches import GROUND_LINE, rgb

NEAR = 0.6  # metres: nothing closer is drawn
KNOTS = 90  # distances at which the ground's profile is followed
DASH_PERIOD, DASH = 9.0, 4.0
MARK = 0.16  # metres a painted line is wide
SKY, GROUND = 0, 1  # the numbers of surfaces; hills follow, then things


class Canvas:
    """The picture of one frame and, with `next_camera`, its ground truth."""

    def __init__(self, camera: Camera, next_camera: Camera | None = None) -> None:
        shape = (camera.height, camera.width)
        self.camera, self.next_camera = camera, next_camera
        self.picture = np.empty((3, *shape), np.float32)
        self.columns = np.arange(camera.width, dtype=np.float32) + 0.5
        self.rows = np.arange(camera.height, dtype=np.float32) + 0.5
        self.across = (self.columns - camera.column) / camera.focal  # metres to the right for a metre ahead
        self.has_truth = next_camera is not None
        if self.has_truth:
            self.target = np.zeros((2, *shape), np.float32)  # column and row in the next frame
            self.depth = np.full(shape, np.inf, np.float32)
            self.surface = np.zeros(shape, np.int32)

    def note(
        self,
        where: tuple[slice, slice],
        alpha: np.ndarray,
        target: tuple[np.ndarray, np.ndarray],
        depth: np.ndarray | float,
        surface: int,
    ) -> None:
        """Ground truth of what covers the box `where` with `alpha`."""
        shown = alpha > 0.5
        for plane, values in (
            (self.target[0], target[0]),
            (self.target[1], target[1]),
            (self.depth, depth),
            (self.surface, surface),
        ):
            np.copyto(plane[where], values, where=shown, casting="unsafe")


def paint_cylinder(canvas: Canvas, cylinder: Cylinder, last_row: int, surface: int) -> None:
    """Sky (three planes, covers everything) or hills (four planes) down to `last_row`."""
    camera = canvas.camera
    azimuth = np.arctan(canvas.across) + camera.yaw + camera.x / cylinder.distance
    cosine = 1 / np.sqrt(1 + canvas.across**2)
    count, height, width = cylinder.planes.shape
    first = 0 if count == 3 else max(0, int(camera.row - camera.focal * cylinder.top / cosine.min()))
    if first >= last_row:
        return
    up = (camera.row - canvas.rows[first:last_row, None]) / camera.focal * cosine
    v = np.clip((cylinder.top - up) * np.float32(height / (cylinder.top - cylinder.bottom)) - 0.5, 0, height - 1.001)
    u = np.clip((azimuth + AZIMUTH) * (width / (2 * AZIMUTH)) - 0.5, 0, width - 1.001)
    v_low, u_low = v.astype(np.int32), u.astype(np.int32)
    v_part, u_part = v - v_low, (u - u_low).astype(np.float32)
    at = v_low * width + u_low
    flat = cylinder.planes.reshape(count, -1)
    upper = flat.take(at, 1)
    upper += (flat.take(at + 1, 1) - upper) * u_part
    at += width
    lower = flat.take(at, 1)
    lower += (flat.take(at + 1, 1) - lower) * u_part
    upper += (lower - upper) * v_part
    box = (slice(first, last_row), slice(None))
    if count == 3:
        canvas.picture[:, :last_row] = upper
    else:
        canvas.picture[:, first:last_row] *= 1 - upper[3]
        canvas.picture[:, first:last_row] += upper[:3]
    if canvas.has_truth:
        following = canvas.next_camera
        tangent = np.tan(azimuth - following.yaw - following.x / cylinder.distance)
        column = following.column + following.focal * tangent + 0 * up
        row = following.row - following.focal * up * np.sqrt(1 + tangent**2)
        alpha = upper[3] if count == 4 else np.ones_like(up)
        canvas.note(box, alpha, (column, row), min(cylinder.distance, 1e4), surface)


@dataclass(frozen=True)
class Ground:
    """The ground as a frame sees it, from `first_row` down, all `h w`: depth, place, metres from the road's middle,
    metres that a pixel covers along and across, and how much of the pixel is ground."""

    first_row: int
    depth: np.ndarray
    x: np.ndarray
    z: np.ndarray
    side: np.ndarray
    along: np.ndarray
    across: np.ndarray
    alpha: np.ndarray


def see_ground(canvas: Canvas, road: Road, visible: float) -> Ground:
    """Which point of the ground every pixel sees; rises hide what lies behind them."""
    camera = canvas.camera
    ahead = np.geomspace(NEAR, visible, KNOTS)
    drop = camera.focal * (camera.y - road.height(camera.z + ahead)) / ahead
    lowest = np.minimum.accumulate(drop)
    seen = np.append(True, drop[1:] < lowest[:-1])
    drop, ahead = drop[seen], ahead[seen]
    turn = np.cos(camera.yaw) - canvas.across * np.sin(camera.yaw)  # metres along z for a metre of depth
    top = camera.row + turn * drop[-1]
    first = int(np.clip(np.floor(top.min() - 0.5), 0, camera.height))
    rows = canvas.rows[first:, None]
    query = (rows - camera.row) / turn
    z = 1 / np.interp(query, drop[::-1], 1 / ahead[::-1])
    depth = z / turn
    right = canvas.across * depth
    x = camera.x + right * np.cos(camera.yaw) + depth * np.sin(camera.yaw)
    table = np.arange(-2.0, visible + 1, 0.5)
    place = np.clip((z + 2.0) * 2, 0, len(table) - 1.001)
    low = place.astype(np.int32)
    centre = road.centre(camera.z + table)
    middle = centre.take(low)
    middle += (centre.take(low + 1) - middle) * (place - low)
    along = _stretch(z)
    alpha = np.clip(rows - top + 0.5, 0, 1)
    return Ground(
        first,
        *(part.astype(np.float32) for part in (depth, x, z + camera.z, x - middle, along, depth / camera.focal, alpha)),
    )


def _stretch(z: np.ndarray) -> np.ndarray:
    """Metres along the road that a pixel covers: from its row to the next."""
    along = np.empty_like(z)
    along[:-1] = np.abs(z[:-1] - z[1:])
    along[-1] = along[-2] if len(z) > 1 else 0.05 * z[-1]
    return np.maximum(along, 1e-3)


def paint_ground(canvas: Canvas, road: Road, look: Look, offset: tuple[float, float]) -> None:
    """Verge, road and its marks; `offset` in metres shifts the ground's tile along and across."""
    ground = see_ground(canvas, road, look.visible)
    if ground.first_row >= canvas.camera.height:
        return
    grain, patch, speck = _ground_texture(ground, look.pattern, offset)
    base, other, spot = (rgb(colour)[:, None, None] for colour in look.ground)
    asphalt, mark, shoulder = (rgb(colour)[:, None, None] for colour in look.road)
    colour = base + (other - base) * patch
    colour += (spot - colour) * speck
    colour *= 1 + 0.17 * grain
    if look.sea is not None:
        cover = _cover(-13 + 1.5 * grain - ground.side, ground.across)
        colour += (rgb(look.sea)[:, None, None] * (1 + 0.14 * grain + 0.15 * patch) - colour) * cover
    off = np.abs(ground.side)
    colour += (shoulder * (1 + 0.2 * grain) - colour) * _cover(HALF_ROAD + 0.75 + 0.1 * grain - off, ground.across)
    tracks = 1 - 0.07 * np.exp(-(((np.abs(off - 1.65) - 0.75) / 0.3) ** 2))
    colour += (asphalt * ((1 + 0.10 * grain + 0.10 * (patch - 0.5)) * tracks) - colour) * _cover(
        HALF_ROAD - off, ground.across
    )
    lines = _line(off - (HALF_ROAD - 0.3), ground.across) + _line(off, ground.across) * _dashes(ground.z, ground.along)
    colour += (mark - colour) * (lines * (0.88 + 0.06 * grain))
    far = np.minimum(ground.depth / look.visible, 1) ** look.haze_power
    colour += (rgb(look.haze)[:, None, None] - colour) * far
    part = canvas.picture[:, ground.first_row :]
    first = int((ground.alpha < 1).any(1).sum())  # rows at the far edge that are not wholly ground
    part[:, :first] += (colour[:, :first] - part[:, :first]) * ground.alpha[:first]
    part[:, first:] = colour[:, first:]
    if canvas.has_truth:
        column, row, _ = canvas.next_camera.project(ground.x, road.height(ground.z), ground.z)
        canvas.note((slice(ground.first_row, None), slice(None)), ground.alpha, (column, row), ground.depth, GROUND)


def _ground_texture(ground: Ground, pattern: str, offset: tuple[float, float]) -> np.ndarray:
    """The tile's planes `3 h w`, filtered to what a pixel covers: two halvings along the road mixed, one across."""
    planes, starts = ground_levels(pattern)
    level = np.clip(np.log2(ground.along * TEXELS), 0, LEVELS[0] - 1.001)
    along = level.astype(np.int32)
    mix = level - along
    across = np.clip(np.log2(ground.across * TEXELS) + 0.5, 0, LEVELS[1] - 1).astype(np.int32)
    z, side = (ground.z + offset[0]) * TEXELS, (ground.side + offset[1]) * TEXELS
    scale_across = np.ldexp(np.float32(1), -across)
    width = TILE[1] >> across
    u = side * scale_across - 0.5
    u_floor = np.floor(u)
    u_part = u - u_floor
    u_low = u_floor.astype(np.int32) & (width - 1)
    u_high = (u_low + 1) & (width - 1)
    result = None
    for step in (0, 1):
        height = TILE[0] >> (along + step)
        v = z * np.ldexp(np.float32(1), -(along + step)) - 0.5
        v_floor = np.floor(v)
        v_part = v - v_floor
        v_low = v_floor.astype(np.int32) & (height - 1)
        start = starts.take((along + step) * LEVELS[1] + across).astype(np.int32)
        upper, lower = start + v_low * width, start + ((v_low + 1) & (height - 1)) * width
        near = planes.take(upper + u_low, 1)
        near += (planes.take(upper + u_high, 1) - near) * u_part
        far = planes.take(lower + u_low, 1)
        far += (planes.take(lower + u_high, 1) - far) * u_part
        near += (far - near) * v_part
        result = near if result is None else result + (near - result) * mix
    return result


def _cover(distance: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """How much of a pixel `pixel` metres wide lies inside an edge `distance` metres away (positive inside)."""
    return np.clip(distance / pixel + 0.5, 0, 1)


def _line(distance: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """How much of a pixel a painted line covers whose middle is `distance` metres away."""
    wide = np.maximum(pixel, MARK)
    return np.clip((MARK / 2 - np.abs(distance)) / pixel + 0.5 * wide / MARK, 0, 1) * (MARK / wide)


def _dashes(z: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """How much of a pixel that covers `pixel` metres along the road lies in dashes: their mean over it, exactly."""
    pixel = np.maximum(pixel, 0.02)
    count = [(z + sign * pixel / 2) / DASH_PERIOD for sign in (-1, 1)]
    painted = [np.floor(part) * DASH + np.minimum((part - np.floor(part)) * DASH_PERIOD, DASH) for part in count]
    return (painted[1] - painted[0]) / pixel


def paint_facing(canvas: Canvas, levels: tuple[np.ndarray, ...], place: tuple, look_of: tuple, surface: int) -> None:
    """A picture that faces the camera. place: (foot x y z, tall, wide, foot in the next frame); look_of: see `_blend`."""
    foot, tall, wide, next_foot = place
    box = _box(canvas.camera, foot, tall, wide)
    if box is None:
        return
    left, top, tall_px, wide_px, depth = box
    first_row, last_row = max(0, int(top + 0.5)), min(canvas.camera.height, int(np.ceil(top + tall_px - 0.5)))
    first, last = max(0, int(left + 0.5)), min(canvas.camera.width, int(np.ceil(left + wide_px - 0.5)))
    if first_row >= last_row or first >= last:
        return
    level = 0
    while level + 1 < len(levels) and (levels[level].shape[1] - 2) > 1.42 * tall_px:
        level += 1
    texture = levels[level]
    height, width = texture.shape[1] - 2, texture.shape[2] - 2
    v = (canvas.rows[first_row:last_row] - top) * (height / tall_px) + 0.5
    u = (canvas.columns[first:last] - left) * (width / wide_px) + 0.5
    v_low, u_low = v.astype(np.intp), u.astype(np.intp)
    part = texture.take(v_low, 1)
    part += (texture.take(v_low + 1, 1) - part) * (v - v_low)[:, None].astype(np.float32)
    painted = part.take(u_low, 2)
    painted += (part.take(u_low + 1, 2) - painted) * (u - u_low).astype(np.float32)
    where = (slice(first_row, last_row), slice(first, last))
    alpha = _blend(canvas, where, painted, depth, look_of)
    if canvas.has_truth:
        following = _box(canvas.next_camera, next_foot, tall, wide)
        if following is None:
            following = (1e6, 1e6, 1.0, 1.0, 0)
        scale = following[2] / tall_px
        column = following[0] + (canvas.columns[first:last] - left) * scale
        row = following[1] + (canvas.rows[first_row:last_row, None] - top) * scale
        canvas.note(where, alpha, (column + 0 * row, row + 0 * column), depth, surface)


def _box(camera: Camera, foot: np.ndarray, tall: float, wide: float) -> tuple[float, float, float, float, float] | None:
    """Left, top, height, width in pixels and depth of a picture that faces the camera; None when it is not ahead."""
    column, row, depth = camera.project(*foot)
    if depth < NEAR:
        return None
    scale = camera.focal / depth
    high = tall * scale
    return column - wide * scale / 2, row - high * (1 - GROUND_LINE), high, wide * scale, depth


def _blend(
    canvas: Canvas, where: tuple[slice, slice], painted: np.ndarray, depth: np.ndarray | float, look_of: tuple
) -> np.ndarray:
    """Lay premultiplied `4 h w` over the picture, in the haze of its depth. look_of: (tint `3`, glow, look)."""
    tint, glow, look = look_of
    share = np.minimum(depth / look.visible, 1)
    fade = np.clip((1 - share) * 5, 0, 1)
    haze = share**look.haze_power * (1 - 0.75 * glow)
    alpha = painted[3] * fade
    region = canvas.picture[(slice(None), *where)]
    region *= 1 - alpha
    if np.ndim(depth) == 0:
        region += painted[:3] * ((1 - haze) * fade * tint).astype(np.float32)[:, None, None]
        region += rgb(look.haze)[:, None, None] * (alpha * haze)
    else:
        region += painted[:3] * tint[:, None, None] * ((1 - haze) * fade)
        region += rgb(look.haze)[:, None, None] * (alpha * haze)
    return alpha


def paint_wall(canvas: Canvas, levels: tuple[np.ndarray, ...], place: tuple, look_of: tuple, surface: int) -> None:
    """A picture on an upright wall. place: (start x y z, end x y z, tall)."""
    start, end, tall = place
    camera = canvas.camera
    right, ahead = camera.sight(np.array([start[0], end[0]]), np.array([start[2], end[2]]))
    if ahead.max() < NEAR:
        return
    nearest = np.clip((NEAR - ahead[0]) / (ahead[1] - ahead[0] + 1e-9), 0, 1) if ahead.min() < NEAR else None
    shares = np.array([0.0, 1.0])
    if nearest is not None:
        shares[int(ahead[1] < ahead[0])] = nearest
    edges = camera.column + camera.focal * (right[0] + shares * (right[1] - right[0])) / (
        ahead[0] + shares * (ahead[1] - ahead[0])
    )
    left, right_edge = edges.min(), edges.max()
    first, last = max(0, int(left)), min(camera.width, int(np.ceil(right_edge)))
    if first >= last or right_edge - left < 0.05:
        return
    columns, across = canvas.columns[first:last], canvas.across[first:last]
    share = (across * ahead[0] - right[0]) / (right[1] - right[0] - across * (ahead[1] - ahead[0]))
    share = np.clip(share, shares.min(), shares.max())
    depth = ahead[0] + share * (ahead[1] - ahead[0])
    scale = camera.focal / depth
    foot = camera.row + (camera.y - (start[1] + share * (end[1] - start[1]))) * scale
    high = tall * scale
    top = foot - high * (1 - GROUND_LINE)
    first_row, last_row = max(0, int(top.min())), min(camera.height, int(np.ceil((top + high).max())))
    if first_row >= last_row:
        return
    texture = _wall_level(levels, high, right_edge - left)
    height, width = texture.shape[1] - 2, texture.shape[2] - 2
    v = np.clip((canvas.rows[first_row:last_row, None] - top) * (height / high) + 0.5, 0, height + 0.999).astype(
        np.float32
    )
    u = np.clip(share * width + 0.5, 1, width - 0.001)
    v_low, u_low = v.astype(np.int32), u.astype(np.int32)
    v_part, u_part = v - v_low, (u - u_low).astype(np.float32)
    flat, stride = texture.reshape(4, -1), width + 2
    at = v_low * stride + u_low
    painted = flat.take(at, 1)
    painted += (flat.take(at + 1, 1) - painted) * u_part
    at += stride
    lower = flat.take(at, 1)
    lower += (flat.take(at + 1, 1) - lower) * u_part
    painted += (lower - painted) * v_part
    painted *= (np.clip(columns + 0.5 - left, 0, 1) * np.clip(right_edge - columns + 0.5, 0, 1)).astype(np.float32)
    where = (slice(first_row, last_row), slice(first, last))
    alpha = _blend(canvas, where, painted, depth.astype(np.float32), look_of)
    if canvas.has_truth:
        x, z = start[0] + share * (end[0] - start[0]), start[2] + share * (end[2] - start[2])
        y = camera.y + (camera.row - canvas.rows[first_row:last_row, None]) * depth / camera.focal
        column, row, _ = canvas.next_camera.project(x + 0 * y, y, z + 0 * y)
        canvas.note(where, alpha, (column, row), depth + 0 * y, surface)


def _wall_level(levels: tuple[np.ndarray, ...], high: np.ndarray, wide: float) -> np.ndarray:
    """The halving that fits what the wall covers, between its height and its foreshortened width."""
    texels = max((levels[0].shape[1] - 2) / float(np.median(high)), 0.6 * (levels[0].shape[2] - 2) / max(wide, 1.0))
    return levels[int(np.clip(round(np.log2(max(texels, 1))), 0, len(levels) - 1))]


@dataclass(frozen=True)
class Falling:
    """Snow, rain, leaves ...: places in a box that goes with the camera and repeats, metres a second, size, colour."""

    places: np.ndarray
    velocity: np.ndarray
    radius: np.ndarray
    colour: np.ndarray
    streak: float
    cover: float


# kind: how many, colours, radius in metres, fall in metres a second, wind, seconds of a streak, cover
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
    """Soft dots or streaks over everything; returns how much they cover, `h w`."""
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
