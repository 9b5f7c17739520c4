"""A dataset's users into a store: only who is missing, or has events that the store does not know of."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from userllm.data.batches import alike_in_length
from userllm.data.collation import HistoryCollator, StoredHistories
from userllm.data.store import Dataset
from userllm.errors import UserError
from userllm.serving.record import Kept, UserRecord, extend, named, remember, why_not_extended
from userllm.serving.store import StoreCard, UserStore
from userllm.serving.user_side import UserSide

BATCH_EVENTS = 8192
"""Events, padding included, that go through the encoder at once."""
BATCH_NUMBERS = 1 << 25
"""Numbers at most that a batch makes of its users: scores of the catalogue, keys and values."""
USERS = 1024
"""Users that are looked at together: of these, users of alike length go through the encoder together."""


@dataclass
class Embedded:
    """What became of the users. anew: computed from their whole history although the store had them, by the reason."""

    asked: int = 0
    known: int = 0
    new: int = 0
    extended: int = 0
    anew: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [
            f"{self.asked:,} users: {self.known:,} were there already, {self.new:,} new, {self.extended:,} "
            f"continued from their new events alone, {self.anew.total():,} had changed and were computed anew"
        ]
        return "\n".join([*lines, *(f"  {count:,} anew: {reason}" for reason, count in self.anew.items())])


class EventDigests:
    """Digests of the events of a user that a model looks at: item, time, and the fields it reads."""

    def __init__(self, dataset: Dataset, fields: Sequence[str]):
        self.dataset = dataset
        texts = [spec.name for spec in dataset.card.fields if spec.level == "event" and spec.kind == "text"]
        self.texts = [name for name in fields if name in texts]
        self.values = [dataset.events[name] for name in fields if name not in texts]

    def of(self, user: int, stop: int | None = None) -> bytes:
        """16 bytes for the user's first ``stop`` events."""
        start, end = int(self.dataset.offsets[user]), int(self.dataset.offsets[user + 1])
        end = end if stop is None else min(start + stop, end)
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self._items[self.dataset.events["item"][start:end]].data)
        for column in (self.dataset.events["time"], *self.values):
            digest.update(np.ascontiguousarray(column[start:end]).data)
        for name in self.texts:
            for raw in map(str.encode, self.dataset.event_texts(name, range(start, end))):
                digest.update(len(raw).to_bytes(4, "little") + raw)
        return digest.digest()

    @cached_property
    def _items(self) -> np.ndarray:
        """A number for each item that follows from its raw id, so that a dataset prepared again has the same."""
        return np.array(
            [
                int.from_bytes(hashlib.blake2b(raw.encode(), digest_size=8).digest(), "little")
                for raw in self.dataset.item_ids
            ],
            dtype="<u8",
        )


def event_fields(side: UserSide) -> list[str]:
    """The fields of an event that a model looks at, besides the item and the time."""
    return [*(f.name for f in side.collator.event_fields), *side.config.text.texts]


def store_card(
    side: UserSide,
    dataset: Dataset | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    keys_values: bool = False,
    state: bool = False,
) -> StoreCard:
    """The card of a store of this model's users. Raises UserError for a state that the encoder cannot go on from."""
    if state and side.encoder.not_extended is not None:
        raise UserError(f"an encoder state would be of no use: {side.encoder.not_extended}")
    name = None if dataset is None else dataset.card.name
    return StoreCard(side.version(), dtype, keys_values, state, name)


def rows_of_items(collator: HistoryCollator, dataset: Dataset, fields: Sequence[str]) -> np.ndarray:
    """Of each of a dataset's items the row in a model's catalogue, [items]. fields: of events, which the model reads.

    Raises UserError where the dataset lacks such a field, or the model knows none of its items.
    """
    known = {"item", *(f.name for f in dataset.card.fields if f.level == "event")}
    if lacking := [name for name in fields if name not in known]:
        raise UserError(
            f"{dataset.folder}: events have no field {lacking[0]!r}, which this model was trained with"
        )
    rows = np.array([collator.row_of(item) for item in dataset.item_ids], dtype=np.int64)
    if (rows == collator.num_items).all():
        raise UserError(f"{dataset.folder}: the model knows none of its items; it is another catalogue")
    return rows


class DatasetUsers:
    """A dataset's users as a model sees them. Raises UserError where the dataset lacks a field the model reads, or
    knows none of its items."""

    def __init__(self, side: UserSide, dataset: Dataset):
        self.side, self.dataset = side, dataset
        self.rows = rows_of_items(side.collator, dataset, event_fields(side))
        self.unknown_items = int((self.rows == side.collator.num_items).sum())
        self.stored = StoredHistories(dataset, side.collator.vocabulary, side.collator, self.rows)
        self.digests = EventDigests(dataset, event_fields(side))

    def seen(self, user: int, start: int = 0) -> Tensor:
        """Rows of the model's catalogue that the user had from event ``start`` on."""
        offsets = self.dataset.offsets
        rows = self.rows[self.dataset.events["item"][offsets[user] + start : offsets[user + 1]]]
        return torch.from_numpy(np.unique(rows[rows < self.side.collator.num_items]))

    def records(self, users: Sequence[int], store: UserStore) -> Iterator[UserRecord]:
        """Records of users from their whole histories, a few at a time."""
        lengths = self.dataset.lengths
        most = self.side.encoder.max_length
        for batch in self._batches(users, lambda user: min(int(lengths[user]), most), store.card.kept):
            rows = [
                (u, max(0, int(lengths[u]) - self.side.encoder.max_length), int(lengths[u])) for u in batch
            ]
            histories = self.stored.batch(rows).to(self.side.weight.device)
            events, seen = [int(lengths[u]) for u in batch], [self.seen(u) for u in batch]
            for user, record in zip(
                batch, remember(self.side, histories, events, seen, store.card.kept), strict=True
            ):
                yield named(record, self.dataset.user_ids[user], self.digests.of(user))

    def extended(self, users: Sequence[int], store: UserStore) -> Iterator[UserRecord]:
        """Records of users who are in the store, from it and their new events."""
        lengths = self.dataset.lengths
        for batch in self._batches(users, lambda user: int(lengths[user]), store.card.kept):
            before = [store[self.dataset.user_ids[user]] for user in batch]
            rows = [(u, len(old), int(lengths[u])) for u, old in zip(batch, before, strict=True)]
            histories = self.stored.batch(rows).to(self.side.weight.device)
            seen = [self.seen(user, len(old)) for user, old in zip(batch, before, strict=True)]
            for user, record in zip(
                batch, extend(self.side, before, histories, seen, store.card.kept), strict=True
            ):
                yield named(record, self.dataset.user_ids[user], self.digests.of(user))

    def _batches(self, users: Sequence[int], length: Callable[[int], int], keep: Kept) -> Iterator[list[int]]:
        """Users of alike length together, as many as ``BATCH_EVENTS`` and ``BATCH_NUMBERS`` allow."""
        side = self.side
        made = 0 if side.config.catalogue is None or side.scores_follow else side.collator.num_items
        if keep.keys_values:
            made += side.window * 2 * sum(block.key.out_features for block in side.blocks.values())
        most = max(1, BATCH_NUMBERS // max(1, made))
        for places in alike_in_length([length(user) for user in users], BATCH_EVENTS, most):
            yield [users[place] for place in places]


def embed(
    source: DatasetUsers,
    store: UserStore,
    users: Sequence[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Embedded:
    """Bring a store up to date for all of a dataset's users, or for those with these raw ids.

    Who is there with the same events stays as it is; who has new ones is continued from what the store keeps of the
    encoder, where it keeps that and the encoder can; everybody else is computed from the whole history. progress:
    called with the users who are up to date and their number, after each file. Several processes may do this at once
    for different users; ``store.compact`` afterwards. Raises UserError for a user who is not in the dataset.
    """
    dataset = source.dataset
    numbers = range(dataset.num_users) if users is None else [dataset.user_index(user) for user in users]
    numbers = list(dict.fromkeys(numbers))
    told = Embedded(asked=len(numbers))
    done = 0
    for start in range(0, len(numbers), USERS):
        some = numbers[start : start + USERS]
        whole, more = _what_to_do(source, some, store, told)
        done += len(some) - len(whole) - len(more)
        for written in store.put_all(chain(source.records(whole, store), source.extended(more, store))):
            done += written
            progress(done, len(numbers))
        if not whole and not more:
            progress(done, len(numbers))
    if users is None:
        store.card = replace(store.card, fingerprint=dataset.card.fingerprint)
        store.write_card()
    return told


def check_current(store: UserStore, user: str, side: UserSide, dataset: Dataset) -> None:
    """Raise UserError where a store's record of a user is not of the events that the dataset has of them."""
    events = int(store.column(user, "events"))
    number = dataset.user_index(user)
    if bytes(store.column(user, "digest").tolist()) != EventDigests(dataset, event_fields(side)).of(number):
        raise UserError(
            f"{store.folder}: was made of {events} events of user {user}, {dataset.folder} has others "
            f"({int(dataset.lengths[number])}); bring the store up to date with `userllm embed`"
        )


def _what_to_do(
    source: DatasetUsers, users: Sequence[int], store: UserStore, told: Embedded
) -> tuple[list[int], list[int]]:
    """Who of the users is computed from the whole history, and who from new events; the others stay as they are."""
    whole, more = [], []
    for user in users:
        name, length = source.dataset.user_ids[user], int(source.dataset.lengths[user])
        if name not in store:
            told.new += 1
            whole.append(user)
            continue
        made_of = bytes(store.column(name, "digest").tolist())
        events = int(store.column(name, "events"))
        if events == length and made_of == source.digests.of(user):
            told.known += 1
        elif events < length and made_of == source.digests.of(user, events):
            if (reason := why_not_extended(source.side, store[name], length - events)) is None:
                told.extended += 1
                more.append(user)
            else:
                told.anew[_in_general(reason)] += 1
                whole.append(user)
        else:
            told.anew["earlier events are not what they were"] += 1
            whole.append(user)
    return whole, more


def _in_general(reason: str) -> str:
    """A reason without one user's numbers."""
    return "more events than the encoder sees, so its window moves" if "window" in reason else reason
