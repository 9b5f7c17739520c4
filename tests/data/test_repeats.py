from collections import Counter

import numpy as np
import pytest

from userllm.data import repeats
from userllm.data.repeats import repeats_note


@pytest.mark.parametrize("far", [1, 2**60])  # times that leave no room for the others in one number
@pytest.mark.parametrize("block", [1, 50, 10**6])
def test_every_event_that_was_there_before_is_counted(far, block, monkeypatch):
    monkeypatch.setattr(repeats, "IN_CACHE", block)
    random = np.random.default_rng(1)
    lengths = random.integers(1, 40, 30)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    item = random.integers(0, 12, offsets[-1]).astype(np.int32)
    time = random.integers(-2, 3, offsets[-1]) * far
    user = np.repeat(np.arange(30), lengths)
    pairs = Counter(zip(user.tolist(), item.tolist(), strict=True))
    whole = Counter(zip(user.tolist(), item.tolist(), time.tolist(), strict=True))
    wanted = [sum(count - 1 for count in one.values()) for one in (pairs, whole)]
    assert all(wanted)
    assert repeats_note(item, time, offsets).startswith(
        f"{wanted[0]:,} events are of a user and an item that had one before, {wanted[1]:,} of them at the same second"
    )


def test_nothing_twice():
    assert (
        repeats_note(np.arange(3), np.zeros(3, np.int64), np.array([0, 2, 3])) == "no user has an item twice"
    )
