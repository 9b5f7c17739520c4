"""Texts that name labels ("Comedy, Drama"), as multi-label classification (UEM): weighted precision, recall and F1.

Each label has its own precision, recall and F1 over all users; the weighted mean takes labels by how many users have
them. Values are scikit-learn's; a label nobody was given has precision 0. Intervals resample the users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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

    def read(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Labels [n, L] bool that the texts name, and the number of unknown words [n]."""
        read = [self.task.read(text) for text in texts]
        return np.array([named for named, _ in read]), np.array([unknown for _, unknown in read])

    def table(self, targets: Sequence[str], texts: Sequence[str]) -> dict[str, dict[str, float]]:
        """Per label its precision, recall, F1, and how many users have it (support) and were given it (named)."""
        true, named = self.read(targets)[0], self.read(texts)[0]
        scores: Any = precision_recall_fscore_support(true, named, average=None, zero_division=0)  # type: ignore[arg-type]
        return {
            label: {
                **{name: float(values[n]) for name, values in zip(NAMES, scores, strict=False)},
                "support": int(true[:, n].sum()),
                "named": int(named[:, n].sum()),
            }
            for n, label in enumerate(self.task.values)
        }

    def baselines(self, targets: Sequence[str], training: Sequence[str]) -> dict[str, Any]:
        """Entries of answers that are the same for everyone: "majority", the most common of the training targets, and
        "every_label", which names all of them."""
        said = {"majority": self.task.majority(training), "every_label": ", ".join(self.task.values)}
        entries: dict[str, Any] = {}
        for system, text in said.items():
            measured = self(targets, [text] * len(targets))
            entries[system] = {name: measured[name].as_dict() for name in NAMES}  # type: ignore[union-attr]
        return entries


def weighted_scores(
    true: np.ndarray, named: np.ndarray, resamples: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Weighted precision, recall and F1 of labels [n, L], with 95 % percentile intervals from resampled users."""
    values: Any = precision_recall_fscore_support(true, named, average="weighted", zero_division=0)[:3]  # type: ignore[arg-type]
    rng = np.random.default_rng(seed)
    users = len(true)
    weights = rng.multinomial(users, np.full(users, 1 / users), size=resamples).astype(float)
    hit, has, got = (weights @ table.astype(float) for table in (true & named, true, named))
    share = has / np.maximum(has.sum(1, keepdims=True), 1)
    precision, recall = hit / np.maximum(got, 1), hit / np.maximum(has, 1)
    f1 = 2 * hit / np.maximum(got + has, 1)
    tail = (1 - CONFIDENCE) / 2
    found = {}
    for name, value, table in zip(NAMES, values, (precision, recall, f1), strict=True):
        low, high = np.quantile((table * share).sum(1), [tail, 1 - tail])
        found[name] = Estimate(float(value), float(low), float(high))
    return found
