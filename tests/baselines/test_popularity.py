"""Counts of the crowd hold training events only."""

from collections import Counter

import numpy as np
import pytest

from userllm.baselines.popularity import answer_counts, item_counts, written_targets
from userllm.data.splits import SplitConfig
from userllm.tasks import TaskConfig, build_task

every_split = pytest.mark.parametrize(
    "config", [SplitConfig(), SplitConfig(kind="paper", window=4)], ids=["llo", "paper"]
)


def shuffled_tails(dataset, split, monkeypatch):
    """The same dataset with other items at every validation and test position."""
    items = dataset.events["item"].copy()
    for user, end in zip(split.users, split.train_end, strict=True):
        first, stop = dataset.offsets[user] + end, dataset.offsets[user + 1]
        assert stop > first
        items[first:stop] = (items[first:stop] + 1) % dataset.num_items
    monkeypatch.setitem(dataset.events, "item", items)


@every_split
def test_popularity_counts_training_events_only(dataset, monkeypatch, config):
    split = config.build(dataset)
    counts = item_counts(dataset, split)
    expected = Counter()
    for user, end in zip(split.users, split.train_end, strict=True):
        expected.update(event.item for event in dataset.history(int(user), 0, int(end)).events)
    assert counts.tolist() == [expected[item] for item in dataset.items["id"]]
    shuffled_tails(dataset, split, monkeypatch)
    assert item_counts(dataset, split).tolist() == counts.tolist()


@every_split
@pytest.mark.parametrize("kind", ["next_item", "favorite_category"])
def test_answers_are_counted_within_training_events(dataset, monkeypatch, config, kind):
    split = config.build(dataset)
    task = build_task("task", TaskConfig(kind=kind), dataset.items)
    counts = answer_counts(task, dataset, split, window=5)
    kept = split.train_end > split.first_target
    expected = task.targets(dataset, split.users[kept], split.train_end[kept] - 1, 5)
    assert counts.tolist() == np.bincount(expected[expected >= 0], minlength=len(task.answers)).tolist()
    assert counts.sum() > 0
    shuffled_tails(dataset, split, monkeypatch)
    assert answer_counts(task, dataset, split, window=5).tolist() == counts.tolist()


@every_split
def test_written_targets_are_of_training_events_only(dataset, monkeypatch, config):
    """A target is of the events before a moment: the last that training asks about, not the first that is tested."""
    split = config.build(dataset)
    task = build_task("genres", TaskConfig(kind="genre_preference", field="genres", liked=1), dataset.items)
    counted = written_targets(task, dataset, split)
    kept = split.train_end > split.first_target
    ends = split.train_end[kept] - 1
    expected = task.examples(dataset, split.users[kept], ends, 0)
    assert counted == [one.target for one in expected if one is not None] and counted
    asked = {(int(user), int(end)) for user, end in zip(split.users, split.test, strict=True)}
    assert not asked & {(int(user), int(end)) for user, end in zip(split.users[kept], ends, strict=True)}
    shuffled_tails(dataset, split, monkeypatch)
    assert written_targets(task, dataset, split) == counted
