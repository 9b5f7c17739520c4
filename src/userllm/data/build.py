"""Streams raw events into a dataset folder: number, spill to the disk, sort by ranges of users, write columns.

What is in memory is one batch of raw events, one range of users while it is sorted, and the tables of users and items;
``memory`` bounds the first two. Events of one user at one time keep the order in which they came.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import polars as pl

from userllm.data.card import FORMAT_VERSION, TIE_RULE, DatasetCard, FieldSpec, RowCounts, Source
from userllm.data.columns import (
    BLOCK,
    ColumnWriter,
    Texts,
    TextWriter,
    column_file,
    distinct,
    fingerprint,
    read_column,
    read_stretch,
    users_of,
    write_column,
)
from userllm.data.commit import (
    check_unchanged,
    check_writable,
    created_by,
    files_name,
    put_in_place,
    scratch_beside,
)
from userllm.errors import UserError

if TYPE_CHECKING:
    from userllm.data.store import Dataset

REJECTS = "rejects.csv"
Repeated = Literal["all", "first", "last"]
RUNS_SEEN = 1000
SORT_BYTES = 48
"""Bytes of memory that sorting needs for an event without fields."""


@dataclass(frozen=True)
class CountFilters:
    """Filters that need all events at once. Off by default."""

    repeated: Repeated = "all"
    """Of a user's events with one item keep all, the first, or the last."""
    min_item_events: int = 1
    """Items with fewer events are left out, and with them their events."""
    min_user_events: int = 1
    """Users with fewer events are left out. Both minima hold in the end: they are applied in turns."""


@dataclass
class EventBatch:
    """Raw events in the source's order.

    events: user and item (raw ids, text), time (ticks since 1970, integer) and the declared event fields (numbers, or
    text). counts: of the rows they came from; ``kept`` is the events of this batch.
    """

    events: pl.DataFrame
    counts: RowCounts


class Numbering:
    """Raw ids -> numbers from 0, in order of first appearance."""

    def __init__(self, known: Sequence[str] = ()):
        self._type = pl.Categorical(pl.Categories.random())
        self._codes_live = pl.Series(
            dtype=self._type
        )  # polars forgets the codes of a type that no series has
        self._number = np.empty(0, dtype=np.int32)
        self._ids: list[pl.Series] = []
        self.size = 0
        if len(known):
            self.numbers(pl.Series(known, dtype=pl.String))

    def numbers(self, ids: pl.Series) -> np.ndarray:
        """int32, one for each id; none of them may be null."""
        if len(ids) > 4 * RUNS_SEEN and ids.head(RUNS_SEEN).rle_id()[-1] * 8 < RUNS_SEEN:
            runs = ids.rle().struct.unnest()  # a log in order of users: number each stretch once
            return np.repeat(self._numbers(runs["value"]), runs["len"].to_numpy())
        return self._numbers(ids)

    def _numbers(self, ids: pl.Series) -> np.ndarray:
        ids = ids.cast(pl.String)
        codes = ids.cast(self._type).to_physical().to_numpy()
        top = int(codes.max()) + 1 if len(codes) else 0
        if top > len(self._number):
            room = np.full(max(top, 2 * len(self._number)), -1, dtype=np.int32)
            room[: len(self._number)] = self._number
            self._number = room
        numbers = self._number[codes]
        if (new := numbers < 0).any():
            frame = pl.DataFrame({"code": codes[new], "id": ids.filter(pl.Series(new))})
            frame = frame.unique("code", keep="first", maintain_order=True)
            self._number[frame["code"].to_numpy()] = np.arange(self.size, self.size + len(frame))
            self._ids.append(frame["id"].cast(pl.String))
            self.size += len(frame)
            numbers = self._number[codes]
        return numbers

    @property
    def ids(self) -> pl.Series:
        """Raw ids by number."""
        return pl.concat([pl.Series(dtype=pl.String), *self._ids]).alias("id")


def bytes_of(text: str) -> int:
    """A size like 500MB, 2GiB or a number of bytes. Raises UserError for anything else."""
    units = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if found is None or float(found[1]) <= 0:
        raise UserError(f"memory is {text!r}; give a size like 500MB or 2GiB")
    return int(float(found[1]) * units[found[2]])


class DatasetBuilder:
    """Takes batches of raw events and writes the dataset; nothing appears in ``folder`` before ``finish``.

    fields: the declared fields, the item first. items: the catalogue (id, title, item fields), if there is one.
    """

    def __init__(
        self,
        folder: Path,
        fields: Sequence[FieldSpec],
        *,
        items: pl.DataFrame | None = None,
        memory: int = 2**31,
    ):
        check_writable(folder)
        self.folder, self.fields, self.memory = folder, tuple(fields), memory
        self.items: pl.DataFrame | None = None
        self._grown: DatasetCard | None = None
        self.users = Numbering()
        self.item_numbers = Numbering()
        self.counts = RowCounts(0, 0)
        events = [f for f in fields if f.level == "event" and f.name != "item"]
        self.texts = [f.name for f in events if f.kind == "text"]
        self.numbers = [f.name for f in events if f.kind != "text"]
        self._scratch = scratch_beside(folder)
        self.scratch = Path(self._scratch.name)
        self.files, self._spill = self.scratch / "files", self.scratch / "spill"
        for folder in ("events", "values"):
            (self.files / folder).mkdir(parents=True)
        self._spill.mkdir()
        types = {"user": "<i4", "item": "<i4", "time": "<i8"}
        types |= dict.fromkeys(self.numbers, "<f4") | dict.fromkeys(self.texts, "<i8")
        self.types = types
        self._writers = {name: ColumnWriter(column_file(self._spill, name), t) for name, t in types.items()}
        self._text_writer = TextWriter(self.files / "texts.bin") if self.texts else None
        self._lengths = np.zeros(0, dtype=np.int64)
        if items is not None:
            self.add_items(items)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()
        if self._text_writer is not None:
            self._text_writer.close()
        self._scratch.cleanup()

    def start_from(self, old: Dataset, ticks_per_second: int) -> None:
        """Begin with the users, items and events of the dataset that is to grow; call it before anything is added."""
        if self._text_writer is not None:
            self._text_writer.close()
            shutil.copyfile(old.files / "texts.bin", self.files / "texts.bin")
            self._text_writer = TextWriter(self.files / "texts.bin")
        if (old.files / REJECTS).is_file():
            shutil.copyfile(old.files / REJECTS, self.files / REJECTS)
        self.users = Numbering(old.user_ids)
        self.add_items(old.items.drop("item"))
        self.counts, self._grown = old.card.rows, old.card
        for start in range(0, old.num_events, BLOCK):
            stop = min(start + BLOCK, old.num_events)
            columns = {name: column[start:stop] for name, column in old.columns.items()}
            columns["time"] = columns["time"] * ticks_per_second
            self._spill_columns(columns | {"user": users_of(old.offsets, start, stop)})

    def add_items(self, items: pl.DataFrame) -> None:
        """The catalogue, or more of it: id, title, item fields. Items that are there already stay as they are."""
        if self.items is None:
            self.items = items
        else:
            new = items.filter(~pl.col("id").is_in(self.items["id"].to_list()))
            self.items = pl.concat([self.items, new], how="diagonal_relaxed")
        self.item_numbers.numbers(items["id"])
        self._known_items = self.item_numbers.size

    def add(self, batch: EventBatch) -> None:
        """Number a batch and spill it."""
        if batch.counts.kept != len(batch.events):
            raise ValueError(f"{len(batch.events)} events, the counts say {batch.counts.kept}")
        self.counts += batch.counts
        if len(batch.events):
            users = self.users.numbers(batch.events["user"])
            self._spill_events(batch.events, users, self.item_numbers.numbers(batch.events["item"]))

    def add_numbered(self, events: pl.DataFrame) -> None:
        """Events whose user and item are numbers already."""
        self.counts += RowCounts(len(events), len(events))
        self._spill_events(events, events["user"].to_numpy(), events["item"].to_numpy())

    def _spill_events(self, events: pl.DataFrame, users: np.ndarray, items: np.ndarray) -> None:
        columns = {"user": users, "item": items, "time": events["time"].to_numpy()}
        columns |= {name: events[name].to_numpy() for name in self.numbers}
        for name in self.texts:
            assert self._text_writer is not None
            columns[name] = self._text_writer.append(events[name].to_list())
        self._spill_columns(columns)

    def _spill_columns(self, columns: Mapping[str, np.ndarray]) -> None:
        for name, writer in self._writers.items():
            writer.append(columns[name])
        counts = np.bincount(columns["user"], minlength=max(self.users.size, len(self._lengths)))
        counts[: len(self._lengths)] += self._lengths
        self._lengths = counts

    def finish(
        self,
        *,
        name: str,
        source: Source,
        time: str,
        ticks_per_second: int = 1,
        count_filters: CountFilters | None = None,
        recipe: dict[str, Any] | None = None,
    ) -> DatasetCard:
        """Sort, filter, write, and put the dataset in its place.

        time: how times were read. ticks_per_second: of the times that were added. recipe: see ``DatasetCard``.
        Raises UserError where there are no events or items, or none are left.
        """
        asked = count_filters or CountFilters()
        for writer in [*self._writers.values(), *([self._text_writer] if self._text_writer else [])]:
            writer.close()
        if self.items is not None and self.items.is_empty():
            raise UserError(f"{source.where}: the catalogue is empty; a dataset needs at least one item")
        if self.counts.read == 0:
            raise UserError(f"{source.where}: there are no events; a dataset needs at least one")
        items, users = self._catalogue(), self.users.ids
        lengths = self._sort(asked.repeated, ticks_per_second)
        shutil.rmtree(self._spill)
        if asked.min_item_events > 1 or asked.min_user_events > 1:
            lengths, items, users = self._enough(lengths, items, users, asked)
        if self.counts.kept == 0:
            raise UserError(
                f"{source.where}: no events are left: {self.counts}; ask for less with the filters"
            )
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        write_column(self.files, "offsets", offsets)
        items = items.drop("item", strict=False).with_row_index("item").cast({"item": pl.Int32})
        items.write_parquet(self.files / "items.parquet")
        users.to_frame("id").with_row_index("user").cast({"user": pl.Int32}).write_parquet(
            self.files / "users.parquet"
        )
        columns = {
            column: read_column(self.files / "events", column) for column in self.types if column != "user"
        }
        for column in self.numbers:
            write_column(self.files / "values", column, distinct(columns[column]))
        card = DatasetCard(
            format_version=FORMAT_VERSION,
            name=name,
            source=source,
            users=len(users),
            items=len(items),
            events=self.counts.kept,
            time_span=self._span,
            tie_rule=TIE_RULE,
            fields=self.fields,
            fingerprint=fingerprint(
                offsets, columns, items["title"], Texts(self.files / "texts.bin") if self.texts else None
            ),
            filters=tuple(self.counts.filtered),
            created_by=created_by(),
            files=files_name(),
            rows=self.counts,
            time=time,
            recipe=recipe,
        )
        if self._grown is not None:
            check_unchanged(self.folder, self._grown)
        put_in_place(self.folder, self.scratch, self.files, card)
        return card

    def _catalogue(self) -> pl.DataFrame:
        """The item table; of items that the catalogue lacks the title is the id."""
        ids = self.item_numbers.ids
        if self.items is None:
            return pl.DataFrame({"id": ids, "title": ids})
        new = ids[self._known_items :]
        return pl.concat([self.items, pl.DataFrame({"id": new, "title": new})], how="diagonal_relaxed")

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Ranges of users whose events fit into memory; at least one user."""
        rows = max(1, int(self.memory * 0.8) // (SORT_BYTES + 8 * len(self.types)))
        ends = np.cumsum(self._lengths)
        first = 0
        while first < len(ends):
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + rows, side="right")))
            yield first, last
            first = last

    def _sort(self, repeated: Repeated, ticks: int) -> np.ndarray:
        """Spilled events -> columns in order of user and time; events per user, [users]."""
        rows = int(self._lengths.sum())
        ranges = list(self._ranges())
        names = [name for name in self.types if name != "user"]
        writers = {n: ColumnWriter(column_file(self.files / "events", n), self.types[n]) for n in names}
        lengths = np.zeros(self.users.size, dtype=np.int64)
        earliest, latest, dropped = 2**63 - 1, -(2**63), 0
        for first, last in ranges:
            user, picked = self._of_users(first, last, rows, whole=len(ranges) == 1)
            columns = {name: self._picked(name, picked, rows) for name in names}
            order = _order(user - first, columns["time"])
            if repeated != "all":
                pair = pl.Series(user[order].astype(np.int64) << 32 | columns["item"][order])
                keep = pair.is_first_distinct() if repeated == "first" else pair.is_last_distinct()
                dropped += int((~keep).sum())
                order = order[keep.to_numpy()]
            lengths[first:last] = np.bincount(user[order] - first, minlength=last - first)
            del user, picked
            for name in names:
                values = columns.pop(name)[order]
                if name == "time":
                    values = values // ticks if ticks > 1 else values
                    earliest = min(earliest, int(values.min(initial=2**63 - 1)))
                    latest = max(latest, int(values.max(initial=-(2**63))))
                writers[name].append(values)
        for writer in writers.values():
            writer.close()
        self._span = (earliest, latest)
        if repeated != "all":
            self._take(f"repeated pairs of user and item, all but the {repeated}", dropped)
        return lengths

    def _of_users(
        self, first: int, last: int, rows: int, whole: bool
    ) -> tuple[np.ndarray, list[np.ndarray] | None]:
        """Users of the spilled events of a range of users, and where these events are, block by block (None: all)."""
        if whole:
            return read_stretch(self._spill, "user", 0, rows), None
        users, picked = [], []
        for start in range(0, rows, BLOCK):
            block = read_stretch(self._spill, "user", start, min(start + BLOCK, rows))
            found = np.flatnonzero((block >= first) & (block < last)).astype(np.int32)
            users.append(block[found])
            picked.append(found)
        return np.concatenate(users), picked

    def _picked(self, name: str, picked: list[np.ndarray] | None, rows: int) -> np.ndarray:
        if picked is None:
            return read_stretch(self._spill, name, 0, rows)
        found = np.empty(sum(map(len, picked)), dtype=self.types[name])
        place = 0
        for number, rows_of_block in enumerate(picked):
            if len(rows_of_block):
                start = number * BLOCK
                block = read_stretch(self._spill, name, start, min(start + BLOCK, rows))
                found[place : place + len(rows_of_block)] = block[rows_of_block]
                place += len(rows_of_block)
        return found

    def _take(self, rule: str, rows: int) -> None:
        """A filter took this many of the kept rows."""
        counts = self.counts
        self.counts = RowCounts(
            counts.read, counts.kept - rows, counts.rejected, counts.filtered | {rule: rows}
        )

    def _enough(
        self, lengths: np.ndarray, items: pl.DataFrame, users: pl.Series, asked: CountFilters
    ) -> tuple[np.ndarray, pl.DataFrame, pl.Series]:
        """Leave out rare items and short histories, in turns, until neither is left."""
        folder = self.files / "events"
        item = read_column(folder, "item")
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        keep = np.ones(len(item), dtype=bool)
        blocks = [slice(start, min(start + BLOCK, len(item))) for start in range(0, len(item), BLOCK)]
        taken = {"item": 0, "user": 0}
        span: list[tuple[int, int]] = []
        while True:
            before = int(keep.sum())
            item_counts = np.zeros(len(items), dtype=np.int64)
            for b in blocks:
                item_counts += np.bincount(item[b][keep[b]], minlength=len(items))
            rare = item_counts < asked.min_item_events
            for b in blocks:
                keep[b] &= ~rare[item[b]]
            middle = int(keep.sum())
            user_counts = np.zeros(len(lengths), dtype=np.int64)
            for b in blocks:
                user = users_of(offsets, b.start, b.stop)
                user_counts += np.bincount(user[keep[b]], minlength=len(lengths))
            short = user_counts < asked.min_user_events
            for b in blocks:
                keep[b] &= ~short[users_of(offsets, b.start, b.stop)]
            after = int(keep.sum())
            taken["item"] += before - middle
            taken["user"] += middle - after
            if after == before:
                break
        names = {"item": f"items with fewer than {asked.min_item_events} events"}
        names["user"] = f"users with fewer than {asked.min_user_events} events"
        for kind, rule in names.items():
            if getattr(asked, f"min_{kind}_events") > 1:
                self._take(rule, taken[kind])
        stays = (
            item_counts >= asked.min_item_events
            if asked.min_item_events > 1
            else np.ones(len(items), dtype=bool)
        )
        number = (np.cumsum(stays) - 1).astype(np.int32)
        for name in self.types:
            if name == "user":
                continue
            column = read_column(folder, name)
            writer = ColumnWriter(self.scratch / "kept.npy", self.types[name])
            for b in blocks:
                values = column[b][keep[b]]
                writer.append(number[values] if name == "item" else values)
                if name == "time" and len(values):
                    span.append((int(values.min()), int(values.max())))
            writer.close()
            os.replace(self.scratch / "kept.npy", column_file(folder, name))
        if span:
            self._span = (min(low for low, _ in span), max(high for _, high in span))
        return user_counts[~short], items.filter(pl.Series(stays)), users.filter(pl.Series(~short))


def _order(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Where the events of user and time order are; equal ones stay as they are."""
    if not len(user):
        return np.empty(0, dtype=np.int64)
    low = int(time.min())
    bits = (int(time.max()) - low).bit_length()
    if bits + int(user.max()).bit_length() <= 63:  # one number to sort by: twice as fast as two
        frame = pl.DataFrame({"key": user.astype(np.int64) << bits | (time - low)})
    else:
        frame = pl.DataFrame({"user": user, "time": time})
    return frame.select(pl.arg_sort_by(*frame.columns, maintain_order=True)).to_series().to_numpy()
