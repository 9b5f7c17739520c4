"""Events that are there more than once: published review files repeat rows, and a log may."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl

from userllm.data.columns import BLOCK


def repeats_note(item: np.ndarray, time: np.ndarray, offsets: np.ndarray) -> str:
    """Says how many events are there before: of the same user, item and second, and of the same user and item.

    item, time: [events], sorted by user. offsets: where each user's events begin, [users + 1].
    """
    pairs = same = 0
    for first, last in _user_blocks(offsets):
        start, stop = int(offsets[first]), int(offsets[last])
        user = np.repeat(np.arange(last - first, dtype=np.int64), np.diff(offsets[first : last + 1]))
        frame = pl.DataFrame({"pair": user << 32 | item[start:stop], "time": time[start:stop]})
        frame = frame.filter(pl.col("pair").is_duplicated())
        pairs += len(frame) - frame["pair"].n_unique()
        same += len(frame) - frame.n_unique()
    if not pairs:
        return "no user has an item twice"
    return (
        f"{pairs:,} events are of a user and an item that had one before, {same:,} of them at the same second; "
        "--repeated first or last leaves them out"
    )


def _user_blocks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of users with about ``BLOCK`` events; at least one user."""
    first = 0
    while first < len(offsets) - 1:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + BLOCK, side="right")) - 1)
        yield first, last
        first = last
