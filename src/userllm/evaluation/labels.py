"""Texts that name labels ("Comedy, Drama"), as multi-label classification (UEM): weighted precision, recall and F1.

Each label has its own precision, recall and F1 over all users; the weighted mean takes labels by how many users have
them. Values are scikit-learn's; a label nobody was given has precision 0. Intervals resample the users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from userllm.evaluation.metrics import CONFIDENCE, Estimate
from userllm.tasks import GenrePreference

NAMES = ("precision", "recall", "f1")


class LabelScores:
    """Measures texts of a task; a ``TextMetric``."""

    def __init__(self, task: GenrePreference, resamples: int = 1000, seed: int = 0):
        self.task, self.resamples, self.seed = task, resamples, seed

    def __call__(
        self, targets: Sequence[str], texts: Sequence[str]
    ) -> Mapping[str, np.ndarray | Estimate | float]:
        """Weighted "precision", "recall", "f1" of all texts; F1, labels and unknown words of each."""
        true, _ = self.read(targets)
        named, unknown = self.read(texts)
        hits = (true & named).sum(1)
        user_f1 = 2 * hits / np.maximum(true.sum(1) + named.sum(1), 1)
        return {
            **weighted_scores(true, named, self.resamples, self.seed),
            "user_f1": user_f1,
            "labels": named.sum(1).astype(float),
            "unknown_words": unknown.astype(float),
        }

    def names(self, texts: Sequence[str]) -> list[list[str]]:
        """The labels that each text names."""
        return [[self.task.values[n] for n in np.flatnonzero(named)] for named in self.read(texts)[0]]

    def read(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Labels [n, L] bool that the texts name, and the number of unknown words [n]."""
        read = [self.task.read(text) for text in texts]
        return np.array([named for named, _ in read]), np.array([unknown for _, unknown in read])

    def table(self, targets: Sequence[str], texts: Sequence[str]) -> dict[str, dict[str, float]]:
        """Per label its precision, recall, F1, and how many users have it (support) and were given it (named)."""
        true, named = self.read(targets)[0], self.read(texts)[0]
        scores = _of_labels(true, named, None)
        return {
            label: {
                **{name: float(values[n]) for name, values in zip(NAMES, scores, strict=True)},
                "support": int(true[:, n].sum()),
                "named": int(named[:, n].sum()),
            }
            for n, label in enumerate(self.task.values)
        }

    def constants(self, training: Sequence[str]) -> dict[str, str]:
        """Answers that are the same for everyone: "majority", the most common of the training targets, and
        "every_label", which names all of them."""
        return {"majority": self.task.majority(training), "every_label": ", ".join(self.task.values)}


@dataclass(frozen=True)
class LabelCounts:
    """By user and label, [n, L] each: how often it was named rightly (hit), should have been (has), was named (got)."""

    hit: np.ndarray
    has: np.ndarray
    got: np.ndarray

    @classmethod
    def of(cls, true: np.ndarray, named: np.ndarray) -> LabelCounts:
        """From labels [n, L] bool."""
        hit, has, got = (table.astype(float) for table in (true & named, true, named))
        return cls(hit, has, got)

    @classmethod
    def of_names(
        cls, targets: Sequence[Sequence[str]], named: Sequence[Sequence[str]], users: np.ndarray
    ) -> LabelCounts:
        """From labels by name, one text each, added up by user [texts], 0..n-1. Labels that no target has weigh
        nothing in a weighted mean, and are left out."""
        labels = sorted({label for target in targets for label in target})
        true, said = (
            np.array([[label in one for label in labels] for one in texts], dtype=bool).reshape(
                -1, len(labels)
            )
            for texts in (targets, named)
        )
        each = cls.of(true, said)
        summed = [np.zeros((int(users.max(initial=-1)) + 1, len(labels))) for _ in range(3)]
        for table, rows in zip(summed, (each.hit, each.has, each.got), strict=True):
            np.add.at(table, users, rows)
        return cls(*summed)

    def scores(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weighted precision, recall and F1, [R] each, where the users count ``weights`` [R, n] times."""
        hit, has, got = weights @ self.hit, weights @ self.has, weights @ self.got
        share = has / np.maximum(has.sum(1, keepdims=True), 1)
        tables = hit / np.maximum(got, 1), hit / np.maximum(has, 1), 2 * hit / np.maximum(got + has, 1)
        precision, recall, f1 = ((table * share).sum(1) for table in tables)
        return precision, recall, f1


def weighted_scores(
    true: np.ndarray, named: np.ndarray, resamples: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Weighted precision, recall and F1 of labels [n, L], with 95 % percentile intervals from resampled users."""
    values = _of_labels(true, named, "weighted")
    resampled = LabelCounts.of(true, named).scores(_resampled(len(true), resamples, seed))
    return {
        name: _estimate(float(value), drawn)
        for name, value, drawn in zip(NAMES, values, resampled, strict=True)
    }


def _of_labels(true: np.ndarray, named: np.ndarray, average: Literal["weighted"] | None) -> Any:
    """Precision, recall and F1 of labels [n, L]."""
    # a single column would be read as two classes, True and False
    classes = [True] if true.shape[1] == 1 else None
    return precision_recall_fscore_support(true, named, labels=classes, average=average, zero_division=0)[:3]  # type: ignore[arg-type]


def weighted_f1(
    counts: LabelCounts, against: LabelCounts | None = None, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Weighted F1, or its lead over that of others' answers to the same users, with a 95 % interval.

    A weighted F1 is no mean of users' own values, so the users are resampled and both sides computed anew each time,
    on the same users.
    """
    weights = np.concatenate([np.ones((1, len(counts.has))), _resampled(len(counts.has), resamples, seed)])
    scores = counts.scores(weights)[2]
    if against is not None:
        scores = scores - against.scores(weights)[2]
    return _estimate(float(scores[0]), scores[1:])


def _resampled(users: int, resamples: int, seed: int) -> np.ndarray:
    """How often each user is drawn, [resamples, users]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(users, np.full(users, 1 / users), size=resamples).astype(float)


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
