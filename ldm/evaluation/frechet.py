"""Frechet distance between two sets of feature vectors: the distance of their means and covariances.

|m - n|^2 + tr(A + B - 2 (A B)^(1/2)) for means m, n and covariances A, B (Heusel et al. 2017). The number means nothing
without its features (`features.py`) and is biased upwards for few clips, the more the longer the vectors (Chong and
Forsyth 2020): only rows of equally many clips compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ldm.evaluation.statistics import Estimate, interval

FEW_FOR_DISTANCE = 2000  # clips
NUM_DRAWS = 200
MOST_GROUPS = 100  # that a draw chooses from; more videos share groups
SMALLEST_ROW = 2  # clips


@dataclass(frozen=True)
class Gaussian:
    """Mean `d` and covariance `d d` of feature vectors."""

    mean: np.ndarray
    covariance: np.ndarray


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Squared Frechet distance, 0 for equal Gaussians; clipped at 0 against rounding."""
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ other.covariance @ root).clip(0)).sum()
    spread = np.trace(one.covariance) + np.trace(other.covariance) - 2 * shared
    return max(0.0, float(((one.mean - other.mean) ** 2).sum() + spread))


@dataclass(frozen=True)
class FeatureRow:
    """The features of the clips of a row: of each clip its vectors `n d`, or None, and its video."""

    features: Sequence[np.ndarray | None]
    videos: Sequence[str]

    def present(self) -> list[np.ndarray]:
        """The vectors of the clips that have some."""
        return [found for found in self.features if found is not None]

    def groups(self) -> np.ndarray:
        """The number of each clip's video, or of the clip if all are of one video."""
        return (
            np.unique(self.videos, return_inverse=True)[1] if len(set(self.videos)) > 1 else np.arange(len(self.videos))
        )

    def halves(self, kinds: Sequence[str]) -> tuple[FeatureRow, FeatureRow]:
        """Every second video, and the rest; `kinds` of clips, such as their styles, are distributed evenly."""
        groups = self.groups()
        kind_of = dict(zip(groups.tolist(), kinds, strict=True))
        rank_of = {group: index for index, group in enumerate(sorted(kind_of, key=lambda its: (kind_of[its], its)))}
        sides = [rank_of[group] % 2 for group in groups.tolist()]
        first, second = ([index for index, side in enumerate(sides) if side == wanted] for wanted in (0, 1))
        return self._only(first), self._only(second)

    def _only(self, indices: Sequence[int]) -> FeatureRow:
        return FeatureRow([self.features[index] for index in indices], [self.videos[index] for index in indices])


def estimate_distance(own: FeatureRow, true: FeatureRow, seed: int = 0) -> Estimate:
    """The distance of one row from another with a 95% bootstrap interval; `mean` is the distance, counts are `own`'s.

    Videos are drawn on both sides, with the same indices if both have equally many: rows made of the same scenes or
    prompts stay paired. A draw repeats videos, which makes distances larger, so the interval is the spread of the draws
    about their median, centred on the distance. All None if either side has fewer than two clips with features.
    """
    counts = len(own.present()), len(own.features) - len(own.present())
    if min(len(row.present()) for row in (own, true)) < SMALLEST_ROW:
        return Estimate(None, None, None, *counts)
    rotated = _rotate([own.present(), true.present()])
    sides = [_Moments(row, vectors) for row, vectors in zip((own, true), rotated, strict=True)]
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


def _rotate(rows: Sequence[Sequence[np.ndarray]]) -> Iterator[list[np.ndarray]]:
    """The vectors of both rows in a common basis of as few dimensions as hold them all; distances are unchanged.

    Sums are then exact and matrices small.
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
    """Sums over groups of videos, which give the Gaussian of any draw of them."""

    def __init__(self, row: FeatureRow, vectors: Sequence[np.ndarray]) -> None:
        """vectors: of the clips of the row that have some."""
        groups = row.groups() % MOST_GROUPS
        self.num_groups = int(groups.max()) + 1
        size = vectors[0].shape[1]
        self.counts = np.zeros(self.num_groups)
        self.sums = np.zeros((self.num_groups, size))
        self.products = np.zeros((self.num_groups, size, size))
        present = [group for group, found in zip(groups, row.features, strict=True) if found is not None]
        for group, part in zip(present, vectors, strict=True):
            self.counts[group] += len(part)
            self.sums[group] += part.sum(axis=0)
            self.products[group] += part.T @ part

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """How often each group is drawn, at random."""
        return np.bincount(rng.integers(self.num_groups, size=self.num_groups), minlength=self.num_groups)

    def gaussian(self, weights: np.ndarray) -> Gaussian:
        """The Gaussian of all vectors, weighted by group."""
        count = max(weights @ self.counts, 1)
        mean = weights @ self.sums / count
        products = np.tensordot(weights.astype(np.float64), self.products, 1)
        return Gaussian(mean, (products - count * np.outer(mean, mean)) / max(count - 1, 1))
