"""A prepared dataset on disk: card.json, and beside it the files it names: items, users, and a file per event column.

Events are sorted by user, then time; ties keep the order of the source's rows. About half of all MovieLens events share
a timestamp with another of the same user, so this rule decides test targets, and the card states it.
Event columns are memory-mapped: opening a dataset reads its items and users, and of the events what is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from userllm.data.build import DatasetBuilder
from userllm.data.card import DatasetCard, FieldSpec, RowCounts, Source
from userllm.data.columns import Texts, column_file, distinct, read_column
from userllm.data.commit import check_writable
from userllm.data.numbering import Numbering
from userllm.errors import UserError
from userllm.events import Event, UserHistory

__all__ = ["Dataset", "DatasetCard", "FieldSpec", "RowCounts", "Source", "check_writable", "write_dataset"]

KEY_COLUMNS = ("user", "item", "time")
AGAIN = "prepare the dataset again"


class Dataset:
    """A prepared dataset, its events as flat arrays in user order.

    items: one row per catalogue item (item, id, title, genres, year), also items without events.
    offsets: [users + 1] int64; the events of user u are ``offsets[u]:offsets[u + 1]``.
    events: "item" (int32, row of ``items``), "time" (int64, s) and the declared event fields ("rating", float32) but
    texts, which ``event_texts`` reads.
    """

    def __init__(
        self,
        folder: Path,
        card: DatasetCard,
        items: pl.DataFrame,
        users: pl.DataFrame,
        offsets: np.ndarray,
        events: dict[str, np.ndarray],
    ):
        self.folder = folder
        self.card = card
        self.items = items
        self.user_ids: list[str] = users["id"].to_list()
        self.offsets = offsets
        texts = {spec.name for spec in card.fields if spec.level == "event" and spec.kind == "text"}
        self.events = {name: column for name, column in events.items() if name not in texts}
        self._text_starts = {name: events[name] for name in texts}
        self.columns = events
        """Every event column as it is on the disk: of a text the place where it begins."""

    @classmethod
    def open(cls, folder: Path | str) -> Dataset:
        """Open a prepared dataset. Raises UserError where the folder is none, or is not whole."""
        folder = Path(folder)
        card_file = folder / "card.json"
        if not card_file.is_file():
            raise UserError(
                f"{folder}: not a prepared dataset (no card.json); make one with `userllm data prepare`"
            )
        card = DatasetCard.from_json(card_file.read_text(encoding="utf-8"), card_file)
        files = folder / card.files
        items = _table(files / "items.parquet", card.items)
        users = _table(files / "users.parquet", card.users)
        if card.format_version == 1:
            offsets, events = _format_1(files, card)
        else:
            names = [
                "item",
                "time",
                *(f.name for f in card.fields if f.level == "event" and f.name != "item"),
            ]
            events = {name: _column(files / "events", name, card.events) for name in names}
            offsets = _column(files, "offsets", card.users + 1)
        if offsets[0] != 0 or offsets[-1] != card.events or (np.diff(offsets) < 0).any():
            raise UserError(f"{column_file(files, 'offsets')}: does not fit the events; {AGAIN}")
        dataset = cls(folder, card, items, users, offsets, events)
        if (dataset.lengths == 0).any():
            empty = dataset.user_ids[int(dataset.lengths.argmin())]
            raise UserError(f"{files / 'users.parquet'}: user {empty} has no events; {AGAIN}")
        return dataset

    @property
    def files(self) -> Path:
        """The folder of the files that card.json names."""
        return self.folder / self.card.files

    @property
    def num_users(self) -> int:
        """Users; each has an event."""
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        """Items of the catalogue, with or without events."""
        return len(self.items)

    @property
    def num_events(self) -> int:
        """Events of all users."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Events per user, [users]."""
        return np.diff(self.offsets)

    @cached_property
    def item_ids(self) -> list[str]:
        """Raw ids by row of ``items``."""
        return self.items["id"].to_list()

    @cached_property
    def event_fields(self) -> tuple[str, ...]:
        """Declared fields that each event has a value of, besides the item and texts."""
        return tuple(name for name in self.events if name not in KEY_COLUMNS)

    def event_texts(self, name: str, rows: Iterable[int]) -> list[str]:
        """The text field ``name`` of the events ``rows`` (row numbers of ``events``), "" where an event has none.

        Only these texts are read from the disk. Raises UserError where there is no such text field.
        """
        if name not in self._text_starts:
            known = ", ".join(self._text_starts) or "none"
            raise UserError(f"{self.folder}: events have no text field {name!r}; text fields: {known}")
        index = np.fromiter(rows, dtype=np.int64)
        return self._texts.at(self._text_starts[name][index].tolist())

    @cached_property
    def _texts(self) -> Texts:
        return Texts(self.files / "texts.bin")

    def distinct_values(self, name: str) -> np.ndarray:
        """The values of an event field in order, each once; known since the dataset was made."""
        file = column_file(self.files / "values", name)
        return np.load(file) if file.is_file() else distinct(self.events[name])

    def user_index(self, raw_id: str) -> int:
        """The number of the user with this raw id. Raises UserError where there is none."""
        try:
            return self._user_numbers[raw_id]
        except KeyError as error:
            raise UserError(
                f"{self.folder}: no user {raw_id!r}; users look like {self.user_ids[0]!r}"
            ) from error

    @cached_property
    def _user_numbers(self) -> dict[str, int]:
        return {raw_id: number for number, raw_id in enumerate(self.user_ids)}

    def history(self, user: int, start: int = 0, stop: int | None = None) -> UserHistory:
        """Events ``start:stop`` of a user, oldest first. Raises UserError where there is no such user."""
        if not 0 <= user < self.num_users:
            raise UserError(f"{self.folder}: no user number {user}; users are 0 to {self.num_users - 1}")
        first = int(self.offsets[user])
        end = int(self.offsets[user + 1])
        rows = range(first, end)[start:stop]
        texts = {name: self.event_texts(name, rows) for name in self._text_starts}
        events = [
            Event(
                item=self.item_ids[self.events["item"][row]],
                time=int(self.events["time"][row]),
                fields={name: float(self.events[name][row]) for name in self.event_fields}
                | {name: column[place] for name, column in texts.items() if column[place]},
            )
            for place, row in enumerate(rows)
        ]
        return UserHistory(events, self.user_ids[user])


def _table(file: Path, rows: int) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{file}: cannot be read ({error}); {AGAIN}") from error
    if len(frame) != rows:
        raise UserError(f"{file}: {len(frame)} rows, the card says {rows}; {AGAIN}")
    return frame


def _column(folder: Path, name: str, rows: int) -> np.ndarray:
    file = column_file(folder, name)
    try:
        column = read_column(folder, name)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: cannot be read ({error}); {AGAIN}") from error
    if len(column) != rows:
        raise UserError(f"{file}: {len(column)} rows, the card says {rows}; {AGAIN}")
    return column


def _format_1(folder: Path, card: DatasetCard) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Events of userllm 0.1, in one Parquet file: they are read whole."""
    events = _table(folder / "events.parquet", card.events)
    counts = np.bincount(events["user"].to_numpy(), minlength=card.users)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return offsets, {name: events[name].to_numpy() for name in events.columns if name != "user"}


def write_dataset(
    folder: Path,
    events: pl.DataFrame,
    items: pl.DataFrame,
    users: pl.DataFrame,
    *,
    name: str,
    source: Source,
    fields: Sequence[FieldSpec],
    filtered: Mapping[str, int] | None = None,
) -> Dataset:
    """Sort, check and write a dataset that is in memory; an earlier one in ``folder`` is replaced once it is whole.

    events: user, item (row of ``items``), time, and the event fields, in the source's row order; text fields too.
    items: id, title, genres, year, and any further declared item field. users: id, by user number. filtered: how many
    of the source's rows each filter took, by what it says.
    Raises UserError where there are no events or items, or a user without events.
    """
    with DatasetBuilder(folder, fields, items=items) as builder:
        builder.users = Numbering(users["id"].to_list())
        counts = np.bincount(events["user"].to_numpy(), minlength=len(users))
        if (counts == 0).any() and len(events):
            raise UserError(
                f"{source.where}: user {users['id'][int(counts.argmin())]} has no events; remove that user"
            )
        builder.add_numbered(events)
        taken = dict(filtered or {})
        builder.counts += RowCounts(sum(taken.values()), 0, filtered=taken)
        builder.finish(name=name, source=source, time="seconds since 1970")
    return Dataset.open(folder)
