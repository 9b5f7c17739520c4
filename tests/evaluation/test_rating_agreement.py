"""The reader that tells ratings from texts, and its correlation against scipy's."""

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from userllm.data import FieldSpec, Source, SplitConfig, write_dataset
from userllm.evaluation.rating_agreement import RatingReader, rank_correlation

GOOD, BAD = "loved it so many compliments", "hated it sent it back"


@pytest.mark.parametrize("seed", range(3))
def test_the_correlation_is_spearmans(seed):
    rng = np.random.default_rng(seed)
    b = rng.integers(1, 6, 60) * 2.0
    a = b + rng.normal(0, 4, 60)
    estimate = rank_correlation(a, b)
    assert estimate.value == pytest.approx(float(spearmanr(a, b).statistic))  # type: ignore[attr-defined]
    assert estimate.low < estimate.value < estimate.high
    assert rank_correlation(np.ones(60), b).as_dict() == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_texts_that_sound_like_their_rating_agree_with_it():
    texts = [f"{GOOD if n % 2 else BAD} {n}" for n in range(40)]
    ratings = np.array([10.0 if n % 2 else 2.0 for n in range(40)])
    reader = RatingReader(texts, ratings)
    good, bad = reader(["so many compliments", "sent it back"])
    assert good > 8 > 4 > bad
    measure = reader.agreement(np.array([10.0, 2.0, 10.0, 2.0, 10.0]))
    assert measure([], [GOOD, BAD, GOOD, BAD, GOOD])["rating_agreement"].value == pytest.approx(1)
    assert measure([], [BAD, GOOD, BAD, GOOD])["rating_agreement"].value == pytest.approx(-1)
    assert measure([], ["", "", ""])["rating_agreement"].value == 0.0


@pytest.mark.parametrize("text", ["", "word{}"], ids=["no texts", "no word twice"])
def test_too_few_texts_make_no_reader(tmp_path, text):
    events = [(n // 5, 0, n, 1 + n % 5, text.format(n)) for n in range(20)]
    dataset = write_dataset(
        tmp_path / "shop",
        pl.DataFrame(events, schema=["user", "item", "time", "rating", "body"], orient="row"),
        pl.DataFrame({"id": ["a"], "title": ["A"]}),
        pl.DataFrame({"id": list("uvwx")}),
        name="shop",
        source=Source("made", "a test", "none", "0" * 64, "path"),
        fields=[
            FieldSpec("item", "event", "single"),
            FieldSpec("rating", "event", "single"),
            FieldSpec("body", "event", "text"),
        ],
    )
    split = SplitConfig(min_events=3).build(dataset)
    assert RatingReader.of_training_events(dataset, split, "body", "rating") is None
