"""Means, intervals and ratios over clips, and rank correlation."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.evaluation.statistics import Estimate, estimate, estimate_ratio, spearman, warnings


def names(count: int) -> list[str]:
    return [f"{number}.mp4" for number in range(count)]


def test_interval_holds_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for number in range(200):
        found = estimate(rng.normal(3, 1, 40).tolist(), names(40), seed=number)
        hits += found.low <= 3 <= found.high
    assert 180 <= hits <= 198


def test_clips_of_one_video_are_drawn_together():
    """Ten clips that say the same are one witness."""
    values = [float(video) for video in range(5) for _ in range(10)]
    together = estimate(values, [str(value) for value in values])
    apart = estimate(values, names(50))
    assert together.mean == apart.mean == 2
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_clips_of_a_single_video_are_drawn_one_by_one():
    found = estimate([0.0, 1.0, 2.0], ["a.mp4"] * 3)
    assert found.low < 1 < found.high


def test_what_could_not_be_judged_is_counted_and_left_out():
    assert estimate([None, 2.0, 2.0], names(3)) == Estimate(2.0, 2.0, 2.0, 2, 1)
    assert estimate([None, None], names(2)) == Estimate(None, None, None, 0, 2)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(1).normal(size=20).tolist()
    assert estimate(values, names(20)) == estimate(values, names(20))


def test_ratio_of_means():
    rng = np.random.default_rng(2)
    own, true = rng.normal(0.4, 0.1, 50).tolist(), rng.normal(0.8, 0.1, 60).tolist()
    found = estimate_ratio(own, names(50), true, names(60))
    assert found.mean == pytest.approx(0.5, abs=0.05)
    assert found.low < found.mean < found.high
    assert found.num_clips == 50


def test_no_ratio_to_nothing():
    assert estimate_ratio([1.0, 2.0], names(2), [-1.0, 1.0], names(2)) is None
    assert estimate_ratio([None, None], names(2), [1.0, 1.0], names(2)) is None
    assert estimate_ratio([1.0, 1.0], names(2), [None, None], names(2)) is None


def test_warnings_say_when_there_is_too_little():
    assert warnings(names(30)) == []
    assert warnings(names(5)) == ["5 clips are few: the intervals are rough below 30"]
    assert warnings(["a.mp4"] * 30) == ["all clips are cut from one video: the intervals know nothing of other roads"]
    assert warnings(["a.mp4", "b.mp4"] * 20) == ["the clips are cut from 2 videos: the intervals are rough below 8"]


def test_spearman_is_about_order_alone():
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert spearman([1, 1, 2, 2], [1, 2, 3, 4]) == pytest.approx(0.894, abs=1e-3)  # ties share a rank


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2], "three pairs of values or more, found 2 and 2"),
        ([1, 2, 3], [1, 2], "found 3 and 2"),
        ([1, 1, 1], [1, 2, 3], "there is no order among equal ones"),
    ],
)
def test_spearman_needs_an_order(x, y, message):
    with pytest.raises(ValueError, match=message):
        spearman(x, y)
