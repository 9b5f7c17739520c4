"""Sorts events that do not fit into memory: spilled to the disk, then sorted by ranges of users."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from userllm.data.columns import BLOCK, ColumnWriter, column_file, read_stretch
from userllm.data.count_filters import Repeated
from userllm.data.in_turn import each

SORT_BYTES = 48
"""Bytes of memory that sorting needs for an event without fields."""
FEW_ROWS = 1 << 22
"""Ranges need not be larger than this: larger ones are sorted slower, as long as there are few of them."""
MOST_RANGES = 8
IN_CACHE = 1 << 18
"""Events that are sorted at once where users come one after the other."""


@dataclass(frozen=True)
class Sorted:
    """lengths: events per user, [users]. span: first and last time, s. repeated: events that were left out."""

    lengths: np.ndarray
    span: tuple[int, int]
    repeated: int


@dataclass(frozen=True)
class Part:
    """Sorted events of the users ``first:last``: their columns, times in seconds, and how many each user has."""

    first: int
    last: int
    columns: dict[str, np.ndarray]
    lengths: np.ndarray
    repeated: int


class Spill:
    """Events with numbered users and items, in the order they came, in a folder. types: column -> its dtype."""

    def __init__(self, folder: Path, types: Mapping[str, str]):
        folder.mkdir()
        self.folder, self.types = folder, dict(types)
        self._writers = {name: ColumnWriter(column_file(folder, name), t) for name, t in types.items()}
        self._lengths = np.zeros(0, dtype=np.int64)
        self._by_user, self._latest_user = True, 0

    def append(self, columns: Mapping[str, np.ndarray]) -> None:
        for name, writer in self._writers.items():
            writer.append(columns[name])
        user = columns["user"]
        counts = np.bincount(user, minlength=len(self._lengths))
        counts[: len(self._lengths)] += self._lengths
        self._lengths = counts
        if self._by_user and len(user):
            self._by_user = bool(user[0] >= self._latest_user and (user[1:] >= user[:-1]).all())
            self._latest_user = int(user[-1])

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def sort_into(self, out: Path, memory: int, repeated: Repeated, ticks: int) -> Sorted:
        """Columns in order of user and time, times in seconds; the spill is removed."""
        self.close()
        rows = int(self._lengths.sum())
        ranges = list(self._ranges(memory, rows))
        writers = {n: ColumnWriter(column_file(out, n), self.types[n]) for n in self.types if n != "user"}
        lengths = np.zeros(len(self._lengths), dtype=np.int64)
        earliest, latest, dropped = 2**63 - 1, -(2**63), 0

        def sort(users: tuple[int, int]) -> Part:
            return self._sorted(*users, rows, len(ranges) == 1, repeated, ticks)

        # parts of a log in order of users are small, so that there may be several in memory at once
        for part in each(sort, ranges) if self._by_user else map(sort, ranges):
            lengths[part.first : part.last] = part.lengths
            dropped += part.repeated
            earliest = min(earliest, int(part.columns["time"].min(initial=2**63 - 1)))
            latest = max(latest, int(part.columns["time"].max(initial=-(2**63))))
            for name, writer in writers.items():
                writer.append(part.columns.pop(name))
        for writer in writers.values():
            writer.close()
        shutil.rmtree(self.folder)
        return Sorted(lengths, (earliest, latest), dropped)

    def _sorted(self, first: int, last: int, rows: int, whole: bool, repeated: Repeated, ticks: int) -> Part:
        """The users ``first:last``. rows: of all events. whole: whether these are all users."""
        names = [name for name in self.types if name != "user"]
        if self._by_user:
            stop = int(self._lengths[:last].sum())
            start = stop - int(self._lengths[first:last].sum())
            user = read_stretch(self.folder, "user", start, stop)
            columns = {name: read_stretch(self.folder, name, start, stop) for name in names}
        else:
            user, picked = self._of_users(first, last, rows, whole)
            columns = {name: self._picked(name, picked, rows) for name in names}
        user = user - first
        order = _order(user, columns["time"])
        dropped = 0
        if repeated != "all":
            pair = pl.Series(user[order].astype(np.int64) << 32 | columns["item"][order])
            keep = pair.is_first_distinct() if repeated == "first" else pair.is_last_distinct()
            dropped = int((~keep).sum())
            order = order[keep.to_numpy()]
        lengths = np.bincount(user[order], minlength=last - first)
        del user
        for name in names:  # one after the other: of a column both orders are in memory
            columns[name] = columns[name][order]
        if ticks > 1:
            columns["time"] //= ticks
        return Part(first, last, columns, lengths, dropped)

    def _ranges(self, memory: int, events: int) -> Iterator[tuple[int, int]]:
        """Ranges of users whose events fit into memory; at least one user."""
        room = int(memory * 0.8) // (SORT_BYTES + 8 * len(self.types))
        best = IN_CACHE if self._by_user else max(FEW_ROWS, events // MOST_RANGES)
        rows = max(1, min(room, best))
        ends = np.cumsum(self._lengths)
        first = 0
        while first < len(ends):
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + rows, side="right")))
            yield first, last
            first = last

    def _of_users(
        self, first: int, last: int, rows: int, whole: bool
    ) -> tuple[np.ndarray, list[np.ndarray] | None]:
        """Users of the spilled events of a range of users, and where these events are, block by block (None: all)."""
        if whole:
            return read_stretch(self.folder, "user", 0, rows), None
        users, picked = [], []
        for start in range(0, rows, BLOCK):
            block = read_stretch(self.folder, "user", start, min(start + BLOCK, rows))
            found = np.flatnonzero((block >= first) & (block < last)).astype(np.int32)
            users.append(block[found])
            picked.append(found)
        return np.concatenate(users), picked

    def _picked(self, name: str, picked: list[np.ndarray] | None, rows: int) -> np.ndarray:
        if picked is None:
            return read_stretch(self.folder, name, 0, rows)
        found = np.empty(sum(map(len, picked)), dtype=self.types[name])
        place = 0
        for number, rows_of_block in enumerate(picked):
            if len(rows_of_block):
                start = number * BLOCK
                block = read_stretch(self.folder, name, start, min(start + BLOCK, rows))
                found[place : place + len(rows_of_block)] = block[rows_of_block]
                place += len(rows_of_block)
        return found


def _order(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Where the events of user and time order are; equal ones stay as they are."""
    if not len(user):
        return np.empty(0, dtype=np.int64)
    low = int(time.min())
    time_bits, user_bits = (int(time.max()) - low).bit_length(), int(user.max()).bit_length()
    row_bits = (len(user) - 1).bit_length()
    if user_bits + time_bits + row_bits <= 63:  # all in one number, which numpy sorts several times sooner
        keys = user.astype(np.int64)
        keys <<= time_bits
        keys |= time - low
        keys <<= row_bits
        keys |= np.arange(len(user))
        keys.sort()
        keys &= (1 << row_bits) - 1
        return keys
    if user_bits + time_bits <= 63:  # one number to sort by: twice as fast as two
        frame = pl.DataFrame({"key": user.astype(np.int64) << time_bits | (time - low)})
    else:
        frame = pl.DataFrame({"user": user, "time": time})
    return frame.select(pl.arg_sort_by(*frame.columns, maintain_order=True)).to_series().to_numpy()
