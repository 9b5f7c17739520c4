"""Streams raw events into a dataset folder: number, spill to the disk, sort by ranges of users, write columns.

What is in memory is one batch of raw events, one range of users while it is sorted, and the tables of users and items;
``memory`` bounds the first two. Events of one user at one time keep the order in which they came.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import polars as pl

from userllm.data.card import FORMAT_VERSION, TIE_RULE, DatasetCard, FieldSpec, RowCounts, Source
from userllm.data.columns import (
    BLOCK,
    Texts,
    TextWriter,
    catalogue_hash,
    distinct,
    fingerprint,
    read_column,
    users_of,
    write_column,
)
from userllm.data.commit import (
    Scratch,
    check_unchanged,
    check_writable,
    created_by,
    files_name,
    put_in_place,
)
from userllm.data.count_filters import CountFilters, enough
from userllm.data.numbering import Numbering
from userllm.data.repeats import repeats_note
from userllm.data.sorting import Spill
from userllm.errors import UserError

if TYPE_CHECKING:
    from userllm.data.store import Dataset

REJECTS = "rejects.csv"
BLOCK_BYTES = 1 << 23
"""Raw bytes that are read at once at most: larger blocks are parsed slower."""


@dataclass
class EventBatch:
    """Raw events in the source's order.

    events: user and item (raw ids, text), time (ticks since 1970, integer) and the declared event fields (numbers, or
    text). counts: of the rows they came from; ``kept`` is the events of this batch.
    """

    events: pl.DataFrame
    counts: RowCounts


def bytes_of(text: str) -> int:
    """A size like 500MB, 2GiB or a number of bytes. Raises UserError for anything else."""
    units = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if found is None or float(found[1]) <= 0:
        raise UserError(f"memory is {text!r}; give a size like 500MB or 2GiB")
    return int(float(found[1]) * units[found[2]])


def block_of(memory: int) -> int:
    """Raw bytes to read at once."""
    return max(1, min(memory // 64, BLOCK_BYTES))


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
        self._scratch = Scratch(folder)
        self.scratch = self._scratch.path
        self.files = self.scratch / "files"
        for part in ("events", "values"):
            (self.files / part).mkdir(parents=True)
        types = {"user": "<i4", "item": "<i4", "time": "<i8"}
        types |= dict.fromkeys(self.numbers, "<f4") | dict.fromkeys(self.texts, "<i8")
        self.types = types
        self._spill = Spill(self.scratch / "spill", types)
        self._text_writer = TextWriter(self.files / "texts.bin") if self.texts else None
        if items is not None:
            self.add_items(items)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._spill.close()
        if self._text_writer is not None:
            self._text_writer.close()
        self._scratch.close()

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
            self._spill.append(columns | {"user": users_of(old.offsets, start, stop)})

    def add_items(self, items: pl.DataFrame) -> None:
        """The catalogue, or more of it: id, title, item fields.

        Of items that are there already, those that came with an event and were never described are now; others stay as
        they are, with a warning where they are described otherwise.
        """
        if self.items is None:
            self.items = items
        else:
            known = self.items["id"].implode()
            self._describe(items.filter(pl.col("id").is_in(known)))
            self.items = pl.concat(
                [self.items, items.filter(~pl.col("id").is_in(known))], how="diagonal_relaxed"
            )
        self.item_numbers.numbers(items["id"])
        self._known_items = self.item_numbers.size

    def _describe(self, items: pl.DataFrame) -> None:
        """See ``add_items``; all of ``items`` are there."""
        assert self.items is not None
        old = self.items.with_row_index("place")
        bare = old.filter(known_by_id(self.items)).select("place", "id")
        told = bare.join(items, on="id")
        kept = old.filter(~pl.col("place").is_in(told["place"].implode()))
        self.items = pl.concat([kept, told], how="diagonal_relaxed").sort("place").drop("place")
        shared = [name for name in self.items.columns if name in items.columns]
        now = items.select(shared).join(
            self.items.select(shared), on="id", suffix=" now", maintain_order="left"
        )
        same = [pl.col(name).eq_missing(pl.col(f"{name} now")) for name in shared if name != "id"]
        changed = now.filter(~pl.all_horizontal(same))["id"]
        if len(changed):
            warnings.warn(
                f"{len(changed):,} items are described otherwise than before and stay as they were, the first of them "
                f"{changed[0]!r}; prepare all files anew to change them",
                stacklevel=2,
            )

    def describe_items(self, items: pl.DataFrame) -> None:
        """The catalogue of events that are in already: a row for each of their items, and for others that come after.

        items: id, title, item fields, in any order.
        """
        self.item_numbers.numbers(items["id"])
        known = self.item_numbers.ids.to_frame()
        self.items = known.join(items, on="id", how="left", maintain_order="left")
        if self.items["title"].null_count():
            raise ValueError("an item of the events is not described")
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
        self._spill.append(columns)

    def finish(
        self,
        *,
        name: str,
        source: Source,
        time: str,
        ticks_per_second: int = 1,
        count_filters: CountFilters | None = None,
        recipe: dict[str, Any] | None = None,
        notes: Sequence[str] | None = None,
    ) -> DatasetCard:
        """Sort, filter, write, and put the dataset in its place.

        time: how times were read. ticks_per_second: of the times that were added. recipe, notes: see ``DatasetCard``;
        unless notes is None the last of them tells how many events were there before.
        Raises UserError where there are no events or items, or none are left.
        """
        asked = count_filters or CountFilters()
        if self._text_writer is not None:
            self._text_writer.close()
        if self.items is not None and self.items.is_empty():
            raise UserError(f"{source.where}: the catalogue is empty; a dataset needs at least one item")
        if self.counts.read == 0:
            raise UserError(f"{source.where}: there are no events; a dataset needs at least one")
        items, users = self._catalogue(), self.users.ids
        events = self.files / "events"
        found = self._spill.sort_into(events, self.memory, asked.repeated, ticks_per_second)
        lengths, span = found.lengths, found.span
        if asked.repeated != "all":
            self._take(f"repeated pairs of user and item, all but the {asked.repeated}", found.repeated)
        if asked.min_item_events > 1 or asked.min_user_events > 1:
            left = enough(events, self.types, lengths, len(items), asked)
            lengths, span = left.lengths, left.span
            items, users = items.filter(pl.Series(left.items)), users.filter(pl.Series(left.users))
            for rule, rows in left.taken.items():
                self._take(rule, rows)
        if self.counts.rejected == self.counts.read:
            raise UserError(f"{source.where}: no row can be read; {self._first_reject()}")
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
        columns = {name: read_column(events, name) for name in self.types if name != "user"}
        for column in self.numbers:
            write_column(self.files / "values", column, distinct(columns[column]))
        if notes is not None:
            bare = [] if self.items is None else _undescribed(items)
            notes = [*notes, *bare, repeats_note(columns["item"], columns["time"], offsets)]
        card = DatasetCard(
            format_version=FORMAT_VERSION,
            name=name,
            source=source,
            users=len(users),
            items=len(items),
            events=self.counts.kept,
            time_span=span,
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
            notes=tuple(notes or ()),
            catalogue=catalogue_hash(items),
        )
        if self._grown is not None:
            check_unchanged(self.folder, self._grown)
        put_in_place(self.folder, self.scratch, self.files, card)
        return card

    def _first_reject(self) -> str:
        first = pl.read_csv(self.files / REJECTS, n_rows=1, infer_schema=False).row(0)
        return "of {} line {}: {}".format(*first)

    def _catalogue(self) -> pl.DataFrame:
        """The item table; of items that the catalogue lacks the title is the id."""
        ids = self.item_numbers.ids
        if self.items is None:
            return pl.DataFrame({"id": ids, "title": ids})
        new = ids[self._known_items :]
        return pl.concat([self.items, pl.DataFrame({"id": new, "title": new})], how="diagonal_relaxed")

    def _take(self, rule: str, rows: int) -> None:
        """A filter took this many of the kept rows."""
        counts = self.counts
        filtered = counts.filtered | {rule: counts.filtered.get(rule, 0) + rows}
        self.counts = RowCounts(counts.read, counts.kept - rows, counts.rejected, filtered)


def known_by_id(items: pl.DataFrame) -> pl.Expr:
    """Of the item table: rows that say nothing of an item but its id."""
    others = [name for name in items.columns if name not in ("item", "id", "title")]
    nothing = [
        pl.col(name).is_null() | (pl.col(name).list.len() == 0)
        if items[name].dtype == pl.List
        else pl.col(name).is_null()
        for name in others
    ]
    return pl.all_horizontal(pl.col("title") == pl.col("id"), *nothing)


def _undescribed(items: pl.DataFrame) -> list[str]:
    """A note of items with events that the catalogue says nothing of."""
    bare = len(items.filter(known_by_id(items)))
    return [f"{bare:,} of {len(items):,} items are known by their id alone"] if bare else []
