"""Measures of motion on pictures with known motion, on the procedural world and on real footage."""

from __future__ import annotations

from itertools import product

import cv2
import numpy as np
import pytest

from ldm.data.preparing.footage import read_frames
from ldm.data.world import LOOKS, WorldClip, draw_clip
from ldm.errors import UserError
from ldm.evaluation.flow import (
    PRIOR_FOCUS,
    TAU,
    Motion,
    dense_flow,
    endpoint_error,
    find_texture,
    measure_motion,
    working_flow,
)
from ldm.evaluation.motion import (
    CONTROLS,
    MEASURES,
    Reading,
    frozen_clip,
    read_measures,
    reversed_clip,
    road_expansion,
    roadside_expansion,
    shuffled_clip,
    sides_region,
    speed,
    zoomed_still,
)
from ldm.evaluation.statistics import spearman
from ldm.evaluation.true_flow import read_flow, summarise_flow

SIZE, FPS = 128, 10
LOWER = {"thunderstorm": 0.6}  # clouds and rain before the sky have texture and do not stream


def grain(size: int = 512, blur: float = 4.0) -> np.ndarray:
    """A grey surface with texture everywhere, `h w` uint8."""
    noise = cv2.GaussianBlur(np.random.default_rng(0).standard_normal((size, size)), (0, 0), blur)
    return (127 + 40 * noise / noise.std()).clip(0, 255).astype(np.uint8)


def moved(zoom: float, shift: tuple[float, float], focus: tuple[float, float], num_frames: int = 4) -> np.ndarray:
    """A surface that grows about `focus` and slides by `shift` per frame, uint8 `t 256 256 3`."""
    frames, surface = [], grain()
    whole = np.array([[1, 0, -128], [0, 1, -128], [0, 0, 1.0]])  # the middle of the surface
    step = np.array(
        [[zoom, 0, focus[0] * (1 - zoom) + shift[0]], [0, zoom, focus[1] * (1 - zoom) + shift[1]], [0, 0, 1.0]]
    )
    for number in range(num_frames):
        matrix = np.linalg.matrix_power(step, number) @ whole
        picture = cv2.warpAffine(surface, matrix[:2], (256, 256), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        frames.append(np.repeat(picture[..., None], 3, axis=-1))
    return np.stack(frames)


def readings(frames: np.ndarray) -> dict[str, Reading]:
    return read_measures(measure_motion(frames))


def values(frames: np.ndarray) -> dict[str, float | None]:
    return {name: reading.value for name, reading in readings(frames).items()}


def expansion(frames: np.ndarray) -> float:
    return roadside_expansion(measure_motion(frames))


@pytest.fixture(scope="module")
def drive() -> np.ndarray:
    """A drive through the procedural world."""
    return draw_clip("pastel painting", 7, 5, SIZE, FPS, 8.0).frames


# ---- flow


def test_flow_is_in_pixels_right_and_down():
    flow = dense_flow(moved(1, (3, -2), (128, 128))[..., 0])
    true = np.broadcast_to(np.float32([3, -2]), flow.shape)
    inner = np.zeros(flow.shape[:3], bool)
    inner[:, 16:-16, 16:-16] = True
    assert endpoint_error(flow, true, inner) < 0.1
    assert endpoint_error(flow, -true, inner) == pytest.approx(2 * 13**0.5, abs=0.1)


def test_true_flow_is_scaled_to_the_working_size():
    scaled = working_flow(np.broadcast_to(np.float32([1, 2]), (3, 64, 128, 2)))
    assert scaled.shape == (3, 128, 256, 2)
    np.testing.assert_allclose(scaled[0, 60, 60], [2, 4])
    motion = measure_motion(frozen_clip(moved(1, (0, 0), (128, 128))), np.full((3, 256, 256, 2), 1.5, np.float32))
    assert (motion.flow == 1.5).all()


def test_texture_needs_gradients_in_both_directions():
    edge = np.zeros((256, 256), np.uint8)
    edge[:, 128:] = 200
    assert not find_texture(edge).any()
    assert not find_texture(np.full((256, 256), 80, np.uint8)).any()
    assert find_texture(grain(256)).mean() > 0.95


@pytest.mark.parametrize(("zoom", "focus"), product([1.03, 1 / 1.03], [(150, 90), (100, 130)]))
def test_focus_of_expansion_is_found_in_both_directions_of_time(zoom, focus):
    assert np.linalg.norm(measure_motion(moved(zoom, (0, 0), focus)).focus - focus) < 8


def test_without_motion_the_focus_is_the_prior():
    motion = measure_motion(frozen_clip(moved(1, (0, 0), (0, 0))))
    np.testing.assert_allclose(motion.focus, np.array(PRIOR_FOCUS) * 256)


@pytest.mark.parametrize("shift", [(3, 0), (-2, 1)])
def test_rotation_is_separated_from_driving(shift):
    """A zoom about a point plus a shift is a zoom about another point: the shift is rotation if the point is known."""
    motion = measure_motion(moved(1, (0, 0), (0, 0), 2))
    x, y = np.meshgrid(np.arange(256) - 0.5 * 256, np.arange(256) - 0.45 * 256)
    nearness = np.maximum(np.maximum(y, 0) / 30, abs(x) / 90)[..., None]  # a street: ground below, walls beside
    flow = (0.02 * nearness * np.stack([x, y], -1) + shift)[None].astype(np.float32)
    found = measure_motion(np.repeat(motion.grey[..., None], 3, axis=-1), flow)
    np.testing.assert_allclose(found.rotation[0], shift, atol=0.4)
    assert read_measures(found)["roadside_expansion"].value > 0.8


# ---- measures


def test_rotation_alone_does_not_expand():
    found = values(moved(1, (4, 0), (128, 128)))
    assert abs(found["roadside_expansion"]) < 0.1 and abs(found["road_expansion"]) < 0.1


def test_a_zoom_has_no_parallax():
    found = values(moved(1.04, (0, 0), (128, 110), 5))
    assert found["roadside_expansion"] > 0.85 and found["road_expansion"] > 0.85
    assert abs(found["parallax_order"]) < 0.1
    assert found["smoothness"] > 0.7 and found["flicker"] < 0.01


def test_a_drive_and_its_control_clips(drive):
    found = values(drive)
    least = {"roadside_expansion": 0.7, "road_expansion": 0.8, "parallax_order": 0.3, "smoothness": 0.5, "speed": 0.1}
    assert all(found[name] > value for name, value in least.items()) and found["frozen_share"] == 0
    backwards = values(reversed_clip(drive))
    most = {"roadside_expansion": -0.6, "road_expansion": -0.4, "parallax_order": -0.2, "speed": -0.1}
    assert all(backwards[name] < value for name, value in most.items())
    still = values(frozen_clip(drive))
    assert still.pop("frozen_share") == 1 and all(abs(value) < 1e-3 for value in still.values())
    zoomed = values(zoomed_still(drive))
    assert zoomed["roadside_expansion"] > 0.7 and abs(zoomed["parallax_order"]) < 0.15
    assert values(shuffled_clip(drive))["smoothness"] < 0.5 * found["smoothness"]
    assert values(drive[[0, 0, 1, 2, 2]])["frozen_share"] == 0.5


def test_flicker_is_measured_along_the_motion():
    frames = moved(1.02, (0, 0), (128, 110)).astype(int)
    light = np.array([0, 20, 0, 20])[:, None, None, None]
    assert values((frames * 0.7 + 20 + light).astype(np.uint8))["flicker"] == pytest.approx(20 / 255, rel=0.1)
    assert values((frames * 0.7 + 20).astype(np.uint8))["flicker"] < 0.005


@pytest.mark.parametrize("colour", [0, (40, 90, 200), np.linspace(0, 255, 96).astype(np.uint8)[:, None, None]])
def test_without_texture_no_measure_has_a_value(colour):
    frames = np.zeros((4, 96, 96, 3), np.uint8)
    frames[:] = colour
    for reading in readings(frames).values():
        assert reading.value is None and "black, constant or has too little texture" in reading.reason


def test_each_measure_needs_its_part_of_the_picture():
    frames = moved(1.03, (0, 0), (128, 110), 3)
    bare_road, bare_side = frames.copy(), frames.copy()
    bare_road[:, 115:] = 90
    bare_side[:, :150] = 90
    found = readings(bare_road)
    assert found["roadside_expansion"].value > 0.5 and found["road_expansion"].value is None
    assert found["road_expansion"].reason == "too little texture on the road in more than half of the frames"
    assert found["speed"].reason == "too little texture on the road and its verge"
    assert "on the ground or at the horizon" in found["parallax_order"].reason
    assert readings(bare_side)["roadside_expansion"].reason.startswith("too little texture at the roadside")


def test_motion_that_cannot_be_followed(drive):
    found = readings(drive[:2])
    assert found["smoothness"] == Reading(None, "smoothness needs 3 frames, the clip has 2")
    assert found["roadside_expansion"].value > 0.7
    found = read_measures(measure_motion(drive, np.full((4, SIZE, SIZE, 2), 500, np.float32)))
    assert found["smoothness"].reason == "nothing textured stays inside the picture for three frames"
    assert found["flicker"].reason == "no two consecutive frames overlap"


def test_frames_without_measurable_motion_are_errors(drive):
    with pytest.raises(UserError, match="at least 2 frames, found 1; nothing moves in a picture"):
        measure_motion(drive[:1])
    with pytest.raises(UserError, match="at most 16 times as long as narrow, found 128x4 pixels"):
        measure_motion(drive[:, :4])
    with pytest.raises(ValueError, match="expected uint8 frames `t h w 3`, found float64"):
        measure_motion(drive / 255)


def test_every_measure_is_described():
    for measure in MEASURES.values():
        assert all(text and text[-1] != "." for text in (measure.title, measure.formula, measure.scale))
        assert measure.blind_to
    assert len({measure.title for measure in MEASURES.values()}) == len(MEASURES)


# ---- control clips


def test_control_clips_are_made_of_the_same_frames(drive):
    for name, make in CONTROLS.items():
        made = make(drive)
        assert (made.shape, made.dtype) == (drive.shape, np.uint8), name
        np.testing.assert_array_equal(made, make(drive), err_msg=name)
    np.testing.assert_array_equal(reversed_clip(drive)[0], drive[-1])
    np.testing.assert_array_equal(frozen_clip(drive)[-1], drive[0])
    np.testing.assert_array_equal(zoomed_still(drive)[0], drive[0])


@pytest.mark.parametrize("num_frames", [3, 5])
def test_shuffled_is_neither_in_order_nor_reversed(num_frames):
    for seed in range(20):
        frames = np.random.default_rng(seed).integers(0, 255, (num_frames, 2, 2, 3), dtype=np.uint8)
        shuffled = shuffled_clip(frames)
        assert sorted(map(bytes, shuffled)) == sorted(map(bytes, frames))
        assert (shuffled != frames).any() and (shuffled != frames[::-1]).any()
    np.testing.assert_array_equal(shuffled_clip(frames[:2]), frames[:2])


@pytest.mark.parametrize("every", [1, 2, 3])
def test_real_footage(highway, every):
    """Published for 25, 12.5 and 8.3 frames per second: .59, .67, .71; reversed -.57, -.65, -.69."""
    frames = np.stack(list(read_frames(highway, 25, (144, 256))))[::every]
    clips = [frames[start : start + 5] for start in np.linspace(0, len(frames) - 5, 5).astype(int)]
    rows = {name: [values(make(clip)) for clip in clips] for name, make in {"true": np.copy, **CONTROLS}.items()}

    def mean(row: str, name: str) -> float:
        return float(np.mean([clip[name] for clip in rows[row]]))

    assert mean("true", "roadside_expansion") >= 0.55 and mean("true", "road_expansion") >= 0.55
    assert mean("reversed", "roadside_expansion") <= -0.5
    assert abs(mean("frozen", "roadside_expansion")) <= 0.1
    assert abs(mean("shuffled", "roadside_expansion")) <= 0.35
    assert mean("zoomed still", "roadside_expansion") >= 0.7
    assert abs(mean("zoomed still", "parallax_order")) < 0.15
    assert mean("true", "parallax_order") > 0.35
    assert mean("shuffled", "smoothness") < 0.6 * mean("true", "smoothness")


# ---- the procedural world, whose motion is known


@pytest.mark.slow
@pytest.mark.parametrize("look", LOOKS)
def test_every_style_streams_outward(look):
    clips = [draw_clip(look, seed, 2, SIZE, FPS).frames for seed in range(1, 6)]
    least = LOWER.get(look, 0.8)
    assert np.mean([expansion(clip) for clip in clips]) >= least
    assert np.mean([expansion(reversed_clip(clip)) for clip in clips[:2]]) <= -min(least, 0.7)


@pytest.mark.slow
def test_ground_speed_follows_the_speed_of_the_car():
    speeds = (5.0, 8.0, 12.0, 16.0, 20.0, 25.0, 30.0)
    for look in ("summer dawn", "night"):
        clips = {pace: [draw_clip(look, seed, 3, SIZE, 25, pace).frames for seed in (1, 2)] for pace in speeds}
        found = [float(np.mean([speed(measure_motion(clip)) for clip in clips[pace]])) for pace in speeds]
        assert spearman(found, speeds) >= 0.95


@pytest.fixture(scope="module")
def known() -> list[tuple[WorldClip, Motion]]:
    """Clips with ground truth and the motion measured on them."""
    looks = product(("coast", "jungle"), (3, 4))
    clips = [draw_clip(look, seed, 3, SIZE, FPS, 6.0, truth=True) for look, seed in looks]
    return [(clip, measure_motion(clip.frames)) for clip in clips]


def test_measured_flow_is_close_to_true_flow(known):
    """In measured flow far surfaces move with their neighbours, so only near surfaces are compared."""
    errors = [read_flow(clip.frames, clip.flow, clip.occluded) for clip, _ in known]
    assert np.mean([each.error for each in errors]) < 0.25 * np.mean([each.length for each in errors])
    for clip, motion in known:
        true = measure_motion(clip.frames, clip.flow)
        assert road_expansion(motion) == pytest.approx(road_expansion(true), abs=0.15)
        assert np.linalg.norm(motion.rotation - true.rotation, axis=1).mean() < 0.6
        assert np.linalg.norm(motion.focus - true.focus) < 10
        depth = np.stack([cv2.resize(frame, motion.grey.shape[:0:-1]) for frame in clip.depth[:-1]])
        near = motion.textured & sides_region(motion) & (depth < 60)
        measured, truth = (
            (its.outward[near] / (np.linalg.norm(its.stream[near], axis=-1) + TAU)).mean() for its in (motion, true)
        )
        assert measured == pytest.approx(truth, abs=0.08)


def test_flow_readings(known):
    clip = known[0][0]
    reading = read_flow(clip.frames, clip.flow, clip.occluded)
    assert 0 < reading.error < 0.3 * reading.length
    assert reading.roadside_expansion == pytest.approx(reading.true_roadside_expansion, abs=0.2)
    other = read_flow(clip.frames[::-1].copy(), clip.flow, clip.occluded)
    assert other.error > other.length and other.roadside_expansion < 0 < other.true_roadside_expansion
    black = read_flow(np.zeros_like(clip.frames), clip.flow, clip.occluded)
    assert black.error is black.length is black.roadside_expansion is None
    hidden = read_flow(clip.frames, clip.flow, np.ones_like(clip.occluded))
    assert hidden.error is None and hidden.roadside_expansion > 0
    summary = summarise_flow("two", [black, reading])
    assert (summary["error"]["num_clips"], summary["error"]["num_unjudged"]) == (1, 1)
