"""What a row of numbers is worth: means with bootstrap intervals, ratios of means, rank correlation.

Clips cut from one video show the same road and are no independent witnesses, so whole videos are drawn, with all their
clips (a cluster bootstrap); only when there is a single video are its clips drawn one by one, and a warning says so.
Efron and Tibshirani 1993, "An Introduction to the Bootstrap".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_DRAWS = 2000
COVERAGE = 0.95
FEW_CLIPS = 30  # below this the interval itself is uncertain
FEW_VIDEOS = 8  # of several clips each


@dataclass(frozen=True)
class Estimate:
    """A mean (or a ratio of means) and its 95% interval; all three None when no clip could be judged."""

    mean: float | None
    low: float | None
    high: float | None
    num_clips: int  # that were judged
    num_unjudged: int


def estimate(values: Sequence[float | None], videos: Sequence[str], seed: int = 0) -> Estimate:
    """Mean over clips, None for those that could not be judged; `videos` names where each clip comes from."""
    judged = [(value, video) for value, video in zip(values, videos, strict=True) if value is not None]
    missing = len(values) - len(judged)
    if not judged:
        return Estimate(None, None, None, 0, missing)
    draws = _draw_means(judged, np.random.default_rng(seed))
    mean = float(np.mean([value for value, _ in judged]))
    return Estimate(mean, *interval(draws), len(judged), missing)


def estimate_ratio(
    values: Sequence[float | None],
    videos: Sequence[str],
    true_values: Sequence[float | None],
    true_videos: Sequence[str],
    seed: int = 0,
) -> Estimate | None:
    """The mean of `values` as a part of the mean of `true_values`, both drawn anew each time.

    None when the interval of the true mean touches 0, where a ratio says nothing; counts are those of `values`.
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


def _draw_means(judged: Sequence[tuple[float, str]], rng: np.random.Generator) -> np.ndarray:
    """Means of rows drawn from the given one with replacement, by videos -> `NUM_DRAWS`."""
    names = [video for _, video in judged]
    if len(set(names)) == 1:
        names = [str(number) for number in range(len(judged))]
    groups = np.unique(names, return_inverse=True)[1]
    sums = np.bincount(groups, weights=[value for value, _ in judged])
    counts = np.bincount(groups)
    chosen = rng.integers(len(sums), size=(NUM_DRAWS, len(sums)))
    return sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95% of draws."""
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def warnings(videos: Sequence[str]) -> list[str]:
    """What to say of a row whose clips come from these videos before anyone trusts its intervals."""
    num_clips, num_videos = len(videos), len(set(videos))
    found = []
    if num_clips < FEW_CLIPS:
        found.append(f"{num_clips} clips are few: the intervals are rough below {FEW_CLIPS}")
    if num_videos == 1:
        found.append("all clips are cut from one video: the intervals know nothing of other roads")
    elif num_videos < min(num_clips, FEW_VIDEOS):
        found.append(f"the clips are cut from {num_videos} videos: the intervals are rough below {FEW_VIDEOS}")
    return found


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, -1 to 1; equal values share the mean of their ranks.

    Raises ValueError for fewer than three pairs, or where all x or all y are equal.
    """
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"expected three pairs of values or more, found {len(x)} and {len(y)}")
    if len(set(x)) == 1 or len(set(y)) == 1:
        raise ValueError("expected values that differ; there is no order among equal ones")
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, groups, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[groups]
