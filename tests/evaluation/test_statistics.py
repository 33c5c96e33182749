"""Means, intervals and ratios over clips, rank correlation, and motion against the requested frame rate."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.evaluation.commanded_rate import summarise_rates
from ldm.evaluation.statistics import Estimate, estimate, estimate_ratio, spearman, warnings


def names(count: int) -> list[str]:
    return [f"{number}.mp4" for number in range(count)]


def test_interval_covers_the_true_mean_in_about_95_percent():
    rng = np.random.default_rng(0)
    found = [estimate(rng.normal(3, 1, 40).tolist(), names(40), seed=number) for number in range(200)]
    assert 180 <= sum(each.low <= 3 <= each.high for each in found) <= 198


def test_clips_of_one_video_are_drawn_together():
    """Ten equal clips of one video are one independent sample."""
    values = [float(video) for video in range(5) for _ in range(10)]
    together, apart = estimate(values, [str(value) for value in values]), estimate(values, names(50))
    assert together.mean == apart.mean == 2
    assert together.high - together.low > 2 * (apart.high - apart.low)
    assert apart == estimate(values, names(50)), "the same seed gives the same interval"
    single = estimate([0.0, 1.0, 2.0], ["a.mp4"] * 3)
    assert single.low < 1 < single.high, "the clips of a single video are drawn one by one"


def test_clips_without_a_value_are_counted_and_left_out():
    assert estimate([None, 2.0, 2.0], names(3)) == Estimate(2.0, 2.0, 2.0, 2, 1)
    assert estimate([None, None], names(2)) == Estimate(None, None, None, 0, 2)


def test_ratio_of_means():
    rng = np.random.default_rng(2)
    own, true = rng.normal(0.4, 0.1, 50).tolist(), rng.normal(0.8, 0.1, 60).tolist()
    found = estimate_ratio(own, names(50), true, names(60))
    assert found.mean == pytest.approx(0.5, abs=0.05) and found.low < found.mean < found.high
    assert found.num_clips == 50
    for own, true in (([1.0, 2.0], [-1.0, 1.0]), ([None, None], [1.0, 1.0]), ([1.0, 1.0], [None, None])):
        assert estimate_ratio(own, names(2), true, names(2)) is None


@pytest.mark.parametrize(
    ("videos", "expected"),
    [
        (names(30), []),
        (names(5), ["only 5 clips: the intervals are rough below 30"]),
        (["a.mp4"] * 30, ["all clips are cut from one video: the intervals do not cover other roads"]),
        (["a.mp4", "b.mp4"] * 20, ["the clips are cut from only 2 videos: the intervals are rough below 8"]),
    ],
)
def test_too_few_clips_are_a_warning(videos, expected):
    assert warnings(videos) == expected


@pytest.mark.parametrize(
    ("y", "expected"),
    [([1, 10, 100, 1000], 1), ([4, 3, 2, 1], -1), ([1, 3, 2, 4], 0.8), ([5, 5, 6, 6], 0.894)],  # ties share a rank
)
def test_spearman_depends_on_order_alone(y, expected):
    assert spearman([1, 2, 3, 4], y) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2], "at least three pairs of values, found 2 and 2"),
        ([1, 2, 3], [1, 2], "found 3 and 2"),
        ([1, 1, 1], [1, 2, 3], "found equal ones, which have no order"),
    ],
)
def test_spearman_needs_an_order(x, y, message):
    with pytest.raises(ValueError, match=message):
        spearman(x, y)


def test_motion_that_follows_the_requested_rate():
    pace = np.array([0.5, 1.0, 2.0, 4.0])
    found = summarise_rates("given", {rate: (pace / rate).tolist() for rate in (12.0, 4.0, 6.0)})
    assert found["rates"] == [4, 6, 12]
    assert found["within"]["mean"] == pytest.approx(1)  # although the clips differ in pace
    assert 0.2 < found["overall"]["mean"] < 0.6
    assert found["speed"]["4"]["mean"] == pytest.approx(3 * found["speed"]["12"]["mean"])


def test_motion_that_does_not_follow_the_requested_rate():
    assert summarise_rates("constant", {rate: [0.4, 0.4] for rate in (4, 6, 12)})["within"]["mean"] == 0
    opposite = summarise_rates("opposite", {rate: [rate, 2 * rate] for rate in (4, 6, 12)})
    assert opposite["within"]["mean"] == pytest.approx(-1) and opposite["overall"]["mean"] < 0
    some = summarise_rates("some", {4: [3.0, None, 1.0], 6: [2.0, 1.0, 0.5], 12: [1.0, 0.5, 0.2]})
    assert some["num_unjudged"] == 1 and some["within"]["num_clips"] == 2
    none = summarise_rates("none", {rate: [None, None] for rate in (4, 6, 12)})
    assert none["within"]["mean"] is None and none["overall"]["mean"] is None
