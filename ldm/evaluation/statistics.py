"""Means with bootstrap intervals, ratios of means, rank correlation.

Clips cut from one video show the same road and are not independent, so whole videos are drawn with all their clips (a
cluster bootstrap); the clips of a single video are drawn one by one, with a warning.
Efron and Tibshirani 1993, "An Introduction to the Bootstrap".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_DRAWS = 2000
COVERAGE = 0.95
FEW_CLIPS = 30  # fewer make the interval itself uncertain
FEW_VIDEOS = 8  # of several clips each


@dataclass(frozen=True)
class Estimate:
    """A mean (or a ratio of means) and its 95% interval; all three None if no clip has a value."""

    mean: float | None
    low: float | None
    high: float | None
    num_clips: int  # with a value
    num_unjudged: int


def estimate(values: Sequence[float | None], videos: Sequence[str], seed: int = 0) -> Estimate:
    """Mean over clips. values: None for a clip without a value; videos: the video of each clip."""
    present = [(value, video) for value, video in zip(values, videos, strict=True) if value is not None]
    missing = len(values) - len(present)
    if not present:
        return Estimate(None, None, None, 0, missing)
    draws = _draw_means(present, np.random.default_rng(seed))
    mean = float(np.mean([value for value, _ in present]))
    return Estimate(mean, *interval(draws), len(present), missing)


def estimate_ratio(
    values: Sequence[float | None],
    videos: Sequence[str],
    true_values: Sequence[float | None],
    true_videos: Sequence[str],
    seed: int = 0,
) -> Estimate | None:
    """The mean of `values` relative to the mean of `true_values`, both drawn independently.

    None when the interval of the true mean includes 0; counts are those of `values`.
    """
    own, true = estimate(values, videos, seed), estimate(true_values, true_videos, seed)
    if own.mean is None or true.mean is None or true.low <= 0 <= true.high:
        return None
    rng = np.random.default_rng(seed)
    pairs = [
        [(value, video) for value, video in zip(row, names, strict=True) if value is not None]
        for row, names in ((values, videos), (true_values, true_videos))
    ]
    draws = _draw_means(pairs[0], rng) / _draw_means(pairs[1], rng)
    return Estimate(own.mean / true.mean, *interval(draws), own.num_clips, own.num_unjudged)


def _draw_means(present: Sequence[tuple[float, str]], rng: np.random.Generator) -> np.ndarray:
    """Means of rows drawn with replacement, video by video -> `NUM_DRAWS`."""
    names = [video for _, video in present]
    if len(set(names)) == 1:
        names = [str(number) for number in range(len(present))]
    groups = np.unique(names, return_inverse=True)[1]
    sums = np.bincount(groups, weights=[value for value, _ in present])
    counts = np.bincount(groups)
    chosen = rng.integers(len(sums), size=(NUM_DRAWS, len(sums)))
    return sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95% of draws."""
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def warnings(videos: Sequence[str]) -> list[str]:
    """Warnings about the intervals of a row whose clips come from these videos."""
    num_clips, num_videos = len(videos), len(set(videos))
    found = []
    if num_clips < FEW_CLIPS:
        found.append(f"only {num_clips} clips: the intervals are rough below {FEW_CLIPS}")
    if num_videos == 1:
        found.append("all clips are cut from one video: the intervals do not cover other roads")
    elif num_videos < min(num_clips, FEW_VIDEOS):
        found.append(f"the clips are cut from only {num_videos} videos: the intervals are rough below {FEW_VIDEOS}")
    return found


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, -1 to 1; equal values share the mean of their ranks.

    Raises ValueError for fewer than three pairs, or if all x or all y are equal.
    """
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"expected at least three pairs of values, found {len(x)} and {len(y)}")
    if len(set(x)) == 1 or len(set(y)) == 1:
        raise ValueError("expected values that differ, found equal ones, which have no order")
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, groups, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[groups]
