"""Histories to vocabulary ids, [B, S] and [B, S, K], by table look-ups: no Python per event."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property

import numpy as np
import polars as pl
import torch

from userllm.data.store import Dataset
from userllm.data.time_gaps import time_gap_ids
from userllm.data.titles import distinct_titles, listed
from userllm.data.vocabulary import PADDING, UNKNOWN, FieldVocabulary, Vocabulary, value_text
from userllm.events import UNKNOWN_TIME, Event, HistoryBatch, TextOf, UserHistory

Row = tuple[int, int, int]
"""(user, start, stop): the events ``start:stop`` of a user."""


@dataclass(frozen=True)
class Unread:
    """What of some histories is read as unknown, each once and in order.

    items: ids or titles that the model has never seen. titles: by a title that several items have, their ids. values:
    of the events' fields, like "rating 99". fields: that nobody reads but look like one that is left out, like "ratng
    (rating?)".
    """

    items: list[str]
    titles: dict[str, list[str]]
    values: list[str]
    fields: list[str]

    def __bool__(self) -> bool:
        return bool(self.items or self.titles or self.values or self.fields)

    def __str__(self) -> str:
        several = [f"{title} ({listed(ids)})" for title, ids in self.titles.items()]
        said = (
            ("items that the model has never seen are read as unknown", self.items),
            ("titles that several items have are read as unknown, give an id", several),
            ("values that the model has never seen are read as unknown", self.values),
            ("fields that the model does not have are not read", self.fields),
        )
        return "; ".join(f"{what}: {listed(names)}" for what, names in said if names)


class HistoryCollator:
    """Encodes histories of seen and unseen users from an item table and a vocabulary, without the dataset.

    items: the item table (``dataset.items``, or items.parquet beside a saved model): id, and item-level fields.
    """

    def __init__(self, items: pl.DataFrame, vocabulary: Vocabulary):
        self.items = items
        self.vocabulary = vocabulary
        self.num_items = len(items)
        self.item_vocabulary_ids = np.append(vocabulary["item"].ids_of(items["id"].to_list()), UNKNOWN)
        self.item_fields = {f.name: self._item_table(f) for f in vocabulary if f.level == "item"}
        self.event_fields = [f for f in vocabulary if f.level == "event" and f.name != "item"]
        self.time_fields = [f for f in vocabulary if f.level == "time"]

    def _item_table(self, field: FieldVocabulary) -> np.ndarray:
        """Ids by item row, [items + 1] or [items + 1, K]; the last row is an item that is not in the table."""
        column = self.items[field.name].to_list()
        if field.kind == "single":
            return np.array(
                [UNKNOWN if v is None else field.id_of(v) for v in [*column, None]], dtype=np.int64
            )
        width = max((len(values) for values in column if values is not None), default=0)
        table = np.full((self.num_items + 1, max(1, width)), PADDING, dtype=np.int64)
        for row, values in enumerate(column):
            for place, value in enumerate(values or ()):
                table[row, place] = field.id_of(value)
        return table

    def encode_values(self, field: FieldVocabulary, values: np.ndarray) -> np.ndarray:
        """Vocabulary ids of an event-level field's values, same shape."""
        distinct, place = np.unique(values, return_inverse=True)
        return field.ids_of(distinct.tolist())[place].reshape(values.shape)

    def from_arrays(
        self, item_rows: np.ndarray, event_ids: dict[str, np.ndarray], times: np.ndarray, mask: np.ndarray
    ) -> HistoryBatch:
        """A batch from padded arrays.

        item_rows: [B, S] rows of the item table (``num_items`` where the item is not in it; any row where masked).
        event_ids: by event-level field and time field, [B, S] vocabulary ids. times: [B, S], see ``HistoryBatch``; any
        where masked. mask: [B, S], True where there is an event.
        """
        fields = {}
        for field in self.vocabulary:
            if field.name == "item":
                ids = np.where(mask, self.item_vocabulary_ids[item_rows], PADDING)
            elif field.level != "item":
                ids = np.where(mask, event_ids[field.name], PADDING)
            else:
                ids = self.item_fields[field.name][item_rows]
                ids = np.where(mask if ids.ndim == 2 else mask[:, :, None], ids, PADDING)
            fields[field.name] = torch.from_numpy(ids)
        times = np.where(mask, times, UNKNOWN_TIME)
        return HistoryBatch(fields, torch.from_numpy(mask), torch.from_numpy(times))

    def from_histories(
        self, histories: Sequence[UserHistory], max_length: int | None = None
    ) -> tuple[HistoryBatch, Unread]:
        """A batch of anyone's histories, and what of them is read as unknown.

        An event's item may be named by its raw id, by a title that only one item has, or as answers name it ("title
        [2]"). Unknown items keep their place with id 1 and no genres; so do unknown values, and fields that an event
        leaves out or has None for. Of each history the latest ``max_length`` events are kept; a time gap still knows of
        the event before them. A batch of empty histories has S = 1, all masked.
        """
        events = [
            list(history.events)[-max_length:] if max_length else list(history.events)
            for history in histories
        ]
        shape = (len(events), max(1, max(map(len, events), default=0)))
        mask = np.zeros(shape, dtype=bool)
        item_rows = np.full(shape, self.num_items, dtype=np.int64)
        times = np.full(shape, UNKNOWN_TIME, dtype=np.int64)
        event_ids = {
            f.name: np.full(shape, UNKNOWN, dtype=np.int64) for f in [*self.event_fields, *self.time_fields]
        }
        unknown, values, misspelt = dict[str, None](), dict[str, None](), dict[str, None]()
        known = {field.name for field in self.event_fields}
        for b, row in enumerate(events):
            mask[b, : len(row)] = True
            whole = np.array(
                [UNKNOWN_TIME if event.time is None else event.time for event in histories[b].events],
                dtype=np.int64,
            )
            kept = slice(len(whole) - len(row), None)
            times[b, : len(row)] = whole[kept]
            for field in self.time_fields:
                gaps = time_gap_ids(field, whole, np.arange(len(whole)) == 0)
                event_ids[field.name][b, : len(row)] = gaps[kept]
            for s, event in enumerate(row):
                item_rows[b, s] = self.row_of(event.item)
                if self.item_vocabulary_ids[item_rows[b, s]] == UNKNOWN:
                    unknown[event.item] = None
                if event.fields and (left_out := known - event.fields.keys()):
                    misspelt |= dict.fromkeys(_misspelt(event.fields.keys() - known, left_out))
                for field in self.event_fields:
                    value = event.fields.get(field.name)
                    if value is None:
                        continue
                    event_ids[field.name][b, s] = number = field.id_of(value)
                    if number == UNKNOWN:
                        values[f"{field.name} {value_text(value)}"] = None
        batch = self.from_arrays(item_rows, event_ids, times, mask)
        batch.texts = [_texts_of(row) for row in events]
        several = {title: self._shared_titles[title] for title in unknown if title in self._shared_titles}
        items = [item for item in unknown if item not in several]
        return batch, Unread(items, several, list(values), list(misspelt))

    def row_of(self, item: str) -> int:
        """The item's row in the table, by raw id, unique title, or "title [2]"; ``num_items`` where there is none."""
        return self._rows.get(item, self.num_items)

    @cached_property
    def _rows(self) -> dict[str, int]:
        titles = self.items["title"].to_list() if "title" in self.items.columns else []
        rows = {title: row for row, title in enumerate(distinct_titles(titles))}
        for title in self._shared_titles:
            del rows[title]
        return rows | {raw_id: row for row, raw_id in enumerate(self.items["id"].to_list())}

    @cached_property
    def _shared_titles(self) -> dict[str, list[str]]:
        """The ids of the items that have a title, where they are several."""
        if "title" not in self.items.columns:
            return {}
        by_title = self.items.group_by("title", maintain_order=True).agg("id")
        return dict(by_title.filter(pl.col("id").list.len() > 1).select("title", "id").iter_rows())


def _misspelt(given: Set[str], left_out: Set[str]) -> list[str]:
    """Which of the fields that are not read may be meant for one that is left out. Others may be texts to be shown."""
    found = [(name, get_close_matches(name.lower(), left_out, n=1)) for name in sorted(given)]
    return [f"{name} ({close[0]}?)" for name, close in found if close]


def _texts_of(events: Sequence[Event]) -> TextOf:
    return lambda name, place: str(events[place].fields[name]) if name in events[place].fields else ""


class StoredHistories:
    """Batches of a prepared dataset's histories. Of the events only those of a batch are read.

    The time gap of a history's first event is the one to the event before it in the dataset, inside the history or not.
    """

    def __init__(
        self,
        dataset: Dataset,
        vocabulary: Vocabulary,
        collator: HistoryCollator | None = None,
        rows: np.ndarray | None = None,
    ):
        """rows [items]: of each of the dataset's items the row in the collator's table, where that is another."""
        self.dataset = dataset
        self.rows = rows
        self.collator = collator or HistoryCollator(dataset.items, vocabulary)
        self.offsets = dataset.offsets
        self.items = dataset.events["item"]
        self.times = dataset.events["time"]
        self.values = {field.name: dataset.events[field.name] for field in self.collator.event_fields}

    def batch(self, rows: Sequence[Row] | np.ndarray) -> HistoryBatch:
        """The histories ``(user, start, stop)``, padded to the longest (at least 1)."""
        users, starts, stops = np.asarray(rows, dtype=np.int64).reshape(-1, 3).T
        lengths = stops - starts
        steps = np.arange(max(1, lengths.max(initial=0)))
        mask = steps < lengths[:, None]
        index = np.where(mask, (self.offsets[users] + starts)[:, None] + steps, 0)
        times = self.times[index]
        event_ids = {
            field.name: self.collator.encode_values(field, self.values[field.name][index])
            for field in self.collator.event_fields
        }
        if self.collator.time_fields:
            first = index == self.offsets[users][:, None]
            before = self.times[np.maximum(index - 1, 0)]
            event_ids |= {
                field.name: time_gap_ids(field, times, first, before) for field in self.collator.time_fields
            }
        items = self.items[index] if self.rows is None else self.rows[self.items[index]]
        batch = self.collator.from_arrays(items, event_ids, times, mask)
        batch.texts = [self._texts_from(start) for start in (self.offsets[users] + starts).tolist()]
        return batch

    def _texts_from(self, first: int) -> TextOf:
        return lambda name, place: self.dataset.event_texts(name, [first + place])[0]

    def targets(self, rows: Sequence[Row] | np.ndarray) -> HistoryBatch:
        """The event ``stop`` that follows each row, as a batch with S = 1."""
        users, _, stops = np.asarray(rows, dtype=np.int64).reshape(-1, 3).T
        return self.batch(np.stack([users, stops, stops + 1], axis=1))

    def next_events(self, rows: Sequence[Row] | np.ndarray) -> dict[str, HistoryBatch]:
        """Training chunks as ``{"inputs": events[:-1], "targets": events[1:]}``, aligned position by position."""
        users, starts, stops = np.asarray(rows, dtype=np.int64).reshape(-1, 3).T
        return {
            "inputs": self.batch(np.stack([users, starts, stops - 1], axis=1)),
            "targets": self.batch(np.stack([users, starts + 1, stops], axis=1)),
        }


def encode_histories(
    dataset: Dataset, vocabulary: Vocabulary, rows: Sequence[Row] | np.ndarray
) -> HistoryBatch:
    """One batch of stored histories. For many batches build a ``StoredHistories`` once."""
    return StoredHistories(dataset, vocabulary).batch(rows)


def encode_user_history(
    histories: Sequence[UserHistory], vocabulary: Vocabulary, items: pl.DataFrame
) -> tuple[HistoryBatch, Unread]:
    """One batch of anyone's histories, and what is unknown in it. For many batches build a ``HistoryCollator`` once."""
    return HistoryCollator(items, vocabulary).from_histories(histories)
