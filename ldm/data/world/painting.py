"""Painting a frame of the procedural world back to front, with its ground truth.

A picture is float32 `3 h w` in 0..255. On request every surface also writes its ground truth where it covers more than
half of a pixel: the position of that point in the next frame, its depth, and the number of the surface.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldm.data.world.backdrop import AZIMUTH, LEVELS, TEXELS, TILE, Cylinder, ground_levels
from ldm.data.world.looks import Look
from ldm.data.world.scene import HALF_ROAD, Camera, Road
from ldm.data.world.sketch import rgb

FARTHEST = 1e4  # metres: the depth of the sky
NEAR = 0.6  # metres: nothing closer is drawn
KNOTS = 90  # distances at which the road's profile is sampled
DASH_PERIOD, DASH = 9.0, 4.0
SOFT = 1.4  # width in pixels of edges on the ground
MARK = 0.16  # width of a painted line in metres
MIXED = 0.08  # a surface shares a pixel if it covers between this and 1 minus this of it
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
            self.target = np.zeros((3, *shape), np.float32)  # column, row and depth in the next frame
            self.depth = np.full(shape, FARTHEST, np.float32)
            self.surface = np.zeros(shape, np.int32)
            self.shared = np.zeros(shape, bool)  # two surfaces mix in the pixel

    def note(
        self,
        where: tuple[slice, slice],
        alpha: np.ndarray,
        target: tuple[np.ndarray | float, ...],
        depth: np.ndarray | float,
        surface: int,
    ) -> None:
        """Write the ground truth of a surface in the box `where`; target: column, row, depth in the next frame."""
        shown = alpha > 0.5
        noted = (*self.target, self.depth, self.surface)
        for plane, values in zip(noted, (*target, depth, surface), strict=True):
            np.copyto(plane[where], values, where=shown, casting="unsafe")
        shared = self.shared[where]
        shared |= alpha > MIXED
        shared &= alpha < 1 - MIXED


def paint_cylinder(canvas: Canvas, cylinder: Cylinder, last_row: int, surface: int) -> None:
    """Paint the sky (three planes, covers everything) or hills (four planes) down to `last_row`."""
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
        depth = min(cylinder.distance, FARTHEST)
        canvas.note(box, alpha, (column, row, depth), depth, surface)


@dataclass(frozen=True)
class Ground:
    """The visible ground from `first_row` down, all `h w`: depth, position x and z, metres from the middle of the road,
    the footprint of a pixel along and across the road, and the share of the pixel that is ground."""

    first_row: int
    depth: np.ndarray
    x: np.ndarray
    z: np.ndarray
    side: np.ndarray
    along: np.ndarray
    across: np.ndarray
    alpha: np.ndarray


def road_profile(camera: Camera, road: Road, visible: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The profile of the road ahead: metres along z, rows below `camera.row` at which the ground there appears, and
    their running minimum: a rise hides everything lower behind it."""
    ahead = np.geomspace(NEAR, visible, KNOTS)
    drop = camera.focal * (camera.y - road.height(camera.z + ahead)) / ahead
    return ahead, drop, np.minimum.accumulate(drop)


def see_ground(canvas: Canvas, road: Road, visible: float) -> Ground:
    """The point of the ground that each pixel shows; rises hide the ground behind them."""
    camera = canvas.camera
    ahead, drop, lowest = road_profile(camera, road, visible)
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
    side = x - middle
    along, across = _stretch(z), np.hypot(depth / camera.focal, _stretch(side))
    alpha = np.clip(rows - top + 0.5, 0, 1)
    parts = (depth, x, z + camera.z, side, along, across, alpha)
    return Ground(first, *(part.astype(np.float32) for part in parts))


def _stretch(place: np.ndarray) -> np.ndarray:
    """The footprint of a pixel: the distance between the values of adjacent rows."""
    step = np.empty_like(place)
    step[:-1] = np.abs(place[:-1] - place[1:])
    step[-1] = step[-2] if len(place) > 1 else 0.05 * place[-1]
    return np.maximum(step, 1e-3)


def paint_ground(canvas: Canvas, road: Road, look: Look, offset: tuple[float, float]) -> None:
    """Paint verge, road and marks; `offset` in metres shifts the ground's tile along and across."""
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
    colour += (asphalt * ((1 + 0.10 * grain + 0.05 * (patch - 0.5)) * tracks) - colour) * _cover(
        HALF_ROAD - off, ground.across
    )
    lines = _line(off - (HALF_ROAD - 0.3), ground.across) + _line(off, ground.across) * _dashes(ground.z, ground.along)
    colour += (mark - colour) * (lines * (0.88 + 0.06 * grain))
    far = np.minimum(ground.depth / look.visible, 1) ** look.haze_power
    colour += (rgb(look.haze)[:, None, None] - colour) * far
    part = canvas.picture[:, ground.first_row :]
    first = int((ground.alpha < 1).any(1).sum())  # rows at the far edge that are partly ground
    part[:, :first] += (colour[:, :first] - part[:, :first]) * ground.alpha[:first]
    part[:, first:] = colour[:, first:]
    if canvas.has_truth:
        target = canvas.next_camera.project(ground.x, road.height(ground.z), ground.z)
        canvas.note((slice(ground.first_row, None), slice(None)), ground.alpha, target, ground.depth, GROUND)


def _ground_texture(ground: Ground, pattern: str, offset: tuple[float, float]) -> np.ndarray:
    """The tile's planes `3 h w`, filtered to a pixel's footprint: two mipmap levels mixed along the road."""
    planes, starts = ground_levels(pattern)
    level = np.clip(np.log2(ground.along * TEXELS), 0, LEVELS[0] - 1.001)
    along = level.astype(np.int32)
    mix = level - along
    across = np.clip(np.log2(ground.across * TEXELS) + 0.3, 0, LEVELS[1] - 1).astype(np.int32)
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
    """The share of a pixel of `pixel` metres inside an edge `distance` metres away (positive inside)."""
    return np.clip(distance / (SOFT * pixel) + 0.5, 0, 1)


def _line(distance: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """The share of a pixel under a painted line whose middle is `distance` metres away."""
    pixel = SOFT * pixel
    wide = np.maximum(pixel, MARK)
    return np.clip((wide / 2 - np.abs(distance)) / pixel + 0.5, 0, 1) * (MARK / wide)


def _dashes(z: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """The exact share of a pixel of `pixel` metres along the road that lies in dashes."""
    pixel = np.maximum(SOFT * pixel, 0.02)
    count = [(z + sign * pixel / 2) / DASH_PERIOD for sign in (-1, 1)]
    painted = [np.floor(part) * DASH + np.minimum((part - np.floor(part)) * DASH_PERIOD, DASH) for part in count]
    return (painted[1] - painted[0]) / pixel
