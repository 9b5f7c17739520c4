"""The derived field time_gap, of stored and of unseen users."""

import numpy as np
import pytest
import torch

from userllm.data import HistoryCollator, StoredHistories, Vocabulary, encode_histories, encode_user_history
from userllm.data.time_gaps import time_gap_ids
from userllm.data.vocabulary import time_gap_vocabulary
from userllm.events import UNKNOWN_TIME, Event, UserHistory

FIELDS = ("item", "time_gap", "rating")
GAP = time_gap_vocabulary()


def named(ids):
    return [GAP.value_of(number) if number >= 2 else {0: "padding", 1: "unknown"}[number] for number in ids]


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(-5, "0"), (0, "0"), (1, "1"), (2, "2"), (3, "2"), (4, "4"), (86400, "65536"), (2**30, str(2**30)),
     (2**30 - 1, str(2**29)), (2**40, str(2**30))],
)  # fmt: skip
def test_a_bucket_is_called_by_its_least_gap(seconds, bucket):
    times = np.array([1_000_000, 1_000_000 + seconds])
    assert named(time_gap_ids(GAP, times, np.array([True, False]))) == ["first", bucket]


def test_firsts_and_unknown_times():
    times = np.array([5, 9, UNKNOWN_TIME, 10, 11, UNKNOWN_TIME, 50])
    first = np.array([1, 0, 0, 0, 0, 1, 0], dtype=bool)
    names = ["first", "4", "unknown", "unknown", "1", "first", "unknown"]
    assert named(time_gap_ids(GAP, times, first)) == names


def test_stored_and_unseen_users_are_encoded_alike(made):
    dataset = made([5, 9, 1])
    dataset.events["time"] = np.cumsum(np.arange(15) ** 4)
    vocabulary = Vocabulary.from_dataset(dataset, FIELDS)
    stored = encode_histories(dataset, vocabulary, [(1, 0, 9), (0, 0, 5), (2, 0, 1)])
    unseen, _ = encode_user_history([dataset.history(user) for user in (1, 0, 2)], vocabulary, dataset.items)
    assert torch.equal(stored.fields["time_gap"], unseen.fields["time_gap"])
    assert torch.equal(stored.times, unseen.times)
    assert (stored.times[~stored.mask] == UNKNOWN_TIME).all()
    assert (stored.fields["time_gap"][~stored.mask] == 0).all()
    assert stored.times[0].tolist() == dataset.events["time"][5:14].tolist()
    wanted = [next(str(2**k) for k in range(31) if 2**k <= n**4 < 2 ** (k + 1)) for n in range(6, 14)]
    assert named(stored.fields["time_gap"][0].tolist()) == ["first", *wanted]


def test_the_latest_events_know_the_one_before_them(made):
    dataset = made([9])
    collator = HistoryCollator(dataset.items, Vocabulary.from_dataset(dataset, FIELDS))
    latest, _ = collator.from_histories([dataset.history(0)], max_length=4)
    stored = StoredHistories(dataset, collator.vocabulary).batch([(0, 5, 9)])
    assert torch.equal(latest.fields["time_gap"], stored.fields["time_gap"])
    assert named(latest.fields["time_gap"][0].tolist()) == ["0", "1", "0", "1"]


def test_histories_without_times(made):
    dataset = made([9])
    vocabulary = Vocabulary.from_dataset(dataset, FIELDS)
    histories = [
        UserHistory([Event("i1"), Event("i2"), Event("i3", time=7), Event("i4", time=7)]), UserHistory([])
    ]  # fmt: skip
    batch, _ = encode_user_history(histories, vocabulary, dataset.items)
    assert named(batch.fields["time_gap"][0].tolist()) == ["first", "unknown", "unknown", "0"]
    assert batch.times.tolist() == [[UNKNOWN_TIME, UNKNOWN_TIME, 7, 7], [UNKNOWN_TIME] * 4]


def test_times_travel_with_the_batch_and_targets_are_one_event_on(made):
    dataset = made([9])
    stored = StoredHistories(dataset, Vocabulary.from_dataset(dataset, FIELDS))
    both = stored.next_events([(0, 2, 7)])
    times = dataset.events["time"]
    assert both["inputs"].times[0].tolist() == times[2:6].tolist()
    assert both["targets"].times[0].tolist() == times[3:7].tolist()
    assert torch.equal(both["inputs"].to("cpu").times, both["inputs"].times)
    assert both["inputs"].select(torch.tensor([0, 0])).times.shape == (2, 4)


def test_it_is_saved_with_the_vocabulary(made, tmp_path):
    dataset = made([5])
    vocabulary = Vocabulary.from_dataset(dataset, FIELDS)
    vocabulary.save(tmp_path / "vocabulary.json")
    loaded = Vocabulary.load(tmp_path / "vocabulary.json")
    assert loaded == vocabulary
    assert loaded["time_gap"] == GAP
    collator = HistoryCollator(dataset.items, loaded)
    batch, _ = collator.from_histories([dataset.history(0)])
    assert named(batch.fields["time_gap"][0].tolist()) == ["first", "0", "1", "0", "1"]
