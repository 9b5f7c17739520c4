"""Events that are there more than once: published review files repeat rows, and a log may."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl

from userllm.data.in_turn import each
from userllm.data.sorting import IN_CACHE


def repeats_note(item: np.ndarray, time: np.ndarray, offsets: np.ndarray) -> str:
    """Says how many events are there before: of the same user, item and second, and of the same user and item.

    item, time: [events], sorted by user. offsets: where each user's events begin, [users + 1].
    """
    pairs = same = 0
    for more_pairs, more_same in each(
        lambda users: _repeats(item, time, offsets, *users), _user_blocks(offsets)
    ):
        pairs += more_pairs
        same += more_same
    if not pairs:
        return "no user has an item twice"
    return (
        f"{pairs:,} events are of a user and an item that had one before, {same:,} of them at the same second; "
        "--repeated first or last leaves them out"
    )


def _repeats(
    item: np.ndarray, time: np.ndarray, offsets: np.ndarray, first: int, last: int
) -> tuple[int, int]:
    """Of the users ``first:last``: events whose pair of user and item was there before, and at the same second."""
    start, stop = int(offsets[first]), int(offsets[last])
    if start == stop:
        return 0, 0
    pair = np.repeat(np.arange(last - first, dtype=np.int64), np.diff(offsets[first : last + 1]))
    items = item[start:stop]
    item_bits = int(items.max()).bit_length()
    pair <<= item_bits
    pair |= items
    seconds = time[start:stop]
    low = int(seconds.min())
    time_bits = (int(seconds.max()) - low).bit_length()
    if (last - first - 1).bit_length() + item_bits + time_bits <= 63:
        keys = pair
        keys <<= time_bits
        keys |= seconds - low
        keys.sort()
        same = int(np.count_nonzero(keys[1:] == keys[:-1]))
        keys >>= time_bits
        return int(np.count_nonzero(keys[1:] == keys[:-1])), same
    frame = pl.DataFrame({"pair": pair, "time": seconds})
    return len(frame) - frame["pair"].n_unique(), len(frame) - frame.n_unique()


def _user_blocks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of users with about ``IN_CACHE`` events; at least one user."""
    first = 0
    while first < len(offsets) - 1:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + IN_CACHE, side="right")) - 1)
        yield first, last
        first = last
