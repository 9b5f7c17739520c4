from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from userllm.data import BatchConfig, LengthBucketSampler, Split, SplitConfig, TrainingSequences
from userllm.data.batches import alike_in_length

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=30)


def split_of(lengths: list[int], config: SplitConfig) -> Split | None:
    """A split without a dataset on disk; None where it would keep nobody."""

    class Lengths:
        folder = "made"
        num_users = len(lengths)

        class card:
            fingerprint = "f"

    Lengths.lengths = np.array(lengths)  # pyright: ignore
    kept = config.window + 1 if config.kind == "paper" else config.min_events
    return config.build(Lengths) if max(lengths) >= kept else None  # pyright: ignore


@settings(deadline=None, max_examples=150)
@given(LENGTHS, st.integers(1, 40), st.integers(0, 5), st.sampled_from(["leave_last_out", "paper"]))
def test_no_test_event_can_reach_training(lengths, size, seed, kind):
    """Over all chunks of several epochs: no index of a test or validation event is ever an input or a target."""
    split = split_of(lengths, SplitConfig(kind, window=size, min_events=3))
    if split is None:
        return
    held_out = set(zip(split.users.tolist(), split.test.tolist(), strict=True))
    held_out |= {
        (u, v) for u, v in zip(split.users.tolist(), split.validation.tolist(), strict=True) if v >= 0
    }
    assert all((user, lengths[user] - 1) in held_out for user in split.users.tolist())
    sequences = TrainingSequences(split, max_length=size, seed=seed)
    kept = set(split.users.tolist())
    for epoch in range(3):
        sequences.set_epoch(epoch)
        for user, start, stop in sequences.rows.tolist():
            assert user in kept
            assert 0 <= start < stop <= lengths[user] - 1
            assert not held_out & {(user, position) for position in range(start, stop)}


@settings(deadline=None, max_examples=150)
@given(LENGTHS, st.integers(1, 40), st.integers(0, 9))
def test_every_training_event_is_a_target_once_an_epoch(lengths, max_length, epoch):
    split = split_of(lengths, SplitConfig(min_events=3))
    if split is None:
        return
    sequences = TrainingSequences(split, max_length)
    number = len(sequences)
    sequences.set_epoch(epoch)
    assert len(sequences) == number
    assert (sequences.lengths <= max_length).all()
    assert (sequences.lengths >= 1).all()
    targets = Counter(
        (user, i) for user, start, stop in sequences.rows.tolist() for i in range(start + 1, stop)
    )
    wanted = {
        (user, i)
        for user, end in zip(split.users.tolist(), split.train_end.tolist(), strict=True)
        for i in range(1, end)
    }
    assert targets == Counter(wanted)


@settings(deadline=None, max_examples=100)
@given(LENGTHS, st.integers(1, 40), st.integers(1, 60), st.sampled_from(["leave_last_out", "paper"]))
def test_recent_targets_only(lengths, size, recent, kind):
    """Each user's latest targets once an epoch, one event before them as the first input, and nothing earlier."""
    split = split_of(lengths, SplitConfig(kind, window=size, min_events=3))
    if split is None:
        return
    sequences = TrainingSequences(split, max_length=size, recent=recent)
    before = size if kind == "paper" else 1
    for epoch in range(2):
        sequences.set_epoch(epoch)
        first = {"paper": lambda start, stop: stop - 1, "leave_last_out": lambda start, stop: start + 1}[kind]
        targets = Counter(
            (u, i) for u, start, stop in sequences.rows.tolist() for i in range(first(start, stop), stop)
        )
        wanted = {
            (user, i)
            for user, end in zip(split.users.tolist(), split.train_end.tolist(), strict=True)
            for i in range(max(before, end - recent), end)
        }
        assert targets == Counter(wanted)
        ends = dict(zip(split.users.tolist(), split.train_end.tolist(), strict=True))
        assert all(
            start >= max(0, ends[user] - recent - before) for user, start, _ in sequences.rows.tolist()
        )


def test_recent_of_the_encoders_length_is_one_chunk_per_user():
    split = split_of([60, 7, 33], SplitConfig())
    assert split is not None
    assert TrainingSequences(split, 30, recent=30).rows.tolist() == [[0, 27, 58], [1, 0, 5], [2, 0, 31]]
    with pytest.raises(ValueError, match="recent is 0"):
        TrainingSequences(split, recent=0)


def test_cuts_differ_by_epoch_and_come_back():
    split = split_of([90] * 20, SplitConfig())
    assert split is not None
    sequences = TrainingSequences(split, 30, seed=3)
    first = sequences.rows
    sequences.set_epoch(1)
    assert (sequences.rows != first).any()
    sequences.set_epoch(0)
    assert (sequences.rows == first).all()
    assert (TrainingSequences(split, 30, seed=4).rows != first).any()


def test_the_papers_windows():
    lengths = [10, 11, 12, 40, 90]
    split = split_of(lengths, SplitConfig("paper", window=10))
    assert split is not None
    sequences = TrainingSequences(split)
    counts = Counter(user for user, _, _ in sequences.rows.tolist())
    for user, validation in zip(split.users.tolist(), split.validation.tolist(), strict=True):
        assert counts[user] == lengths[user] - 10 - 1 - (validation >= 0)
    assert set(sequences.lengths.tolist()) == {10}
    assert len({tuple(row) for row in sequences.rows.tolist()}) == len(sequences)

    drawn = TrainingSequences(split, windows=7)
    everything = {tuple(row) for row in sequences.rows.tolist()}
    assert len(drawn) == 7
    assert {tuple(row) for row in drawn.rows.tolist()} <= everything
    first = drawn.rows
    drawn.set_epoch(1)
    assert (drawn.rows != first).any()


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(
    LENGTHS,
    st.integers(1, 40),
    st.one_of(
        st.builds(BatchConfig, events=st.integers(40, 300), sequences=st.none(), pool=st.integers(1, 8)),
        st.builds(BatchConfig, events=st.none(), sequences=st.integers(1, 9), pool=st.integers(1, 8)),
    ),
)
def test_batches_hold_every_index_once_and_their_number_is_known(lengths, max_length, config):
    split = split_of(lengths, SplitConfig(min_events=3))
    if split is None or not (split.train_end > 1).any():
        return
    sequences = TrainingSequences(split, max_length)
    sampler = LengthBucketSampler(sequences, config)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(batches)
        assert sorted(i for batch in batches for i in batch) == list(range(len(sequences)))
        if config.sequences is not None:
            assert all(len(batch) <= config.sequences for batch in batches)
        elif config.events is not None and len(batches) > 1:
            assert all(sequences.lengths[batch].sum() < 2 * config.events + max_length for batch in batches)


def test_batch_order_is_a_function_of_seed_and_epoch():
    split = split_of([7, 90, 33, 50] * 30, SplitConfig())
    assert split is not None

    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = LengthBucketSampler(TrainingSequences(split, 20), BatchConfig(events=200), seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)


def test_batches_are_of_similar_length():
    split = split_of(np.random.default_rng(0).integers(5, 90, 400).tolist(), SplitConfig())
    assert split is not None
    sequences = TrainingSequences(split, 90)
    batches = list(LengthBucketSampler(sequences, BatchConfig(events=500)))
    padded = sum(int(sequences.lengths[batch].max()) * len(batch) for batch in batches)
    assert padded < 1.2 * sequences.lengths.sum()


def test_budgets_that_make_no_sense():
    split = split_of([60], SplitConfig())
    assert split is not None
    sequences = TrainingSequences(split, 50)
    with pytest.raises(ValueError, match="cannot hold one sequence of 50"):
        LengthBucketSampler(sequences, BatchConfig(events=49))
    with pytest.raises(ValueError, match="either in events or in sequences"):
        LengthBucketSampler(sequences, BatchConfig(events=None))
    with pytest.raises(ValueError, match="max_length"):
        TrainingSequences(split, 0)


@pytest.mark.parametrize(("events", "most"), [(1, None), (12, None), (12, 2), (1000, None)])
def test_histories_of_alike_length_go_together_once_each(events, most):
    lengths = [5, 0, 3, 12, 1, 3, 40, 2, 0]
    batches = list(alike_in_length(lengths, events, most))
    places = [place for batch in batches for place in batch]
    assert sorted(places) == list(range(len(lengths)))
    assert [lengths[place] for place in places] == sorted(lengths)
    for batch in batches:
        padded = len(batch) * max(1, *(lengths[place] for place in batch), 0)
        assert len(batch) == 1 or (padded <= events and len(batch) <= (most or len(batch)))
    assert list(alike_in_length([], events, most)) == []
