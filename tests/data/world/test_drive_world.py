"""The drawn world: the same seed the same bytes, motion that is what it says it is, captions, and bad input."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from ldm.data.world import LOOKS, draw_clip, paint_frame, plan_scene
from ldm.data.world.looks import LOOKS as THEIR_LOOKS
from ldm.data.world.looks import STYLES_FILE, read_styles
from ldm.data.world.standing import find_seen
from ldm.data.world.things import BILLBOARDS, BOXES, WALLS
from ldm.data.world.weather import WEATHER
from ldm.errors import UserError

SIZE = 64


def warped(frame: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """What the flow `h w 2` says a frame was before: `frame` at each pixel's target, joined from four neighbours."""
    height, width = frame.shape[:2]
    x = np.clip(np.arange(width) + flow[..., 0], 0, width - 1.001)
    y = np.clip(np.arange(height)[:, None] + flow[..., 1], 0, height - 1.001)
    column, row = x.astype(int), y.astype(int)
    across, down = (x - column)[..., None], (y - row)[..., None]
    upper = frame[row, column] * (1 - across) + frame[row, column + 1] * across
    lower = frame[row + 1, column] * (1 - across) + frame[row + 1, column + 1] * across
    return upper * (1 - down) + lower * down


def warp_error(clip) -> float:
    """Mean grey levels between each frame and the next one taken back by the flow, where nothing is hidden."""
    errors = [
        np.abs(warped(later.astype(float), flow) - now).mean(-1)[~hidden].mean()
        for now, later, flow, hidden in zip(clip.frames[:-1], clip.frames[1:], clip.flow, clip.occluded, strict=True)
    ]
    return float(np.mean(errors))


def test_there_are_looks_enough_and_those_of_the_post():
    assert len(LOOKS) >= 24
    assert {"cyberpunk", "volcano fire", "summer dawn"} <= set(LOOKS)


def test_every_kind_that_a_style_names_can_be_drawn():
    for look in THEIR_LOOKS.values():
        assert {things.kind for things in look.things} <= {*BILLBOARDS, *BOXES}
        assert look.rail is None or look.rail[0] in WALLS
        assert look.weather is None or look.weather in WEATHER


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ('haze: "#5d2118"', 'haze: "#5d21"', "found the colour '#5d21'"),
        ("visible: 100", "visibel: 100", "'visibel'"),
        ("pattern: lava", "", "'pattern'"),
        ("  things:", "  objects:", "'things'"),
        ("kind: mound, ", "", "'kind'"),
    ],
)
def test_malformed_styles_are_refused(tmp_path, before, after, found):
    path = tmp_path / "looks.yaml"
    text = STYLES_FILE.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(UserError, match=rf"volcano fire: expected the keys of a style .*{re.escape(found)}"):
        read_styles(path)


@pytest.mark.parametrize("look", LOOKS)
def test_flow_takes_the_next_frame_back(look):
    """Two seeds; frozen flow does worse by far, so the figure is not that of a picture without texture."""
    clips = [draw_clip(look, seed, 3, 96, 8, truth=True) for seed in (5, 6)]
    for clip in clips:
        assert clip.frames.shape == (3, 96, 96, 3)
        assert clip.flow.shape == (2, 96, 96, 2)
        assert clip.occluded.mean() < 0.6
        assert clip.frames.std() > 12
        still = replace(clip, flow=np.zeros_like(clip.flow))
        assert warp_error(still) > 2 * warp_error(clip)
    assert np.mean([warp_error(clip) for clip in clips]) < 1.5


def test_the_same_seed_gives_the_same_bytes():
    first, again, other = (draw_clip("snow", seed, 3, SIZE, 8) for seed in (3, 3, 4))
    assert first.frames.tobytes() == again.frames.tobytes()
    assert first.captions == again.captions
    assert first.frames.tobytes() != other.frames.tobytes()


def test_ground_truth_changes_no_pixel():
    with_it, without = (draw_clip("rain", 3, 2, SIZE, 8, truth=truth) for truth in (True, False))
    assert np.array_equal(with_it.frames, without.frames)
    assert without.flow is None


def test_a_longer_clip_begins_like_a_shorter_one():
    long, short = (draw_clip("autumn wood", 7, frames, SIZE, 8) for frames in (7, 3))
    assert np.array_equal(long.frames[:3], short.frames)


@pytest.mark.parametrize("size", [(16, 16), (16, 150), (150, 16), (33, 57)])
def test_any_size(size):
    clip = draw_clip("old village", 1, 2, size, 24, truth=True)
    assert clip.frames.shape == (2, *size, 3)
    assert np.isfinite(clip.flow).all()
    assert (clip.depth > 0).all()


def test_twice_the_frame_rate_is_every_other_frame():
    slow, fast = draw_clip("mars", 2, 3, SIZE, 6, speed=9), draw_clip("mars", 2, 5, SIZE, 12, speed=9)
    difference = np.abs(fast.frames[::2].astype(int) - slow.frames)
    assert difference.mean() < 2  # the speed itself changes a little on the way


def test_displacement_follows_speed():
    speeds = (0.0, 4.0, 8.0, 16.0, 30.0)
    moved = []
    for speed in speeds:
        clip = draw_clip("fog", 11, 2, SIZE, 10, speed=speed, truth=True)
        road = (clip.depth[0] < 20) & (np.arange(SIZE)[:, None] > 0.6 * SIZE)
        moved.append(np.median(np.linalg.norm(clip.flow[0], axis=-1)[road]))
        assert clip.speed == pytest.approx([speed, speed], rel=0.07)
    assert moved[0] < 1e-4
    assert np.all(np.diff(moved) > 0.3)


def test_the_camera_goes_as_fast_as_it_says():
    scene, speeds = plan_scene("desert", 3, 30, (SIZE, SIZE), 10, 12.0)
    places = np.array([(camera.x, camera.z) for camera in scene.cameras])
    steps = np.linalg.norm(np.diff(places, axis=0), axis=1)
    assert steps * 10 == pytest.approx(speeds[:-1], rel=0.03)  # a lane is longer outside a bend than inside


def seen_from(camera, place: np.ndarray) -> np.ndarray:
    """Column and row of a place in the world, worked out by hand: turn by the yaw, divide by the depth."""
    offset = place - [camera.x, camera.y, camera.z]
    turn = np.array(
        [[np.cos(camera.yaw), 0, -np.sin(camera.yaw)], [0, 1, 0], [np.sin(camera.yaw), 0, np.cos(camera.yaw)]]
    )
    right, up, ahead = turn @ offset
    return np.array([camera.width / 2 + camera.focal * right / ahead, camera.row - camera.focal * up / ahead])


@pytest.mark.slow
def test_a_thing_is_seen_where_its_place_in_the_world_projects_to():
    scene, _ = plan_scene("desert", 4, 16, (256, 256), 8, 8.0)
    poles = np.flatnonzero(scene.standing.tall > 5.9)
    pole = next(at for at in poles if 22 < scene.standing.start[at][2] < 40)
    alone, empty = (replace(scene, standing=scene.standing.chosen(np.array(which, int))) for which in ([pole], []))
    for number in (0, 5, 10):
        camera = scene.cameras[number]
        with_it, without = (paint_frame(those, number, camera, None)[0].picture for those in (alone, empty))
        rows, columns = np.nonzero(np.abs(with_it - without).max(0) > 25)
        foot = scene.standing.start[pole]
        column, row = seen_from(camera, foot)
        _, top = seen_from(camera, foot + np.array([0, 0.97 * scene.standing.tall[pole], 0]))
        assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(column, abs=1)
        assert rows.max() + 1 == pytest.approx(row, abs=2)
        assert max(rows.min(), 0) == pytest.approx(max(top, 0), abs=2)


def test_flow_is_what_depth_and_the_cameras_say():
    """Of every pixel that stands still in the world: where its place is seen from the next camera."""
    scene, _ = plan_scene("cyberpunk", 1, 2, (SIZE, SIZE), 8, 8.0)
    clip = draw_clip("cyberpunk", 1, 2, SIZE, 8, 8.0, truth=True)
    camera, following = scene.cameras
    rows, columns = np.nonzero((clip.depth[0] < 200) & ~clip.occluded[0])
    depth = clip.depth[0][rows, columns]
    right, up = (columns + 0.5 - camera.column) / camera.focal * depth, (camera.row - rows - 0.5) / camera.focal * depth
    sine, cosine = np.sin(camera.yaw), np.cos(camera.yaw)
    places = np.stack(
        [camera.x + right * cosine + depth * sine, camera.y + up, camera.z - right * sine + depth * cosine]
    )
    targets = np.stack([seen_from(following, place) for place in places.T])
    flow = clip.flow[0][rows, columns]
    error = np.abs(targets - np.stack([columns + 0.5, rows + 0.5], 1) - flow).max(1)
    assert len(error) > 1000
    assert np.quantile(error, 0.9) < 0.15  # cars go their own way; what faces the camera turns with it
    assert np.median(np.linalg.norm(flow, axis=1)) > 1


def test_things_come_into_sight_little_by_little():
    scene, _ = plan_scene("wheat fields", 2, 60, (SIZE, SIZE), 8, 8.0)
    fades = {}
    for number in range(0, 60, 4):
        canvas, _ = paint_frame(replace(scene, falling=None), number, scene.cameras[number], None)
        standing = scene.standing
        seen = find_seen(canvas, scene.road, scene.look, standing, standing.start, 0)
        for surface, fade in zip(seen.surface.tolist(), seen.fade.tolist(), strict=True):
            fades.setdefault(surface, []).append(fade)
    newcomers = [fade for at, fade in fades.items() if scene.standing.start[at][2] > scene.look.visible]
    assert len(newcomers) > 20
    assert np.mean([fade[0] for fade in newcomers]) < 0.35
    assert all(np.diff(fade).min(initial=0) > -1e-6 for fade in newcomers)


def test_what_is_seen_standing_still_stands_still():
    clip = draw_clip("fog", 11, 3, SIZE, 8, speed=0, truth=True)
    ground = (clip.depth[0] < 60) & ~clip.occluded[0] & (np.abs(clip.flow[0]).max(-1) < 1e-3)
    assert ground.mean() > 0.3
    assert np.array_equal(clip.frames[0][ground], clip.frames[1][ground])


def test_yaw_and_captions_agree_on_the_bend():
    turned = {"left": [], "right": []}
    for seed in range(30):
        clip = draw_clip("desert", seed, 4, 16, 0.5, speed=10)
        for side, yaws in turned.items():
            if side in clip.caption and "sides" not in clip.caption:
                yaws.append(clip.yaw[-1] - clip.yaw[0])
    assert len(turned["left"]) >= 3
    assert len(turned["right"]) >= 3
    assert max(turned["left"]) < 0 < min(turned["right"])


@pytest.mark.parametrize("look", LOOKS)
def test_captions_name_the_look(look):
    clip = draw_clip(look, 9, 1, 16, 8)
    phrases = THEIR_LOOKS[look].phrases
    assert clip.caption == clip.captions[0]
    assert len(set(clip.captions)) == 4
    assert all(any(phrase in caption for phrase in phrases) for caption in clip.captions)
    assert re.match(rf"(an? )?{phrases[0]} scenic byway road drive, .+, .+", clip.caption)
    assert clip.captions[-1] == f"{phrases[0]} scenic byway road drive"


def test_no_two_looks_share_a_phrase():
    phrases = [phrase for look in THEIR_LOOKS.values() for phrase in look.phrases]
    assert len(phrases) == len(set(phrases))


@pytest.mark.parametrize(
    ("speed", "words"),
    [(0, "standing still|stopped"), (3, "slow|gentle"), (7, "medium|easy|cruising"), (12, "fast|quick|high"),
     (28, "very fast|racing|top speed")],
)  # fmt: skip
def test_captions_name_the_speed(speed, words):
    for caption in draw_clip("snow", 1, 1, 16, 8, speed=speed).captions[:-1]:
        assert re.search(words, caption.rpartition(",")[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"look": "cyberpnk"}, "look: expected one of .*found 'cyberpnk'; did you mean 'cyberpunk'"),
        ({"look": None}, "look: expected one of .*found None"),
        ({"size": 15}, r"size: expected one number of pixels or \(height, width\), each 16 to 1024, found 15"),
        ({"size": (64, 1025)}, r"size: .* found \(64, 1025\)"),
        ({"size": (64, 64, 3)}, r"size: .* found \(64, 64, 3\)"),
        ({"size": 64.5}, "size: .* found 64.5"),
        ({"speed": -1}, "speed: expected 0 to 30 metres a second, found -1"),
        ({"speed": 31}, "speed: expected 0 to 30 metres a second, found 31"),
        ({"speed": float("nan")}, "speed: expected 0 to 30 metres a second, found nan"),
        ({"fps": 0}, "fps: expected 0.5 to 240 frames a second, found 0"),
        ({"num_frames": 0}, "num_frames: expected 1 to 10,000, found 0"),
        ({"num_frames": 10_001}, "num_frames: expected 1 to 10,000, found 10001"),
        ({"seed": -1}, "seed: expected a whole number from 0, found -1"),
        ({"seed": 0.5}, "seed: expected a whole number from 0, found 0.5"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(UserError, match=message):
        draw_clip(**{"look": "snow", "seed": 0, "num_frames": 2, "size": 32, "fps": 8, **changes})
