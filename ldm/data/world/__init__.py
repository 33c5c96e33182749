"""The procedural world: drives in many styles, with captions and exact flow, depth and occlusion. NumPy only.

A camera drives along a road with bends and hills, in perspective; all things have fixed positions in the world. A clip
depends on style (`look`), seed and settings alone: the same seed gives the same bytes. `LOOKS` names the styles.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ldm.config import nearest
from ldm.data.world import looks as world_looks
from ldm.data.world.backdrop import Cylinder, draw_hills, draw_sky
from ldm.data.world.captions import write_captions
from ldm.data.world.looks import Look
from ldm.data.world.painting import GROUND, SKY, Canvas, paint_cylinder, paint_ground
from ldm.data.world.scene import Camera, Cars, Road, Standing, build_world, camera_at, draw_cars, draw_road
from ldm.data.world.standing import find_seen, paint_standing
from ldm.data.world.weather import Falling, draw_weather, paint_weather
from ldm.errors import UserError

LOOKS: tuple[str, ...] = tuple(world_looks.LOOKS)
MOVING_LOOKS, STILL_LOOKS = (
    LOOKS[1::2],
    LOOKS[::2],
)  # the experiment trains on clips of the first half and only on single images of the second
SIZES = (16, 1024)  # pixels of either side
SPEEDS = (0.0, 30.0)  # metres a second
RATES = (0.5, 240.0)  # frames a second
MOST_FRAMES = 10_000
WHOLE = int | np.integer
USUAL_SPEEDS = (5.0, 10.0)
ROAD, CARS, SKIES, CAPTIONS, WEATHER = range(5)  # each part of a clip has its own random stream
COVERED = 0.04  # share of a pixel; weather that covers less is ignored in the ground truth


@dataclass(frozen=True)
class WorldClip:
    """A clip; flow, depth and occluded are None unless ground truth was requested.

    frames: uint8 RGB `t h w 3`. caption: style, road and speed; captions: that one and equivalent ones. speed `t`
    (metres per second) and yaw `t` (radians, right is positive) of the camera. flow: float32 `t-1 h w 2`, pixels right
    and down from frame t to frame t+1, of the point that is visible in frame t. depth: float32 `t h w`, metres ahead,
    10,000 for the sky. occluded: bool `t-1 h w`, pixels of frame t whose point is hidden or outside the picture in
    frame t+1. Pixels shared by two surfaces (antialiased edges) count as occluded, as do pixels under weather in either
    frame, whose flow and depth are those of the background. Flow and depth include the motion of other cars.
    """

    look: str
    caption: str
    captions: tuple[str, ...]
    fps: float
    frames: np.ndarray
    speed: np.ndarray
    yaw: np.ndarray
    flow: np.ndarray | None = None
    depth: np.ndarray | None = None
    occluded: np.ndarray | None = None


@dataclass(frozen=True)
class Scene:
    """The content of a clip before it is painted."""

    look: Look
    road: Road
    cameras: list[Camera]
    standing: Standing
    cars: Cars
    sky: Cylinder
    hills: list[Cylinder]
    falling: Falling | None
    offset: tuple[float, float]
    fps: float


def draw_clip(
    look: str,
    seed: int,
    num_frames: int,
    size: int | Sequence[int],
    fps: float,
    speed: float | None = None,
    truth: bool = False,
) -> WorldClip:
    """Draw a clip at `fps` frames per second; a longer clip begins with the frames of a shorter one.

    look: name of a style. size: (h, w) or one number, pixels. speed: metres per second, None for a random one of 5 to
    10. truth: also flow, depth and occlusion. Raises UserError for an unknown style and for values out of range.
    """
    sides = _check(look, seed, num_frames, size, fps, speed)
    scene, speeds = plan_scene(look, seed, num_frames, sides, fps, speed)
    ends = (scene.cameras[0].z, scene.cameras[-1].z)
    rng = np.random.default_rng([seed, CAPTIONS])
    captions = write_captions(scene.look, scene.road, ends, float(speeds.mean()), rng)
    frames = np.empty((num_frames, *sides, 3), np.uint8)
    truths = []
    for number, camera in enumerate(scene.cameras):
        following = scene.cameras[min(number + 1, num_frames - 1)] if truth else None
        canvas, cover = paint_frame(scene, number, camera, following)
        frames[number] = np.clip(canvas.picture + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        if truth:
            truths.append(_Truth(canvas.target, canvas.depth, canvas.surface, canvas.shared, cover > COVERED))
    yaw = np.array([camera.yaw for camera in scene.cameras])
    clip = WorldClip(look, captions[0], tuple(captions), fps, frames, speeds, yaw)
    return _with_truth(clip, truths) if truth else clip


def _check(
    look: str, seed: int, num_frames: int, size: int | Sequence[int], fps: float, speed: float | None
) -> tuple[int, int]:
    """Height and width; raises UserError for invalid arguments."""
    if look not in world_looks.LOOKS:
        near = difflib.get_close_matches(str(look), LOOKS, 1, 0.0)[0]
        raise UserError(f"look: expected one of {', '.join(LOOKS)}, found {look!r}; did you mean {near!r}?")
    sides = (size, size) if isinstance(size, WHOLE) else tuple(size) if isinstance(size, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, WHOLE) and SIZES[0] <= side <= SIZES[1] for side in sides):
        expected = f"expected one number of pixels or (height, width), each {SIZES[0]} to {SIZES[1]}"
        raise UserError(f"size: {expected}, found {size!r}")
    if not isinstance(seed, WHOLE) or seed < 0:
        raise UserError(f"seed: expected a whole number from 0, found {seed!r}")
    if not isinstance(num_frames, WHOLE) or not 1 <= num_frames <= MOST_FRAMES:
        raise UserError(f"num_frames: expected 1 to {MOST_FRAMES:,}, found {num_frames!r}")
    if not RATES[0] <= fps <= RATES[1]:
        raise UserError(f"fps: expected {RATES[0]:g} to {RATES[1]:g} frames a second, found {fps:g}")
    if speed is not None and not SPEEDS[0] <= speed <= SPEEDS[1]:
        raise UserError(f"speed: expected {SPEEDS[0]:g} to {SPEEDS[1]:g} metres a second, found {speed:g}")
    return int(sides[0]), int(sides[1])


def plan_scene(
    look: str, seed: int, num_frames: int, size: tuple[int, int], fps: float, speed: float | None
) -> tuple[Scene, np.ndarray]:
    """The content of a clip, and the camera's speed in each frame, m/s."""
    its = world_looks.LOOKS[look]
    parts = (ROAD, CARS, SKIES, WEATHER)
    rng, car_rng, sky_rng, weather_rng = (np.random.default_rng([seed, part]) for part in parts)
    road = draw_road(rng)
    usual = rng.uniform(*USUAL_SPEEDS)
    speed = usual if speed is None else float(speed)
    seconds = np.arange(num_frames) / fps
    speeds = speed * (1 + 0.06 * np.sin(seconds * 2 * np.pi / rng.uniform(6, 12) + rng.uniform(0, 6.28)))
    places = [0.0]
    for step in speeds[:-1] / fps:
        places.append(places[-1] + step * float(np.cos(road.heading(places[-1]))))
    cameras = [camera_at(road, z, size) for z in places]
    resolution = int(np.clip(2 ** np.round(np.log2(min(size) * 0.8)), 32, 256))
    return Scene(
        look=its,
        road=road,
        cameras=cameras,
        standing=build_world(its, road, seed, places[-1] + its.visible, resolution),
        cars=draw_cars(its, car_rng, speed, num_frames / fps, resolution),
        sky=draw_sky(its, sky_rng, cameras[0].focal),
        hills=draw_hills(its, sky_rng, cameras[0].focal),
        falling=draw_weather(its.weather, weather_rng) if its.weather else None,
        offset=(rng.uniform(0, 64), rng.uniform(0, 32)),
        fps=fps,
    ), speeds


def paint_frame(scene: Scene, number: int, camera: Camera, following: Camera | None) -> tuple[Canvas, np.ndarray]:
    """Paint frame `number`, with ground truth towards the camera `following`; also the cover of weather, `h w`."""
    canvas = Canvas(camera, following)
    look = scene.look
    last_row = min(camera.height, int(camera.row + 0.16 * camera.focal) + 2)
    paint_cylinder(canvas, scene.sky, last_row, SKY)
    for layer, hills in enumerate(scene.hills):
        paint_cylinder(canvas, hills, last_row, GROUND + 1 + layer)
    paint_ground(canvas, scene.road, look, scene.offset)
    seconds = number / scene.fps
    everything = scene.standing.joined(scene.cars.standing(scene.road, seconds))
    later = np.concatenate([scene.standing.start, scene.cars.feet(scene.road, seconds + 1 / scene.fps)])
    seen = find_seen(canvas, scene.road, look, everything, later, GROUND + 1 + len(scene.hills))
    paint_standing(canvas, seen, look)
    cover = np.zeros((camera.height, camera.width), np.float32)
    if scene.falling is not None:
        cover = paint_weather(canvas, scene.falling, seconds)
    return canvas, cover


@dataclass(frozen=True)
class _Truth:
    """Ground truth of each pixel of a frame: column, row and depth in the next frame, `3 h w`; depth, surface, whether
    surfaces share it and whether weather covers it, `h w`."""

    target: np.ndarray
    depth: np.ndarray
    surface: np.ndarray
    shared: np.ndarray
    weather: np.ndarray


def _with_truth(clip: WorldClip, truths: list[_Truth]) -> WorldClip:
    """Add flow, depth and occlusion, computed from consecutive frames."""
    height, width = clip.frames.shape[1:3]
    here = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5))
    flow = np.empty((len(truths) - 1, height, width, 2), np.float32)
    occluded = np.empty((len(truths) - 1, height, width), bool)
    for number, (now, later) in enumerate(pairwise(truths)):
        flow[number] = np.moveaxis(now.target[:2] - here, 0, -1)
        column, row = np.floor(now.target[:2] - 0.5).astype(np.int64)
        hidden = now.shared | now.weather | (column < 0) | (row < 0) | (column > width - 2) | (row > height - 2)
        column, row = np.clip(column, 0, width - 2), np.clip(row, 0, height - 2)
        for down, across in ((0, 0), (0, 1), (1, 0), (1, 1)):
            place = (row + down, column + across)
            hidden |= (later.surface[place] != now.surface) | later.weather[place]
            hidden |= later.depth[place] < 0.8 * now.target[2] - 1  # hidden by a rise of the road
        occluded[number] = hidden
    depth = np.stack([truth.depth for truth in truths])
    return WorldClip(**{**vars(clip), "flow": flow, "depth": depth, "occluded": occluded})


FIRST_SEED = 2**41  # above the seeds of training and validation
GROUPS = {"all": LOOKS, "moving": MOVING_LOOKS, "still": STILL_LOOKS}


@dataclass(frozen=True)
class UnseenScene:
    """A scene that no training or validation contains: a style and a seed."""

    look: str
    seed: int

    def draw(self, num_frames: int, size: tuple[int, int], fps: float, truth: bool = False) -> WorldClip:
        """The scene's clip, size (h, w), at a random speed; raises UserError as `draw_clip` does."""
        return draw_clip(self.look, self.seed, num_frames, size, fps, truth=truth)

    def caption_of(self, clip: WorldClip) -> str:
        """One of the clip's captions, chosen by the seed."""
        return clip.captions[np.random.default_rng((self.seed, 1)).integers(len(clip.captions))]


def choose_looks(text: str) -> tuple[str, ...]:
    """The styles that `--looks` names: all, moving, still, or comma-separated names; raises UserError.

    moving: the styles that the experiment trains with motion; still: the others.
    """
    if text in GROUPS:
        return GROUPS[text]
    looks = tuple(dict.fromkeys(" ".join(word.split()) for word in text.split(",")))
    for look in looks:
        if look not in LOOKS:
            known = (*GROUPS, *LOOKS)
            raise UserError(f"--looks: expected {', '.join(GROUPS)} or styles, found {look!r}; {nearest(look, known)}")
    return looks


def unseen_scenes(looks: tuple[str, ...], num: int, first: int = 0) -> list[UnseenScene]:
    """`num` scenes from number `first` on, the styles in turn."""
    return [UnseenScene(looks[number % len(looks)], FIRST_SEED + first + number) for number in range(num)]
