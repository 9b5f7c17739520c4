"""Does a written review sound like the rating that goes with it?

A reader is trained on the reviews of the training events: rating by ridge regression on the TF-IDF of words and pairs
of words. What it makes of a text is compared with the rating of the event that the text was written for, by Spearman's
rank correlation over all texts. It is a check of consistency, nothing more: the reader knows words, not meaning, and
most ratings are the best one. What it makes of the users' own reviews ("target") is about the most that can be had.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline

from userllm.data.splits import Split
from userllm.data.store import Dataset
from userllm.evaluation.metrics import CONFIDENCE, Estimate
from userllm.evaluation.open import TextMetric


class RatingReader:
    """Tells the rating from a text."""

    def __init__(self, texts: Sequence[str], ratings: np.ndarray):
        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, max_features=50_000, sublinear_tf=True)
        self.model = make_pipeline(words, Ridge(alpha=1.0))
        self.model.fit(texts, ratings)

    @classmethod
    def of_training_events(
        cls, dataset: Dataset, split: Split, field: str, rating: str, most: int = 40_000, seed: int = 0
    ) -> RatingReader | None:
        """Trained on the text field ``field`` of the events the split gives to training, or ``most`` of them; None
        where these are too few to learn from: no word stands in two of them."""
        first = dataset.offsets[split.users]
        rows = np.concatenate([np.arange(a, a + n) for a, n in zip(first, split.train_end, strict=True)])
        if len(rows) > most:
            rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
        texts = dataset.event_texts(field, rows.tolist())
        kept = np.array([bool(text) for text in texts])
        ratings = np.asarray(dataset.events[rating][rows])[kept]
        try:
            return cls([text for text in texts if text], ratings)
        except ValueError:  # scikit-learn's, of an empty vocabulary
            return None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """The ratings [n] that the texts sound like."""
        return np.asarray(self.model.predict(list(texts)))

    def agreement(self, ratings: np.ndarray, resamples: int = 1000) -> TextMetric:
        """A measure of texts written for events with these ratings [n], or for the first of them."""

        def measure(_: Sequence[str], texts: Sequence[str]) -> dict[str, Estimate]:
            return {"rating_agreement": rank_correlation(self(texts), ratings[: len(texts)], resamples)}

        return measure


def rank_correlation(a: np.ndarray, b: np.ndarray, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Spearman's rank correlation of a and b [n], with a 95 % percentile bootstrap interval over the pairs.

    0 where all values of a side are alike and there is no correlation.
    """
    rng = np.random.default_rng(seed)
    drawn = [_spearman(a[rows], b[rows]) for rows in rng.integers(len(a), size=(resamples, len(a)))]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(_spearman(a, b), float(low), float(high))


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    first, second = (pl.Series(side).rank("average").to_numpy() for side in (a, b))
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])
