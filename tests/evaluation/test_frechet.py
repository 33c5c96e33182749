"""Frechet distances: the formula, the coverage of the interval, and what our features distinguish."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.data.world import draw_clip
from ldm.evaluation.features import GRID, MOTION_ON_A_GRID, features_over_time, flow_on_a_grid, style_extractors
from ldm.evaluation.flow import Motion, measure_motion
from ldm.evaluation.frechet import FeatureRow, Gaussian, estimate_distance, frechet_distance
from ldm.evaluation.motion import frozen_clip, reversed_clip, zoomed_still
from tests.fake_style_classifier import FakeStyleClassifier


def vectors(seed: int, count: int, size: int = 4, mean: float = 0.0, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, spread, (count, size))


def rows(parts: np.ndarray, videos: list[str] | None = None) -> FeatureRow:
    """Each vector a clip."""
    return FeatureRow(list(parts[:, None]), videos or [f"{number}.mp4" for number in range(len(parts))])


def test_known_gaussians():
    one = Gaussian(np.zeros(2), np.diag([1.0, 4.0]))
    other = Gaussian(np.array([3.0, 4.0]), np.diag([9.0, 4.0]))
    assert frechet_distance(one, other) == pytest.approx(25 + (3 - 1) ** 2)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)
    flat = Gaussian(np.zeros(2), np.diag([1.0, 0.0]))
    assert frechet_distance(flat, one) == pytest.approx(4) == pytest.approx(frechet_distance(one, flat))


@pytest.mark.parametrize(("counts", "size"), [((200, 150), 6), ((9, 7), 40)])
def test_torchmetrics_gives_the_same_distance(counts, size):
    """The second case has fewer vectors than dimensions: they are projected to a smaller space first."""
    mix = vectors(9, size, size)
    sets = [vectors(seed, count, size, mean=0.3 * seed + 5) @ mix for seed, count in enumerate(counts)]
    oracle = FrechetInceptionDistance(torch.nn.Identity(), input_img_size=(size,)).set_dtype(torch.float64)
    for real, features in zip((False, True), sets, strict=True):
        oracle.update(torch.from_numpy(features), real=real)
    ours = estimate_distance(*map(rows, sets))
    assert ours.mean == pytest.approx(oracle.compute().item(), rel=1e-4)
    assert ours.num_clips == counts[0]


def test_interval_covers_the_distance():
    """The distance of shifted Gaussians in low dimension is that of the means, with small bias."""
    hits = 0
    for seed in range(20):
        found = estimate_distance(rows(vectors(seed, 60, 2, mean=2.0)), rows(vectors(seed + 100, 60, 2)), seed)
        assert found.low <= found.mean <= found.high
        hits += found.low <= 8 <= found.high
    assert hits >= 16


def test_clips_of_one_video_are_drawn_together():
    parts = np.repeat(vectors(0, 6), 10, axis=0)
    names = [f"{number}.mp4" for number in range(6) for _ in range(10)]
    true = rows(vectors(1, 60))
    together, apart = estimate_distance(rows(parts, names), true), estimate_distance(rows(parts), true)
    assert together.mean == pytest.approx(apart.mean)
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_rows_of_the_same_kinds_are_drawn_in_pairs():
    """Kinds are far apart, as styles are: a draw of them must not separate the rows."""
    same = estimate_distance(rows(vectors(0, 20)), rows(vectors(0, 20)))
    assert (same.mean, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-9)
    kinds = 20 * vectors(2, 30)
    sides = kinds + vectors(0, 30, spread=0.1), kinds + vectors(1, 30, spread=0.1)
    alike = estimate_distance(*map(rows, sides))
    unlike = estimate_distance(rows(sides[0]), rows(sides[1][:-1]))
    assert alike.high < 1 and unlike.high > 10
    gap = FeatureRow([None, *sides[0][1:, None]], rows(sides[0]).videos)
    assert estimate_distance(gap, rows(sides[1])).high < unlike.high


def test_distances_of_few_clips_are_biased_upwards():
    few, many = (
        np.mean([estimate_distance(rows(vectors(seed, n)), rows(vectors(seed + 50, n))).mean for seed in range(5)])
        for n in (20, 500)
    )
    assert few > 4 * many


def test_clips_without_features_are_counted_and_left_out():
    parts = vectors(0, 10)
    with_gaps = FeatureRow([None, *parts[:, None]], ["black.mp4", *rows(parts).videos])
    found = estimate_distance(with_gaps, rows(vectors(1, 10)), 3)
    assert (found.num_clips, found.num_unjudged) == (10, 1)
    assert found.mean == pytest.approx(estimate_distance(rows(parts), rows(vectors(1, 10))).mean)
    one = FeatureRow([None, parts[:1]], ["black.mp4", "one.mp4"])
    for pair in ((one, rows(parts)), (rows(parts), one)):
        nothing = estimate_distance(*pair)
        assert (nothing.mean, nothing.low, nothing.high) == (None, None, None)


def test_halves_share_no_video_and_all_kinds():
    row = rows(vectors(0, 6), ["a", "a", "b", "c", "c", "c"])
    first, second = row.halves([""] * 6)
    assert (list(first.videos), list(second.videos)) == (["a", "a", "c", "c", "c"], ["b"])
    first, second = rows(vectors(0, 5), ["a"] * 5).halves([""] * 5)
    assert (len(first.videos), len(second.videos)) == (3, 2)
    first, second = rows(vectors(0, 8), list("abcdefgh")).halves(["snow", "night"] * 4)
    assert (list(first.videos), list(second.videos)) == (list("abef"), list("cdgh"))


def test_features_over_time():
    features = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    np.testing.assert_allclose(features_over_time(features), [[2, 1, 2, 0]])
    np.testing.assert_allclose(features_over_time(features[::-1]), [[2, 1, 2, 0]])


def test_flow_by_cells():
    """The left half moves, only texture counts, and a cell without texture has no motion."""
    flow = np.zeros((2, 64, 96, 2), np.float32)
    flow[:, :, :48] = (3, -1)
    flow[1, :, :48, 0] = 5
    flow[:, ::2] += 100
    textured = np.zeros((2, 64, 96), bool)
    textured[:, 1:48:2] = True
    found = flow_on_a_grid(Motion(np.zeros((3, 64, 96), np.uint8), flow, textured, np.zeros((2, 2)), np.zeros(2)))
    mean, spread = found.reshape(2, GRID, GRID, 2)
    np.testing.assert_allclose(mean[:3, :2], np.broadcast_to((4, -1), (3, 2, 2)))
    np.testing.assert_allclose(spread[:3, :2], np.broadcast_to((1, 0), (3, 2, 2)))
    assert not mean[3].any() and not mean[:, 2:].any()


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [draw_clip("coast", seed, 3, 64, 8, 8.0).frames for seed in range(5)]


def test_what_each_distance_distinguishes(clips):
    """Reversed: motion alone. Frozen and zoomed: motion, and the change of features."""
    extractors = {**style_extractors(FakeStyleClassifier()), "frechet_motion": MOTION_ON_A_GRID}
    names = [str(number) for number in range(len(clips))]

    def extract(side: list[np.ndarray]) -> dict[str, FeatureRow]:
        seen = [(clip, measure_motion(clip)) for clip in side]
        return {name: FeatureRow([its.extract(*pair) for pair in seen], names) for name, its in extractors.items()}

    true = extract(clips)

    def distances(made: list[np.ndarray]) -> dict[str, float]:
        return {name: estimate_distance(row, true[name]).mean for name, row in extract(made).items()}

    backwards = distances([reversed_clip(clip) for clip in clips])
    assert (backwards["frechet_frames"], backwards["frechet_clips"]) == pytest.approx((0, 0), abs=1e-6)
    still = distances([frozen_clip(clip) for clip in clips])
    zoomed = distances([zoomed_still(clip) for clip in clips])
    assert 0 < zoomed["frechet_clips"] < still["frechet_clips"]
    assert 10 < zoomed["frechet_motion"] < still["frechet_motion"] < backwards["frechet_motion"]
