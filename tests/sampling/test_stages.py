"""Plans of clips (`ldm/sampling/stages.py`): every frame once, from existing frames; work linear in the length."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ldm.errors import UserError
from ldm.sampling.stages import ClipPlan, count_levels, plan_interpolation, plan_stages

SETTINGS = [
    (window, overlap, levels)
    for window in (2, 3, 4, 5, 6, 9, 16, 17)
    for overlap in {1, window // 2, window - 1}
    for levels in (0, 1, 2, 3)
]


def check(plan: ClipPlan, window: int) -> None:
    """What has to be true of every plan."""
    there, before = set(plan.given), None
    for stage in plan.stages:
        assert stage.frames == range(0, plan.num_frames, stage.spacing)[: len(stage.frames)]
        for one in stage.windows:
            assert 1 <= len(one.frames) <= window
            assert one.frames.step == stage.spacing
            assert one.known == there & set(one.frames)
            assert one.made and not there & set(one.made)
            assert one.known or not there or plan.given  # nothing but the first window starts from nothing
            there |= set(one.made)
        assert there >= set(stage.frames)
        if stage.name != "beginning":
            assert len(stage.frames) == len(range(0, plan.num_frames, stage.spacing))
            assert before is None or (before.step % stage.spacing == 0 and stage.num_before == len(before))
            before = stage.frames
    assert there == set(range(plan.num_frames))


@pytest.mark.parametrize(("window", "overlap", "levels"), SETTINGS)
def test_every_frame_is_sampled_once_from_existing_frames(window, overlap, levels):
    for frames in (*range(1, 60), *range(61, 301, 9)):
        plan = plan_stages(frames, window, overlap, levels)
        check(plan, window)
        assert max(stage.spacing for stage in plan.stages) <= 4**levels
        assert plan.num_evaluations == sum(len(one.known) + len(one.made) for one in plan.windows)
        if frames <= window:
            assert [list(one.frames) for one in plan.windows] == [list(range(frames))]
        elif window > 4 and levels == 3:  # the keyframes fit one window and a continuation
            assert len(plan.stages[0].frames) <= 2 * window or plan.stages[0].spacing == 64


@pytest.mark.parametrize(("window", "overlap", "levels"), [(5, 2, 2), (16, 4, 1)])
def test_every_length(window, overlap, levels):
    for frames in range(1, 301):
        check(plan_stages(frames, window, overlap, levels), window)


@pytest.mark.parametrize(
    "given", [{0}, {0, 1}, set(range(9)), {0, 49}, {7, 8, 30}, set(range(0, 50, 3)), set(range(50))]
)
def test_given_frames_are_used_and_never_sampled(given):
    for window, overlap, levels in SETTINGS:
        plan = plan_stages(50, window, overlap, levels, given)
        made = [frame for one in plan.windows for frame in one.made]
        assert sorted(made) == sorted(set(range(50)) - given)
        check(plan, window)


def test_five_frames_become_seventeen_and_sixty_five():
    plan = plan_stages(65, 5, 1, max_levels=2)
    assert [len(stage.frames) for stage in plan.stages] == [5, 17, 65]
    assert [len(stage.windows) for stage in plan.stages] == [1, 4, 16]
    assert plan.stages[0].windows[0].frames == range(0, 65, 16) and not plan.stages[0].windows[0].known
    assert plan.stages[2].windows[3].frames == range(12, 17) and plan.stages[2].windows[3].known == {12, 16}
    assert plan.describe(10) == [
        "keyframes: 5 frames at 0.625 fps in 1 window",
        "in between: 5 -> 17 frames at 2.5 fps in 4 windows",
        "in between: 17 -> 65 frames at 10 fps in 16 windows",
        "total: 21 windows, 1.62 frames evaluated per new frame",
    ]


def test_a_larger_window_fills_several_gaps():
    plan = plan_stages(65, 17, 4, max_levels=2)
    assert [list(one.frames)[:: len(one.frames) - 1] for one in plan.stages[-1].windows] == [
        [0, 16], [16, 32], [32, 48], [48, 64],
    ]  # fmt: skip
    assert plan.stages[-1].windows[1].known == {16, 20, 24, 28, 32}


def test_lowest_training_rate_limits_the_keyframe_spacing():
    keyframes = plan_stages(181, 5, 2, max_levels=1).stages[0]
    assert keyframes.spacing == 4 and len(keyframes.frames) == 46
    assert list(keyframes.windows[1].frames) == [12, 16, 20, 24, 28] and keyframes.windows[1].known == {12, 16}
    assert [count_levels(*rates) for rates in ((10, 10), (10, 2.5), (8, 2.5), (9.99, 2.5), (10, 0.625), (2, 5))] == [
        0, 1, 0, 1, 2, 0,
    ]  # fmt: skip


def test_frames_beyond_the_last_keyframe_are_continued():
    """12 = 2 x 4 + 1 + 3: nothing is made that the clip has no use for."""
    last = plan_stages(12, 5, 1, max_levels=1).windows[-1]
    assert list(last.frames) == [8, 9, 10, 11] and last.known == {8}
    wide = plan_stages(46, 16, 4, max_levels=1).windows[-1]
    assert list(wide.frames) == list(range(36, 46)) and wide.known == {36, 40, 44}


def test_keyframes_continue_the_motion_of_given_frames():
    """Two neighbours are given; the keyframes see the first of them alone, until frames are made that they do see."""
    plan = plan_stages(65, 5, 2, max_levels=2, given=[0, 1])
    assert [(list(one.frames), sorted(one.known)) for one in plan.windows[:3]] == [
        ([0, 1, 2, 3, 4], [0, 1]), ([0, 4, 8, 12, 16], [0, 4]), ([0, 16, 32, 48, 64], [0, 16]),
    ]  # fmt: skip
    assert [stage.name for stage in plan.stages] == ["beginning"] * 2 + ["keyframes"] + ["in between"] * 2
    assert plan.describe(10)[0] == "beginning: 5 frames at 10 fps in 1 window"
    assert plan.num_evaluations == plan_stages(65, 5, 2, max_levels=2).num_evaluations
    for given in ([0], [0, 16], range(17), [3, 4]):  # no motion, or one that the keyframes see
        assert plan_stages(65, 5, 2, max_levels=2, given=given).stages[0].name == "keyframes"
    assert plan_stages(65, 5, 2, max_levels=2, given=range(9)).windows[0].frames == range(4, 24, 4)


@pytest.mark.parametrize(("window", "overlap", "levels"), [(5, 1, 1), (5, 2, 1), (5, 2, 2), (16, 4, 1), (17, 4, 2)])
def test_work_is_linear_in_the_length(window, overlap, levels):
    lengths = np.array([33, 65, 97, 129, 181, 257, 401, 1000])
    work = np.array([plan_stages(int(n), window, overlap, levels).num_evaluations for n in lengths]) / lengths
    assert work.max() < 1.15 * work.min()


@pytest.mark.parametrize(("window", "factor"), [(5, 4), (17, 4), (4, 2), (3, 2)])
def test_a_small_window_doubles_instead(window, factor):
    spacings = [stage.spacing for stage in plan_stages(65, window, 1, max_levels=2).stages]
    assert spacings[-1] == 1 and all(a == factor * b for a, b in pairwise(spacings))


# interpolation


@pytest.mark.parametrize(
    ("times", "window", "spacings"),
    [(2, 5, [1]), (4, 5, [1]), (8, 5, [2, 1]), (16, 17, [4, 1]), (3, 5, [1]), (6, 5, [3, 1]), (12, 5, [3, 1]),
     (5, 6, [1])],
)  # fmt: skip
def test_interpolation_by_factors_that_fit(times, window, spacings):
    for num_given in (2, 3, 7):
        plan = plan_interpolation((num_given - 1) * times + 1, times, window, overlap=1)
        assert [stage.spacing for stage in plan.stages] == spacings
        assert plan.given == set(range(0, plan.num_frames, times))
        assert all({one.frames[0], one.frames[-1]} <= one.known for one in plan.windows)
        check(plan, window)


def test_interpolation_under_a_mask_makes_the_given_frames_first():
    plan = plan_interpolation(17, 4, 5, overlap=2, given=())
    assert plan.stages[0].spacing == 4 and plan.stages[0].windows[0].made == [0, 4, 8, 12, 16]
    check(plan, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_stages(0, 5, 1), "frames: expected 1 to 10000, found 0"),
        (lambda: plan_stages(-1, 5, 1), "frames: expected 1 to 10000, found -1"),
        (lambda: plan_stages(10_001, 5, 1), "frames: expected 1 to 10000, found 10001"),
        (lambda: plan_stages(2, 1, 1), "window: expected at least 2 frames to sample together, found 1"),
        (lambda: plan_stages(2, 0, 1), "window: expected at least 2 frames to sample together, found 0"),
        (lambda: plan_stages(9, 5, 5), "overlap: expected 1 to 4 frames, fewer than the 5 of a window, found 5"),
        (lambda: plan_stages(9, 5, 0), "overlap: expected 1 to 4 frames, .* found 0"),
        (lambda: plan_stages(9, 5, 1, given=[9]), "given frames: expected indices from 0 to 8, found 9"),
        (lambda: plan_interpolation(1, 4, 5, 1), "interpolate: expected at least 2 given frames, each 4 .* found 1"),
        (lambda: plan_interpolation(5, 1, 5, 1), "interpolate: expected a factor of at least 2, found 1"),
        (lambda: plan_interpolation(4, 3, 2, 1), "window: expected at least 3 frames for interpolation, found 2"),
        (
            lambda: plan_interpolation(15, 14, 5, 1),
            "a product of factors up to 4, .* found 14; use 12 or 16, or a window of at least 8",
        ),
    ],
)  # fmt: skip
def test_impossible_plan_is_an_error(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_one_frame_is_one_window():
    assert plan_stages(1, 1, 1).describe(10) == ["frames: 1 frame at 10 fps in 1 window"]
