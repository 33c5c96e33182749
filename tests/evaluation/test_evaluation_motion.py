"""The measures of motion on pictures whose motion is known, on a drawn drive and on real footage."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from ldm.data.preparing.footage import read_frames
from ldm.data.world import draw_clip
from ldm.errors import UserError
from ldm.evaluation.flow import PRIOR_FOCUS, dense_flow, endpoint_error, find_texture, measure_motion, working_flow
from ldm.evaluation.motion import (
    CONTROLS,
    MEASURES,
    frozen_clip,
    judge,
    read_measures,
    reversed_clip,
    shuffled_clip,
    zoomed_still,
)

SIZE = 128


def grain(size: int = 512, blur: float = 4.0) -> np.ndarray:
    """A grey surface with texture everywhere, `h w` uint8."""
    noise = cv2.GaussianBlur(np.random.default_rng(0).standard_normal((size, size)), (0, 0), blur)
    return (127 + 40 * noise / noise.std()).clip(0, 255).astype(np.uint8)


def moved(zoom: float, shift: tuple[float, float], focus: tuple[float, float], num_frames: int = 4) -> np.ndarray:
    """A surface that grows about `focus` and slides by `shift` from frame to frame, uint8 `t 256 256 3`."""
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


def values(frames: np.ndarray) -> dict[str, float | None]:
    return {name: reading.value for name, reading in judge(frames).items()}


@pytest.fixture(scope="module")
def drive() -> np.ndarray:
    """A drive through the drawn world."""
    return draw_clip("pastel painting", 7, 5, SIZE, 10, 8.0).frames


def test_flow_is_in_pixels_right_and_down():
    frames = moved(1, (3, -2), (128, 128))
    flow = dense_flow(frames[..., 0])
    true = np.broadcast_to(np.float32([3, -2]), flow.shape)
    inner = np.zeros(flow.shape[:3], bool)
    inner[:, 16:-16, 16:-16] = True
    assert endpoint_error(flow, true, inner) < 0.1
    assert endpoint_error(flow, -true, inner) == pytest.approx(2 * 13**0.5, abs=0.1)


def test_given_flow_is_taken_to_the_working_size():
    flow = np.broadcast_to(np.float32([1, 2]), (3, 64, 128, 2))
    scaled = working_flow(flow)
    assert scaled.shape == (3, 128, 256, 2)
    np.testing.assert_allclose(scaled[0, 60, 60], [2, 4])
    motion = measure_motion(frozen_clip(moved(1, (0, 0), (128, 128))), np.full((3, 256, 256, 2), 1.5, np.float32))
    assert (motion.flow == 1.5).all()


def test_texture_is_where_motion_can_be_told():
    edge = np.zeros((256, 256), np.uint8)
    edge[:, 128:] = 200
    assert not find_texture(edge).any()
    assert not find_texture(np.full((256, 256), 80, np.uint8)).any()
    assert find_texture(grain(256)).mean() > 0.95


@pytest.mark.parametrize("focus", [(150, 90), (100, 130)])
@pytest.mark.parametrize("zoom", [1.03, 1 / 1.03])
def test_focus_of_expansion_is_found_whichever_way_time_runs(focus, zoom):
    assert np.linalg.norm(measure_motion(moved(zoom, (0, 0), focus)).focus - focus) < 8


def test_without_motion_the_focus_is_where_cars_look():
    motion = measure_motion(frozen_clip(moved(1, (0, 0), (0, 0))))
    np.testing.assert_allclose(motion.focus, np.array(PRIOR_FOCUS) * 256)


@pytest.mark.parametrize("shift", [(3, 0), (-2, 1)])
def test_turning_is_told_from_driving(shift):
    """A zoom about a point and a shift are a zoom about another point: the shift is a turn if the point is known."""
    height, width = 256, 256
    motion = measure_motion(moved(1, (0, 0), (0, 0), 2))
    x, y = np.meshgrid(np.arange(width) - 0.5 * width, np.arange(height) - 0.45 * height)
    nearness = np.maximum(np.maximum(y, 0) / 30, abs(x) / 90)[..., None]  # a street: ground below, walls beside
    flow = (0.02 * nearness * np.stack([x, y], -1) + shift)[None].astype(np.float32)
    turned = measure_motion(np.repeat(motion.grey[..., None], 3, axis=-1), flow)
    np.testing.assert_allclose(turned.rotation[0], shift, atol=0.4)
    assert read_measures(turned)["roadside_expansion"].value > 0.8


def test_a_turn_alone_expands_nothing():
    frames = moved(1, (4, 0), (128, 128))
    assert abs(values(frames)["roadside_expansion"]) < 0.1
    assert abs(values(frames)["road_expansion"]) < 0.1


def test_a_zoom_has_no_parallax():
    found = values(moved(1.04, (0, 0), (128, 110), 5))
    assert found["roadside_expansion"] > 0.85
    assert found["road_expansion"] > 0.85
    assert abs(found["parallax_order"]) < 0.1
    assert found["smoothness"] > 0.7
    assert found["flicker"] < 0.01


def test_a_drive_and_what_is_made_of_it(drive):
    found = values(drive)
    assert found["roadside_expansion"] > 0.7
    assert found["road_expansion"] > 0.8
    assert found["parallax_order"] > 0.3
    assert found["smoothness"] > 0.5
    assert found["frozen_share"] == 0
    assert found["speed"] > 0.1
    backwards = values(reversed_clip(drive))
    assert backwards["roadside_expansion"] < -0.6
    assert backwards["road_expansion"] < -0.4
    assert backwards["parallax_order"] < -0.2
    assert backwards["speed"] < -0.1
    still = values(frozen_clip(drive))
    assert still.pop("frozen_share") == 1
    assert all(abs(value) < 1e-3 for value in still.values())
    zoomed = values(zoomed_still(drive))
    assert zoomed["roadside_expansion"] > 0.7
    assert abs(zoomed["parallax_order"]) < 0.15
    assert values(shuffled_clip(drive))["smoothness"] < 0.5 * found["smoothness"]


def test_a_stop_is_a_frozen_pair(drive):
    assert values(drive[[0, 0, 1, 2, 2]])["frozen_share"] == 0.5


def test_flicker_is_seen_through_motion():
    frames = moved(1.02, (0, 0), (128, 110)).astype(int)
    light = np.array([0, 20, 0, 20])[:, None, None, None]
    flickering = (frames * 0.7 + 20 + light).astype(np.uint8)
    steady = (frames * 0.7 + 20).astype(np.uint8)
    assert values(flickering)["flicker"] == pytest.approx(20 / 255, rel=0.1)
    assert values(steady)["flicker"] < 0.005


@pytest.mark.parametrize("kind", ["black", "constant", "gradient"])
def test_without_texture_there_is_no_number(kind):
    frames = np.zeros((4, 96, 96, 3), np.uint8)
    if kind == "constant":
        frames[:] = (40, 90, 200)
    if kind == "gradient":
        frames[:] = np.linspace(0, 255, 96).astype(np.uint8)[:, None, None]
    for reading in judge(frames).values():
        assert reading.value is None
        assert "black or constant or has too little texture" in reading.reason


def test_each_measure_needs_its_part_of_the_picture():
    frames = moved(1.03, (0, 0), (128, 110), 3)
    bare_road, bare_side = frames.copy(), frames.copy()
    bare_road[:, 115:] = 90
    bare_side[:, :150] = 90
    found = judge(bare_road)
    assert found["roadside_expansion"].value > 0.5
    assert found["road_expansion"].value is None
    assert found["road_expansion"].reason == "too little texture on the road in more than half of the frames"
    assert found["speed"].reason == "too little texture on the road and its verge"
    assert "on the ground or at the horizon" in found["parallax_order"].reason
    assert judge(bare_side)["roadside_expansion"].reason.startswith("too little texture at the roadside")


def test_two_frames_have_no_smoothness(drive):
    found = judge(drive[:2])
    assert found["smoothness"].value is None
    assert "from 3 on" in found["smoothness"].reason
    assert found["roadside_expansion"].value > 0.7


def test_what_leaves_the_picture_at_once_cannot_be_followed(drive):
    flow = np.full((4, SIZE, SIZE, 2), 500, np.float32)
    found = read_measures(measure_motion(drive, flow))
    assert found["smoothness"].reason == "nothing textured stays inside the picture for three frames"
    assert found["flicker"].reason == "no two frames show the same place"


def test_a_picture_has_no_motion(drive):
    with pytest.raises(UserError, match="at least 2 frames, found 1; nothing moves in a picture"):
        judge(drive[:1])
    with pytest.raises(UserError, match="at most 16 times as long as narrow, found 128x4 pixels"):
        judge(drive[:, :4])
    with pytest.raises(ValueError, match="expected uint8 frames `t h w 3`, found float64"):
        judge(drive / 255)


def test_every_measure_says_what_it_is():
    for measure in MEASURES.values():
        assert all(text and text[-1] != "." for text in (measure.title, measure.formula, measure.scale))
        assert measure.blind_to
    assert len({measure.title for measure in MEASURES.values()}) == len(MEASURES)


def test_references_are_made_of_the_same_frames(drive):
    for name, make in CONTROLS.items():
        made = make(drive)
        assert made.shape == drive.shape, name
        assert made.dtype == np.uint8, name
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
        assert (shuffled != frames).any()
        assert (shuffled != frames[::-1]).any()
    np.testing.assert_array_equal(shuffled_clip(frames[:2]), frames[:2])


@pytest.fixture(scope="module")
def footage(highway) -> np.ndarray:
    """Real footage, 25 frames a second."""
    return np.stack(list(read_frames(highway, 25, (144, 256))))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_real_footage(footage, every):
    """Published for 25, 12.5 and 8.3 frames a second: .59, .67, .71; reversed -.57, -.65, -.69."""
    frames = footage[::every]
    clips = [frames[start : start + 5] for start in np.linspace(0, len(frames) - 5, 5).astype(int)]
    true = [values(clip) for clip in clips]

    def mean(rows: list[dict[str, float | None]], name: str) -> float:
        return float(np.mean([row[name] for row in rows]))

    assert mean(true, "roadside_expansion") >= 0.55
    assert mean(true, "road_expansion") >= 0.55
    made = {name: [values(make(clip)) for clip in clips] for name, make in CONTROLS.items()}
    assert mean(made["reversed"], "roadside_expansion") <= -0.5
    assert abs(mean(made["frozen"], "roadside_expansion")) <= 0.1
    assert abs(mean(made["shuffled"], "roadside_expansion")) <= 0.35
    assert mean(made["zoomed still"], "roadside_expansion") >= 0.7
    assert abs(mean(made["zoomed still"], "parallax_order")) < 0.15
    assert mean(true, "parallax_order") > 0.35
    assert mean(made["shuffled"], "smoothness") < 0.6 * mean(true, "smoothness")
