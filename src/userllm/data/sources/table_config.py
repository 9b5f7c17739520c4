"""The settings of ``prepare table``: which files, which columns mean what, which filters."""

from __future__ import annotations

from dataclasses import dataclass, field

from userllm.data.sources.event_filters import EventFilters
from userllm.data.sources.raw_files import Format
from userllm.errors import UserError

KINDS = ("number",)
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
    format: Format | None = None
    """csv, tsv, jsonl or parquet where the file's name does not say it; that of the events if null."""
    column_separator: str | None = None
    """What stands between two columns of a CSV file; as in the events if null."""
    header: list[str] = field(default_factory=list)
    """Names of all columns where the file has no line with them."""


@dataclass
class TableConfig(EventFilters):
    """An event log, how to read it, and what is kept of it."""

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

    def __post_init__(self) -> None:
        """Raise UserError for settings that cannot be."""
        for name in self.fields:
            if name.rpartition(":")[2] not in KINDS or not name.rpartition(":")[0]:
                raise UserError(f"field {name!r}: give COLUMN:KIND, where KIND is {' or '.join(KINDS)}")
        self.check([column for column, _ in self.number_columns()])
        for name, sign in (
            ("separator", self.separator),
            ("items.column_separator", self.items.column_separator),
        ):
            if sign is not None and (len(sign.encode()) != 1 or sign in '"\r\n'):
                raise UserError(f"{name} is {sign!r}; give one plain character")
        columns = self.columns()
        for name in ("user", "item", "time"):
            if self.path and not getattr(self, name):
                raise UserError(f"{name}: say which column it is")
        if self.path and (twice := [name for name in columns if columns.count(name) > 1]):
            raise UserError(f"column {twice[0]} is asked for twice; a column has one meaning")
        if self.items.path and not self.items.key:
            raise UserError("items.key: say which column of the items' file is the id that events name")
        if taken := RESERVED & set(columns[3:]):
            raise UserError(f"a field cannot be called {', '.join(sorted(taken))}; rename that column")

    def number_columns(self) -> list[tuple[str, str]]:
        """(column, kind) of each event field."""
        return [(name.rpartition(":")[0], name.rpartition(":")[2]) for name in self.fields]

    def columns(self) -> list[str]:
        """Every column that is read: user, item, time, numbers, texts."""
        return [self.user, self.item, self.time, *(name for name, _ in self.number_columns()), *self.text]
