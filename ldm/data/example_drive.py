"""A small drawn drive for the demo and the tests: a road with lane dashes, verge, trees and sky, moving past a camera.

A sketch that shows every stage something to learn, nothing more: ground and trees stand still in the world, the camera
drives forward, so everything streams away from the vanishing point.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ldm.video import write_mp4

ROAD_HALF_WIDTH = 3.2  # metres
CAMERA_HEIGHT = 2.2
DASH_PERIOD = 9.0
VISIBLE = 90.0  # metres ahead
SPEED = 0.45  # metres from frame to frame


def draw_drive(num_frames: int, size: int | tuple[int, int], seed: int) -> np.ndarray:
    """Draw a drive: uint8 RGB `t h w 3`; `size` = (h, w) or one number; the seed chooses colours, bends and trees."""
    height, width = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(seed)
    sky = np.array([120, 175, 235]) + rng.integers(-25, 20, 3)
    verge = np.array([95, 140, 60]) + rng.integers(-30, 30, 3)
    bend = rng.uniform(-0.004, 0.004)
    texture = rng.uniform(0.8, 1.2, (64, 64))  # brightness of the ground, by square metre, repeating
    length = VISIBLE + num_frames * SPEED
    num_trees = int(length / 5)
    trees = np.stack(
        [
            rng.uniform(0, length, num_trees),  # metres down the road
            rng.choice([-1, 1], num_trees) * rng.uniform(5, 13, num_trees),  # metres to the side
            rng.uniform(3, 6, num_trees),  # height
            rng.uniform(0.6, 1.1, num_trees),  # brightness
        ],
        axis=1,
    )
    frames = [
        _draw_frame(frame * SPEED, (height, width), sky, verge, bend, texture, trees) for frame in range(num_frames)
    ]
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def _draw_frame(
    travelled: float,
    size: tuple[int, int],
    sky: np.ndarray,
    verge: np.ndarray,
    bend: float,
    texture: np.ndarray,
    trees: np.ndarray,
) -> np.ndarray:
    height, width = size
    focal = 0.9 * width
    horizon = 0.42 * height
    rows = np.arange(height)[:, None] + 0.5
    columns = np.arange(width)[None] + 0.5
    picture = (sky + (255 - sky) * 0.6 * (rows / horizon).clip(0, 1)[..., None]) * np.ones((height, width, 1))

    depth = focal * CAMERA_HEIGHT / np.maximum(rows - horizon, 1e-3)  # metres ahead, by row
    side = (columns - width / 2) * depth / focal - bend * depth**2  # metres right of the middle of the road
    along = depth + travelled + 0 * side
    grain = texture[(along % 64).astype(int), (2 * side % 64).astype(int)]
    grain = 1 + (grain - 1) * np.exp(-depth / 25)
    on_road = np.abs(side) < ROAD_HALF_WIDTH
    ground = np.where(on_road[..., None], [105, 105, 110], verge) * grain[..., None]
    dash = (np.abs(side) < 0.16) & (along % DASH_PERIOD < DASH_PERIOD / 2)
    edge = np.abs(np.abs(side) - 0.9 * ROAD_HALF_WIDTH) < 0.14
    ground[(dash | edge) & on_road] = 235
    ground = 190 + (ground - 190) * np.exp(-depth / 70)[..., None]  # haze
    picture = np.where((rows > horizon)[..., None], ground, picture)

    for position, offset, tall, light in sorted(trees.tolist(), reverse=True):  # far ones first
        ahead = position - travelled
        if not 2 < ahead < VISIBLE:
            continue
        scale = focal / ahead  # pixels for a metre
        x = width / 2 + (offset + bend * ahead**2) * scale
        foot = horizon + CAMERA_HEIGHT * scale
        trunk = (np.abs(columns - x) < 0.2 * scale) & (rows < foot) & (rows > foot - 0.5 * tall * scale)
        crown = ((columns - x) / 0.32) ** 2 + ((rows - foot + 0.65 * tall * scale) / 0.4) ** 2 < (tall * scale) ** 2
        haze = np.exp(-ahead / 70)
        picture[trunk] = 190 + (np.array([80, 60, 45]) - 190) * haze
        picture[crown] = 190 + (np.array([45, 95, 45]) * light - 190) * haze
    return picture


def write_example(path: Path | str, num_frames: int = 150, size: int | tuple[int, int] = 128, seed: int = 0) -> None:
    """Draw a drive and write it as an MP4 of 25 frames a second."""
    write_mp4(path, draw_drive(num_frames, size, seed), fps=25)
