"""Painting the upright things of the procedural world: billboards and walls.

Everything that can be computed for all of them at once is vectorised; each is then resampled and blended into its box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ldm.data.world.looks import Look
from ldm.data.world.painting import NEAR, Canvas, road_profile
from ldm.data.world.scene import Camera, Road, Standing
from ldm.data.world.sketch import GROUND_LINE, rgb
from ldm.data.world.things import STEPS

SHARPEST = 1.0  # texels per pixel, at most
SMALLEST = (1.0, 2.2)  # height in pixels between which things fade in


@dataclass(frozen=True)
class Seen:
    """The visible upright pictures of a frame, far ones first.

    next_start: the foot in the next frame. surface: its number. right, ahead: metres of both ends `n 2`. fade: opacity
    0..1. cut: the row below which a rise of the road hides it.
    """

    standing: Standing
    next_start: np.ndarray
    surface: np.ndarray
    right: np.ndarray
    ahead: np.ndarray
    fade: np.ndarray
    cut: np.ndarray


def find_seen(
    canvas: Canvas, road: Road, look: Look, standing: Standing, next_start: np.ndarray, first_surface: int
) -> Seen:
    """Select the pictures that the camera sees and sort them, far ones first."""
    camera = canvas.camera
    right = np.empty((len(standing.start), 2))
    ahead = np.empty_like(right)
    for side, ends in enumerate((standing.start, standing.end)):
        right[:, side], ahead[:, side] = camera.sight(ends[:, 0], ends[:, 2])
    limit = camera.width / 2 / camera.focal
    nearest, farthest = ahead.min(1), ahead.max(1)
    inward = np.abs(right).min(1) * (np.sign(right[:, 0]) == np.sign(right[:, 1])) - standing.wide / 2
    pixels = standing.tall * camera.focal / np.maximum(nearest, NEAR)
    fade = np.clip((1 - ahead.mean(1) / look.visible) * 5, 0, 1)
    fade *= np.clip((pixels - SMALLEST[0]) / (SMALLEST[1] - SMALLEST[0]), 0, 1)
    ahead_enough = np.where(standing.wide > 0, nearest, farthest) > NEAR
    seen = np.nonzero(ahead_enough & (fade > 0) & (inward < limit * np.maximum(farthest, NEAR) + 0.1))[0]
    seen = seen[np.argsort(-ahead[seen].mean(1), kind="stable")]
    chosen = standing.chosen(seen)
    cut = _hidden_below(camera, road, look.visible, chosen)
    return Seen(chosen, next_start[seen], first_surface + seen, right[seen], ahead[seen], fade[seen], cut)


def _hidden_below(camera: Camera, road: Road, visible: float, standing: Standing) -> np.ndarray:
    """The row below which a rise of the road hides each thing; infinite where the foot is visible."""
    ahead, _, lowest = road_profile(camera, road, visible)
    z = np.maximum(np.minimum(standing.start[:, 2], standing.end[:, 2]) - camera.z, NEAR)
    foot = camera.focal * (camera.y - standing.start[:, 1]) / z
    rise = np.interp(0.96 * z, ahead, lowest)
    right, depth = camera.sight(standing.start[:, 0], standing.start[:, 2])
    turn = np.cos(camera.yaw) - right / np.maximum(depth, NEAR) * np.sin(camera.yaw)
    return np.where(foot > rise + 0.5, camera.row + turn * rise, np.inf)


def paint_standing(canvas: Canvas, seen: Seen, look: Look) -> None:
    """Paint all of them, far ones first."""
    if not len(seen.surface):
        return
    standing, camera = seen.standing, canvas.camera
    depth = np.maximum(seen.ahead[:, 0], NEAR)
    scale = camera.focal / depth
    tall, wide = standing.tall * scale, standing.wide * scale
    left = camera.column + seen.right[:, 0] * scale - wide / 2
    top = camera.row + (camera.y - standing.start[:, 1]) * scale - tall * (1 - GROUND_LINE)
    edges = ((top, camera.height), (top + tall, camera.height), (left, camera.width), (left + wide, camera.width))
    bounds = [np.clip(np.ceil(edge - 0.5), 0, side).astype(int) for edge, side in edges]
    bounds[1] = np.minimum(bounds[1], np.minimum(np.ceil(seen.cut - 0.5), camera.height).astype(int))
    texels = np.array([levels[0].shape[1] - 2 for levels in standing.levels])
    level = np.ceil(STEPS * np.log2(np.maximum(texels / (SHARPEST * tall), 1))).astype(int)
    mixing = _mixing(seen, look, depth)
    boxes = np.stack([top, left, tall, wide], 1).tolist()
    is_wall = (standing.wide == 0).tolist()
    for at, (box, rows, columns) in enumerate(
        zip(boxes, np.stack(bounds[:2], 1).tolist(), np.stack(bounds[2:], 1).tolist(), strict=True)
    ):
        if is_wall[at]:
            _paint_wall(canvas, seen, at, look)
        elif rows[0] < rows[1] and columns[0] < columns[1]:
            levels = standing.levels[at]
            texture = levels[min(level[at], len(levels) - 1)]
            where = (slice(*rows), slice(*columns))
            alpha = _paint_facing(canvas, texture, where, box, mixing[at])
            if canvas.has_truth:
                _note_facing(canvas, seen, at, where, box, alpha)


def _mixing(seen: Seen, look: Look, depth: np.ndarray) -> np.ndarray:
    """Matrices `n 4 4` that apply tint, haze and fading to premultiplied colours."""
    standing = seen.standing
    haze = np.minimum(depth / look.visible, 1) ** look.haze_power * (1 - 0.75 * standing.glow)
    mixing = np.zeros((len(depth), 4, 4), np.float32)
    for channel, colour in enumerate(rgb(look.haze)):
        mixing[:, channel, channel] = standing.tint[:, channel] * (1 - haze) * seen.fade
        mixing[:, channel, 3] = colour * haze * seen.fade
    mixing[:, 3, 3] = seen.fade
    return mixing


def _paint_facing(
    canvas: Canvas, texture: np.ndarray, where: tuple[slice, slice], box: list[float], mixing: np.ndarray
) -> np.ndarray:
    """Blend a picture into the box (top, left, height, width in pixels); returns its cover."""
    top, left, tall, wide = box
    v = (canvas.rows[where[0]] - top) * ((texture.shape[1] - 2) / tall) + 0.5
    u = (canvas.columns[where[1]] - left) * ((texture.shape[2] - 2) / wide) + 0.5
    v_low, u_low = v.astype(np.intp), u.astype(np.intp)
    v -= v_low
    u -= u_low
    part = texture.take(v_low, 1)
    v_low += 1
    part += (texture.take(v_low, 1) - part) * v.astype(np.float32)[:, None]
    painted = part.take(u_low, 2)
    u_low += 1
    painted += (part.take(u_low, 2) - painted) * u.astype(np.float32)
    painted = (mixing @ painted.reshape(4, -1)).reshape(painted.shape)
    region = canvas.picture[:, where[0], where[1]]
    region *= 1 - painted[3]
    region += painted[:3]
    return painted[3]


def _note_facing(
    canvas: Canvas, seen: Seen, at: int, where: tuple[slice, slice], box: list[float], alpha: np.ndarray
) -> None:
    camera, following = canvas.camera, canvas.next_camera
    column, row, depth = following.project(*seen.next_start[at])
    scale = float(seen.ahead[at, 0]) / max(float(depth), 1e-3)
    foot_row = box[0] + box[2] * (1 - GROUND_LINE)
    columns = column + (canvas.columns[where[1]] - (box[1] + box[3] / 2)) * scale
    rows = row + (canvas.rows[where[0], None] - foot_row) * scale
    if depth < NEAR:  # then it is beside or behind the camera
        columns = columns + 4 * camera.width
    target = (columns + 0 * rows, rows + 0 * columns, float(depth))
    canvas.note(where, alpha, target, float(seen.ahead[at, 0]), int(seen.surface[at]))


def _paint_wall(canvas: Canvas, seen: Seen, at: int, look: Look) -> None:
    """Paint a picture on an upright wall between two points; every column has its own depth."""
    camera, standing = canvas.camera, seen.standing
    (right, right_end), (ahead, ahead_end) = seen.right[at].tolist(), seen.ahead[at].tolist()
    shares = [0.0, 1.0]
    if min(ahead, ahead_end) < NEAR:
        shares[int(ahead_end < ahead)] = (NEAR - ahead) / (ahead_end - ahead)
    ends = [(right + share * (right_end - right)) / (ahead + share * (ahead_end - ahead)) for share in shares]
    left, last = sorted(camera.column + camera.focal * end for end in ends)
    columns = slice(max(0, int(left)), max(0, min(camera.width, math.ceil(last))))
    if columns.start >= columns.stop or last - left < 0.05:
        return
    across = canvas.across[columns]
    share = (across * ahead - right) / (right_end - right - across * (ahead_end - ahead))
    share = np.minimum(np.maximum(share, shares[0]), shares[1])
    depth = ahead + share * (ahead_end - ahead)
    start, end, tall = standing.start[at].tolist(), standing.end[at].tolist(), float(standing.tall[at])
    scale = camera.focal / depth
    high = tall * scale
    top = camera.row + ((camera.y - start[1] - tall * (1 - GROUND_LINE)) - share * (end[1] - start[1])) * scale
    foot = min((top + high).max(), seen.cut[at] + 0.5, camera.height)
    rows = slice(max(0, int(top.min())), max(0, math.ceil(foot)))
    if rows.start >= rows.stop:
        return
    texture = _wall_level(standing.levels[at], float(high[len(high) // 2]), (last - left) / (shares[1] - shares[0]))
    painted = _wall_picture(texture, (canvas.rows[rows, None] - top) / high, share)
    edges = np.minimum(canvas.columns[columns] + (0.5 - left), (last + 0.5) - canvas.columns[columns])
    fade = np.minimum(np.maximum(edges, 0), 1) * float(seen.fade[at])
    haze = np.minimum(depth / look.visible, 1) ** look.haze_power * (1 - 0.75 * float(standing.glow[at]))
    alpha = painted[3] * fade
    region = canvas.picture[:, rows, columns]
    region *= 1 - alpha
    region += painted[:3] * (standing.tint[at][:, None] * ((1 - haze) * fade))[:, None]
    region += rgb(look.haze)[:, None, None] * (alpha * haze)
    if canvas.has_truth:
        place = np.array(start) + share[:, None] * np.subtract(end, start)
        y = camera.y + (camera.row - canvas.rows[rows, None]) / scale
        target = canvas.next_camera.project(place[:, 0] + 0 * y, y, place[:, 2] + 0 * y)
        canvas.note((rows, columns), alpha, target, depth + 0 * y, int(seen.surface[at]))


def _wall_picture(texture: np.ndarray, down: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The picture `4 h w` at shares 0..1 of its height (`h w`) and of its width (`w`)."""
    height, width = texture.shape[1] - 2, texture.shape[2] - 2
    v = np.minimum(np.maximum(down * height + 0.5, 0), height + 0.999).astype(np.float32, copy=False)
    u = np.minimum(np.maximum(share * width + 0.5, 1), width - 0.001)
    v_low, u_low = v.astype(np.int32), u.astype(np.int32)
    v -= v_low
    u_part = (u - u_low).astype(np.float32)
    flat, stride = texture.reshape(4, -1), width + 2
    at = v_low * stride + u_low
    painted, beside = flat.take(at, 1), flat.take(at + 1, 1)
    beside -= painted
    beside *= u_part
    painted += beside
    at += stride
    lower, beside = flat.take(at, 1), flat.take(at + 1, 1)
    beside -= lower
    beside *= u_part
    lower += beside
    lower -= painted
    lower *= v
    painted += lower
    return painted


def _wall_level(levels: tuple[np.ndarray, ...], tall: float, wide: float) -> np.ndarray:
    """The level for a wall of `tall` x `wide` pixels."""
    texels = max((levels[0].shape[1] - 2) / max(tall, 1), (levels[0].shape[2] - 2) / max(wide, 1))
    return levels[min(math.ceil(STEPS * math.log2(max(texels, 1))), len(levels) - 1)]
