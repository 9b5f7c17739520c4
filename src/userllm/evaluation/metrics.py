"""Ranking metrics over users, each with a 95 % bootstrap interval.

Every user has one true answer (the held-out item, the favourite genre), found at ``rank`` in a system's list:
1 is the top, 0 stands for "not in the list". With one true answer the metrics of a user are

    recall@k = 1                   if 1 <= rank <= k, else 0
    ndcg@k   = 1 / log2(1 + rank)  if 1 <= rank <= k, else 0
    mrr      = 1 / rank            if 1 <= rank <= k, else 0

and the metric of a system is the mean over its users. NDCG's ideal gain is 1 and divides nothing.
NDCG and MRR are cut at the largest k asked for, so that a system with a list of ten can be compared with one
that ranks everything. recall@k is the hit rate of the sequential-recommendation papers and, for recall@1,
User-LLM's accuracy of the favourite genre (arXiv 2402.13598). Intervals are ours: the paper gives none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
"""Share of the resampled means that an interval holds."""

_DRAWS_AT_A_TIME = 1 << 20
"""Users drawn per block of resamples: keeps the memory at about 12 MB, up to this many users."""


@dataclass(frozen=True)
class Estimate:
    """A mean over users with its interval, in the unit of the values it was made from."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """``{"value", "low", "high"}``, the form in metrics.json."""
        return asdict(self)

    def above(self, other: Estimate) -> bool:
        """Whether this interval lies wholly above the other one."""
        return self.low > other.high


def bootstrap_mean(values: ArrayLike, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of ``values`` [n users] with its 95 % percentile interval from bootstrap samples of the users.

    The same values and seed give the same interval. Where all values are alike the interval has no width,
    however few they are. Raises ValueError where values are not one-dimensional, empty or not finite.
    Source: Efron and Tibshirani 1993, chapter 13.

    >>> bootstrap_mean([0.0, 1.0, 1.0, 1.0])
    Estimate(value=0.75, low=0.25, high=1.0)
    """
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise ValueError(f"values must be one number per user, got an array of shape {column.shape}")
    return _bootstrap([column], resamples, seed)[0]


def paired_gain(a: ArrayLike, b: ArrayLike, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of a - b over users, both [n users] in one order, with an interval that resamples the pairs.

    For log-likelihoods of the true answer the unit is nats per answer. Much tighter than two intervals apart:
    what makes a user hard is hard for both systems and cancels. Raises ValueError where the lengths differ.

    >>> paired_gain([-6.0, -8.0, -7.0], [-6.5, -8.5, -7.5])
    Estimate(value=0.5, low=0.5, high=0.5)
    """
    first, second = _paired(a, b)
    return bootstrap_mean(first - second, resamples, seed)


def user_metrics(ranks: ArrayLike, ks: Sequence[int] = (1, 5, 10)) -> dict[str, NDArray[np.float64]]:
    """Each user's own metrics, [n users] by name; ranks and names as in ``ranking_metrics``.

    >>> {name: values.round(3).tolist() for name, values in user_metrics([1, 3, 0, 12]).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'recall@1': [1.0, 0.0, 0.0, 0.0], 'recall@5': [1.0, 1.0, 0.0, 0.0], 'recall@10': [1.0, 1.0, 0.0, 0.0],
     'ndcg@10': [1.0, 0.5, 0.0, 0.0], 'mrr': [1.0, 0.333, 0.0, 0.0]}
    """
    rank = np.asarray(ranks)
    if rank.ndim != 1 or not np.issubdtype(rank.dtype, np.integer):
        raise ValueError(f"ranks must be one integer per user, got {rank.dtype} of shape {rank.shape}")
    if rank.size and rank.min() < 0:
        raise ValueError(f"a rank is 1 or more, or 0 for not in the list; got {rank.min()}")
    if not ks or min(ks) < 1:
        raise ValueError(f"cut-offs must be 1 or more, got {tuple(ks)}")
    deepest = max(ks)
    found = (rank >= 1) & (rank <= deepest)
    place = np.where(found, rank, 1).astype(np.float64)
    metrics = {f"recall@{k}": (found & (rank <= k)).astype(np.float64) for k in ks}
    metrics[f"ndcg@{deepest}"] = np.where(found, 1 / np.log2(1 + place), 0.0)
    metrics["mrr"] = np.where(found, 1 / place, 0.0)
    return metrics


def ranking_metrics(
    ranks: ArrayLike, ks: Sequence[int] = (1, 5, 10), resamples: int = 2000, seed: int = 0
) -> dict[str, Estimate]:
    """Recall at every cut-off, NDCG at the largest one and MRR, by name ("recall@1", ..., "ndcg@10", "mrr").

    ranks: [n users] integers, the place of each user's true answer, from 1; 0 where it is not in the list.
    Raises ValueError for no users, other ranks than these, or a cut-off below 1.

    >>> metrics = ranking_metrics([1, 3, 0, 12])  # two of four users have the answer in their first ten
    >>> {name: round(estimate.value, 3) for name, estimate in metrics.items()}
    {'recall@1': 0.25, 'recall@5': 0.5, 'recall@10': 0.5, 'ndcg@10': 0.375, 'mrr': 0.333}
    """
    per_user = user_metrics(ranks, ks)
    return dict(zip(per_user, _bootstrap(list(per_user.values()), resamples, seed), strict=True))


def ratio_of_means(a: ArrayLike, b: ArrayLike, resamples: int = 2000, seed: int = 0) -> Estimate:
    """mean(a) / mean(b) over users, both [n users] in one order, with an interval that resamples the pairs.

    A resample in which b is nothing counts as no ratio and is left out. Raises ValueError where b's mean is 0.

    >>> ratio_of_means([1.0, 1.0, 2.0], [2.0, 2.0, 4.0])
    Estimate(value=0.5, low=0.5, high=0.5)
    """
    first, second = _paired(a, b)
    over, under = _resampled_means([first, second], resamples, seed)
    if second.mean() == 0:
        raise ValueError("the mean below the line is 0")
    return _estimate(float(first.mean() / second.mean()), over / np.where(under == 0, np.nan, under))


def sign_flip_p(differences: ArrayLike, flips: int = 1999, seed: int = 0) -> float:
    """Two-sided p of "no difference" for the mean of paired differences [n users], by a permutation test.

    If neither side were better, each user's difference would as well have come with the other sign: p is the share of
    ``flips`` drawn sign patterns (the observed one counted in) whose mean is at least as far from 0. It is never below
    1 / (flips + 1), and 1 where nobody differs. Source: Fisher's randomisation test; Good 2005, chapter 3.

    >>> sign_flip_p([1.0] * 20), sign_flip_p([1.0, -1.0]), sign_flip_p([0.0, 0.0])
    (0.0005, 1.0, 1.0)
    """
    column = np.asarray(differences, dtype=np.float64)
    if column.ndim != 1 or not np.isfinite(column).all():
        raise ValueError("differences must be one finite number per user")
    column = column[column != 0]  # a 0 stays a 0 with either sign
    observed = abs(column.sum()) * (1 - 1e-12)
    rng, as_far = np.random.default_rng(seed), 0
    rows = max(1, _DRAWS_AT_A_TIME // max(len(column), 1))
    for start in range(0, flips, rows):
        flipped = rng.integers(2, size=(min(rows, flips - start), len(column)), dtype=np.int8)
        as_far += int((abs(column.sum() - 2 * (flipped @ column)) >= observed).sum())
    return (1 + as_far) / (1 + flips)


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"paired values must be of the same users, got shapes {first.shape} and {second.shape}"
        )
    return first, second


def _bootstrap(columns: list[NDArray[np.float64]], resamples: int, seed: int) -> list[Estimate]:
    """Estimates of the columns' means, all from the same resampled users."""
    means = _resampled_means(columns, resamples, seed)
    return [_estimate(float(column.mean()), mean) for column, mean in zip(columns, means, strict=True)]


def _estimate(value: float, resampled: NDArray[np.float64]) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def _resampled_means(columns: list[NDArray[np.float64]], resamples: int, seed: int) -> NDArray[np.float64]:
    """Means of the columns, [columns, resamples], all from the same resampled users."""
    users = len(columns[0])
    if users == 0:
        raise ValueError("no users to average over")
    if not all(np.isfinite(column).all() for column in columns):
        raise ValueError("values must be finite: one user without a number would hide all the others")
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_A_TIME // users)
    means = np.empty((len(columns), resamples))
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        drawn = rng.integers(users, size=(stop - start, users), dtype=np.int32)
        for mean, column in zip(means, columns, strict=True):
            mean[start:stop] = column[drawn].mean(axis=1)
    return means
