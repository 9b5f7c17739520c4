"""Training chunks and their order: pure functions of (seed, epoch), so that a resumed run sees the same batches; and
batches of alike length for what is read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from userllm.data.collation import (
    HistoryCollator,
    Row,
    StoredHistories,
    encode_histories,
    encode_user_history,
)
from userllm.data.splits import Split
from userllm.ranges import PositiveInt

__all__ = [
    "BatchConfig",
    "HistoryCollator",
    "LengthBucketSampler",
    "Row",
    "StoredHistories",
    "TrainingSequences",
    "alike_in_length",
    "encode_histories",
    "encode_user_history",
]


class TrainingSequences(TorchDataset[Row]):
    """Chunks of users' training events for next-event pretraining, as rows (user, start, stop).

    Within a chunk the inputs are ``events[:-1]`` and the targets ``events[1:]`` (``StoredHistories.next_events``).

    leave_last_out: each user's first ``train_end`` events in chunks of at most ``max_length + 1``, which overlap by one
    event, so that every event but the user's first is a target exactly once an epoch. Where the chunks do not come out
    even, their cuts are drawn anew each epoch; the number of chunks and of targets never changes.
    paper: windows of exactly ``window`` events and their label; ``windows`` of them are drawn each epoch (None: all).
    recent: only the latest so many targets of each user, and the events they need before them (None: all).
    """

    def __init__(
        self,
        split: Split,
        max_length: int = 200,
        seed: int = 0,
        windows: int | None = None,
        recent: int | None = None,
    ):
        if max_length < 1:
            raise ValueError(f"max_length is {max_length}, must be at least 1")
        if recent is not None and recent < 1:
            raise ValueError(f"recent is {recent}, must be at least 1")
        self.split = split
        self.max_length = split.config.window if split.config.kind == "paper" else max_length
        self.seed = seed
        self.windows = windows
        self.recent = recent
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the chunks of an epoch. With loader workers, before they start."""
        self.epoch = epoch
        random = np.random.default_rng([self.seed, epoch])
        self.rows = self._windows(random) if self.split.config.kind == "paper" else self._chunks(random)

    def _chunks(self, random: np.random.Generator) -> np.ndarray:
        targets = self._recent(self.split.train_end - 1)
        first = self.split.train_end - 1 - targets
        counts = -(-targets // self.max_length)
        shift = random.integers(0, counts * self.max_length - targets + 1)
        user = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
        # the first chunk is cut short on the left, the last on the right
        start = first[user] + place * self.max_length - shift[user]
        stop = np.minimum(start + self.max_length + 1, self.split.train_end[user])
        return np.stack([self.split.users[user], np.maximum(start, first[user]), stop], axis=1)

    def _windows(self, random: np.random.Generator) -> np.ndarray:
        counts = self._recent(self.split.train_end - self.max_length)
        first = self.split.train_end - self.max_length - counts
        ends = np.cumsum(counts)
        total = int(ends[-1])
        if self.windows is None or self.windows >= total:
            chosen = np.arange(total)
        else:
            chosen = np.sort(random.choice(total, self.windows, replace=False, shuffle=False))
        user = np.searchsorted(ends, chosen, side="right")
        start = first[user] + chosen - (ends - counts)[user]
        return np.stack([self.split.users[user], start, start + self.max_length + 1], axis=1)

    def _recent(self, targets: np.ndarray) -> np.ndarray:
        """How many of a user's targets count, [users]."""
        return np.clip(targets, 0, self.recent)

    @property
    def lengths(self) -> np.ndarray:
        """Targets of each chunk, [chunks]: events less one."""
        return self.rows[:, 2] - self.rows[:, 1] - 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        user, start, stop = self.rows[index].tolist()
        return user, start, stop


@dataclass(frozen=True)
class BatchConfig:
    """How large a training batch is: by events, or by sequences."""

    events: PositiveInt | None = 8192
    """Events (targets) of a batch, on average; None to count sequences instead (ours)."""
    sequences: PositiveInt | None = None
    """Sequences of a batch; None to count events instead (paper, v1 Table 9: 32,768 windows on ML-20M)."""
    pool: PositiveInt = 32
    """Batches that are sorted by length together: more means less padding, fewer a better mix of lengths (ours)."""


class LengthBucketSampler(Sampler[list[int]]):
    """Batches of indices into ``sequences``, of similar length, every index once an epoch.

    The number of batches is the same in every epoch. With a budget of events a batch holds that many or a few more.
    """

    def __init__(self, sequences: TrainingSequences, config: BatchConfig, seed: int = 0):
        if (config.events is None) == (config.sequences is None):
            raise ValueError("give a batch size either in events or in sequences")
        if len(sequences) == 0:
            raise ValueError("there are no training sequences")
        self.sequences = sequences
        self.config = config
        self.seed = seed
        total = int(sequences.lengths.sum())
        if config.events is not None:
            if config.events < sequences.max_length:
                raise ValueError(f"{config.events} events cannot hold one sequence of {sequences.max_length}")
            self.batches = max(1, total // config.events)
        else:
            self.batches = -(-len(sequences) // int(config.sequences or 1))

    def set_epoch(self, epoch: int) -> None:
        """Move to an epoch, and the sequences with it."""
        self.sequences.set_epoch(epoch)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter([batch.tolist() for batch in self.order()])

    def order(self) -> list[np.ndarray]:
        """The epoch's batches, a pure function of (seed, epoch)."""
        random = np.random.default_rng([self.seed, self.sequences.epoch, 1])
        order = random.permutation(len(self.sequences))
        order = self._sorted_in_pools(order)
        batches = np.split(order, np.searchsorted(self._batch_of(order), np.arange(1, self.batches)))
        return [batches[place] for place in random.permutation(self.batches)]

    def _batch_of(self, order: np.ndarray) -> np.ndarray:
        """The batch that each entry of ``order`` falls into, rising. No batch is empty: no entry is longer than one."""
        if self.config.sequences is not None:
            return np.arange(len(order)) // self.config.sequences
        cost = self.sequences.lengths[order]
        return ((np.cumsum(cost) - cost) // (cost.sum() / self.batches)).astype(np.int64)

    def _sorted_in_pools(self, order: np.ndarray) -> np.ndarray:
        """Rising lengths in even pools, falling in odd ones: a batch across two pools is of one length, too."""
        pools = self._batch_of(order) // self.config.pool
        lengths = self.sequences.lengths[order]
        return order[np.lexsort((np.where(pools % 2 == 0, lengths, -lengths), pools))]


def alike_in_length(lengths: Sequence[int], events: int, most: int | None = None) -> Iterator[list[int]]:
    """Places of histories of these lengths in batches, the shortest first.

    A batch holds at most ``events`` events, padding included, and ``most`` histories; one history at least.
    """
    batch: list[int] = []
    for place in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) == most or (len(batch) + 1) * max(1, lengths[place]) > events):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
