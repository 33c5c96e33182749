"""Frechet distance between two sets of feature vectors: how far apart their means lie and how differently they spread.

|m - n|^2 + tr(A + B - 2 (A B)^(1/2)) for means m, n and covariances A, B (Heusel et al. 2017). The number means nothing
without the name of what made the features (`extractors.py`), and comes out too large for few clips, the more so the
longer the vectors are (Chong and Forsyth 2020): only rows of equally many clips compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ldm.evaluation.statistics import Estimate, interval

FEW_FOR_DISTANCE = 2000  # clips
NUM_DRAWS = 200
MOST_GROUPS = 100  # that a draw chooses from; more videos are put together
SMALLEST_ROW = 2  # clips


@dataclass(frozen=True)
class Gaussian:
    """Mean `d` and covariance `d d` of feature vectors."""

    mean: np.ndarray
    covariance: np.ndarray


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Squared Frechet distance, 0 for Gaussians that are alike; what rounding takes below is 0."""
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ other.covariance @ root).clip(0)).sum()
    spread = np.trace(one.covariance) + np.trace(other.covariance) - 2 * shared
    return max(0.0, float(((one.mean - other.mean) ** 2).sum() + spread))


@dataclass(frozen=True)
class FeatureRow:
    """What an extractor made of the clips of a row: for each its vectors `n d`, or None, and the video it is from."""

    features: Sequence[np.ndarray | None]
    videos: Sequence[str]

    def judged(self) -> list[np.ndarray]:
        """The vectors of those clips that have some."""
        return [found for found in self.features if found is not None]

    def groups(self) -> np.ndarray:
        """For each clip the number of its video, or of itself where all are of one video."""
        return (
            np.unique(self.videos, return_inverse=True)[1] if len(set(self.videos)) > 1 else np.arange(len(self.videos))
        )

    def halves(self, kinds: Sequence[str]) -> tuple[FeatureRow, FeatureRow]:
        """Every second video, and the rest; `kinds` of clips, such as their looks, are on both sides alike."""
        groups = self.groups()
        kind_of = dict(zip(groups.tolist(), kinds, strict=True))
        place_of = {group: place for place, group in enumerate(sorted(kind_of, key=lambda its: (kind_of[its], its)))}
        sides = [place_of[group] % 2 for group in groups.tolist()]
        first, second = ([place for place, side in enumerate(sides) if side == wanted] for wanted in (0, 1))
        return self._only(first), self._only(second)

    def _only(self, places: Sequence[int]) -> FeatureRow:
        return FeatureRow([self.features[place] for place in places], [self.videos[place] for place in places])


def estimate_distance(own: FeatureRow, true: FeatureRow, seed: int = 0) -> Estimate:
    """The distance of a row from another with a 95% bootstrap interval; `mean` is the distance, and counts are `own`'s.

    Videos are drawn on both sides, at the same places of both where there are equally many: rows that are made of the
    same scenes or prompts stay alike in them. A draw repeats videos, which makes distances larger, so the interval is
    the spread of the draws about their median, put around the distance. None of it where either side has fewer than
    two clips with features.
    """
    counts = len(own.judged()), len(own.features) - len(own.judged())
    if min(len(row.judged()) for row in (own, true)) < SMALLEST_ROW:
        return Estimate(None, None, None, *counts)
    turned = _turn([own.judged(), true.judged()])
    sides = [_Moments(row, vectors) for row, vectors in zip((own, true), turned, strict=True)]
    seeds = (seed, seed + (sides[0].num_groups != sides[1].num_groups))
    rngs = [np.random.default_rng(number) for number in seeds]
    distance = frechet_distance(*(side.gaussian(np.ones(side.num_groups)) for side in sides))
    draws = np.array(
        [
            frechet_distance(*(side.gaussian(side.draw(rng)) for side, rng in zip(sides, rngs, strict=True)))
            for _ in range(NUM_DRAWS)
        ]
    )
    low, high = interval(draws - np.median(draws) + distance)
    return Estimate(distance, max(0.0, low), high, *counts)


def _turn(rows: Sequence[Sequence[np.ndarray]]) -> Iterator[list[np.ndarray]]:
    """The vectors of the clips of both rows, moved and turned alike, which leaves distances as they are.

    They end in as few dimensions as hold them all: sums are then exact and matrices small.
    """
    together = np.concatenate([part for row in rows for part in row]).astype(np.float64)
    together -= together.mean(axis=0)
    count, size = together.shape
    if count < size:
        together = together @ np.linalg.qr(together.T)[0]
    cuts = np.cumsum([len(part) for row in rows for part in row])[:-1]
    parts = iter(np.split(together, cuts))
    for row in rows:
        yield [next(parts) for _ in row]


class _Moments:
    """Sums over groups of videos, from which the Gaussian of any draw of them follows."""

    def __init__(self, row: FeatureRow, vectors: Sequence[np.ndarray]) -> None:
        """`vectors` are those of the clips of the row that have some."""
        groups = row.groups() % MOST_GROUPS
        self.num_groups = int(groups.max()) + 1
        size = vectors[0].shape[1]
        self.counts = np.zeros(self.num_groups)
        self.sums = np.zeros((self.num_groups, size))
        self.products = np.zeros((self.num_groups, size, size))
        judged = [group for group, found in zip(groups, row.features, strict=True) if found is not None]
        for group, part in zip(judged, vectors, strict=True):
            self.counts[group] += len(part)
            self.sums[group] += part.sum(axis=0)
            self.products[group] += part.T @ part

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """How often each group is drawn."""
        return np.bincount(rng.integers(self.num_groups, size=self.num_groups), minlength=self.num_groups)

    def gaussian(self, weights: np.ndarray) -> Gaussian:
        """Of all vectors, each as often as its group's weight says."""
        count = max(weights @ self.counts, 1)
        mean = weights @ self.sums / count
        products = np.tensordot(weights.astype(np.float64), self.products, 1)
        return Gaussian(mean, (products - count * np.outer(mean, mean)) / max(count - 1, 1))
