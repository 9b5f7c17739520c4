"""The user's own most frequent items against a sort in plain Python."""

from collections import Counter

import numpy as np
import pytest
import torch

from userllm.baselines.own_history import own_most_frequent


@pytest.fixture
def repeated(dataset, monkeypatch):
    """The dataset with few different items, each had several times."""
    monkeypatch.setitem(dataset.events, "item", dataset.events["item"] % 6)
    return dataset


def by_hand(items, popularity):
    count, latest = Counter(items), {item: place for place, item in enumerate(items)}
    return sorted(
        range(len(popularity)),
        key=lambda n: (-count[n], -latest.get(n, -1), -popularity[n], n),
    )


def test_by_count_then_recency_then_popularity_then_catalogue(repeated):
    rows = np.array([(7, 0, 9), (5, 2, 4), (8, 0, 0), (11, 0, 1)])
    popularity = torch.tensor([3, 0, 9, 9, 1, 2] + [5, 0] * 7, dtype=torch.float64)
    scores = own_most_frequent(repeated, rows, popularity)
    for row, found in zip(rows, scores, strict=True):
        own = repeated.events["item"][repeated.offsets[row[0]] :][: row[2]].tolist()
        assert found.argsort(descending=True, stable=True).tolist() == by_hand(own, popularity.tolist())
    assert torch.equal(scores[2].argsort(stable=True), popularity.argsort(stable=True))


def test_long_histories_keep_ties_apart(repeated, monkeypatch):
    """Popularities that differ by one in a million still decide, beside counts of thousands."""
    items = np.zeros(len(repeated.events["item"]), dtype=np.int64)
    monkeypatch.setitem(repeated.events, "item", items)
    popularity = torch.full((20,), 1e6, dtype=torch.float64)
    popularity[7] += 1
    [scores] = own_most_frequent(repeated, np.array([(10, 0, 5)]), popularity)
    assert scores.argsort(descending=True, stable=True)[:3].tolist() == [0, 7, 1]
