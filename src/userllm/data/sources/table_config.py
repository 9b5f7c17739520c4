"""The settings of ``prepare table``: which files, which columns mean what, which filters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from userllm.data.build import bytes_of
from userllm.data.count_filters import Repeated
from userllm.data.sources.raw_files import Format
from userllm.data.sources.values import TimeReader, numbers_of
from userllm.errors import UserError

KINDS = ("number",)
OnBadRows = Literal["error", "skip"]
RESERVED = {"user", "item", "time", "id", "title", "category", "time_gap"}


@dataclass
class ItemsConfig:
    """A file with what is known of the items: one row per item."""

    path: list[str] = field(default_factory=list)
    """Files or patterns; none: an item's title is its id."""
    key: str = ""
    """Column of the id that events name."""
    title: str = ""
    """Column of the title; the id where it is left out or a row has none."""
    category: str = ""
    """Column of the categories, the dataset's item field ``category``: several apart by ``separator``, or a list."""
    separator: str = "|"
    """What stands between two categories."""


@dataclass
class TableConfig:
    """An event log and how to read it."""

    path: list[str] = field(default_factory=list)
    """Files or patterns: CSV, TSV, JSON Lines or Parquet by their endings, each also with .gz or .zst."""
    user: str = ""
    """Column of the user's id."""
    item: str = ""
    """Column of the item's id."""
    time: str = ""
    """Column of the time."""
    time_unit: str = "auto"
    """s, ms, us or ns since 1970, iso, a format such as "%d.%m.%Y %H:%M"; auto: found out from the first rows."""
    fields: list[str] = field(default_factory=list)
    """Further columns of an event that the encoder may read, as COLUMN:number."""
    text: list[str] = field(default_factory=list)
    """Columns with texts of an event (reviews); read when they are needed, not when the dataset is opened."""
    items: ItemsConfig = field(default_factory=ItemsConfig)
    """What is known of the items."""
    format: Format | None = None
    """csv, tsv, jsonl or parquet where the file names do not say it."""
    separator: str = ","
    """What stands between two columns of a CSV file."""
    header: list[str] = field(default_factory=list)
    """Names of all columns where the files have no line with them."""
    after: str | None = None
    """Keep events from this time on: YYYY-MM-DD, or with a time of day (UTC)."""
    before: str | None = None
    """Keep events before this time."""
    at_least: list[str] = field(default_factory=list)
    """Keep events whose field has this value or more, as COLUMN:VALUE ("rating:4")."""
    repeated: Repeated = "all"
    """Of a user's events with one item keep all, the first, or the last."""
    min_item_events: int = 1
    """Leave out items with fewer events."""
    min_user_events: int = 1
    """Leave out users with fewer events. Both minima hold in the end."""
    on_bad_rows: OnBadRows = "error"
    """What happens at a row that cannot be read: stop and name it, or leave it out and list it in rejects.csv."""
    memory: str = "2GiB"
    """About how much memory to use, whatever the size of the files."""

    def __post_init__(self) -> None:
        """Raise UserError for settings that cannot be."""
        bytes_of(self.memory)
        for name in self.fields:
            if name.rpartition(":")[2] not in KINDS or not name.rpartition(":")[0]:
                raise UserError(f"field {name!r}: give COLUMN:KIND, where KIND is {' or '.join(KINDS)}")
        names = [column for column, _ in self.number_columns()]
        for rule in self.at_least:
            column, _, value = rule.rpartition(":")
            if column not in names or numbers_of(pl.Series([value])).null_count():
                raise UserError(
                    f"at_least {rule!r}: give COLUMN:VALUE, where COLUMN is a field that is a number"
                )
        for name in ("min_item_events", "min_user_events"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give at least 1")
        if len(self.separator.encode()) != 1 or self.separator in '"\r\n':
            raise UserError(f"separator is {self.separator!r}; give one plain character")
        columns = self.columns()
        for name in ("user", "item", "time"):
            if self.path and not getattr(self, name):
                raise UserError(f"{name}: say which column it is")
        if self.path and (twice := [name for name in columns if columns.count(name) > 1]):
            raise UserError(f"column {twice[0]} is asked for twice; a column has one meaning")
        for name in ("after", "before"):
            limit = getattr(self, name)
            if limit is not None and TimeReader("iso", found=False).ticks_of(pl.Series([limit])).null_count():
                raise UserError(
                    f"{name} is {limit!r}; give a date like 2015-01-31, or a time like 2015-01-31T12:00"
                )
        if taken := RESERVED & set(columns[3:]):
            raise UserError(f"a field cannot be called {', '.join(sorted(taken))}; rename that column")

    def number_columns(self) -> list[tuple[str, str]]:
        """(column, kind) of each event field."""
        return [(name.rpartition(":")[0], name.rpartition(":")[2]) for name in self.fields]

    def columns(self) -> list[str]:
        """Every column that is read: user, item, time, numbers, texts."""
        return [self.user, self.item, self.time, *(name for name, _ in self.number_columns()), *self.text]
