"""A prepared dataset on disk: events.parquet, items.parquet, users.parquet and card.json in one folder.

Events are sorted by user, then time; ties keep the order of the source's rows. About half of all MovieLens events share
a timestamp with another of the same user, so this rule decides test targets, and the card states it.
A folder is written beside its final place and renamed: one that was interrupted never looks finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from userllm.errors import UserError
from userllm.events import Event, UserHistory

FORMAT_VERSION = 1
TIE_RULE = "events of one user at one time keep the order of the source's rows"
KEY_COLUMNS = ("user", "item", "time")


@dataclass(frozen=True)
class FieldSpec:
    """A declared feature: known per event (rating) or per item (genres); one value, several, or text."""

    name: str
    level: Literal["event", "item"]
    kind: Literal["single", "multi", "text"]


@dataclass(frozen=True)
class Source:
    """Where the raw data came from: kind ("movielens"), place, file and its sha256, and which source served it."""

    kind: str
    where: str
    file: str
    sha256: str
    served_by: str


@dataclass(frozen=True)
class DatasetCard:
    """What card.json says. ``time_span``: first and last event, seconds since 1970. Counts are of the prepared data."""

    format_version: int
    name: str
    source: Source
    users: int
    items: int
    events: int
    time_span: tuple[int, int]
    tie_rule: str
    fields: tuple[FieldSpec, ...]
    fingerprint: str
    filters: tuple[str, ...]
    created_by: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> DatasetCard:
        """Raises UserError where the text is no card of this format version."""
        try:
            raw: dict[str, Any] = json.loads(text)
            if raw["format_version"] != FORMAT_VERSION:
                raise UserError(
                    f"{where}: format_version is {raw['format_version']}, this userllm reads {FORMAT_VERSION}; "
                    "prepare the dataset again"
                )
            raw["source"] = Source(**raw["source"])
            raw["time_span"] = tuple(raw["time_span"])
            raw["fields"] = tuple(FieldSpec(**field) for field in raw["fields"])
            raw["filters"] = tuple(raw["filters"])
            return cls(**raw)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: not a dataset card ({error}); prepare the dataset again") from error


class Dataset:
    """A prepared dataset, its events as flat arrays in user order.

    items: one row per catalogue item (item, id, title, genres, year), also items without events.
    offsets: [users + 1] int64; the events of user u are ``offsets[u]:offsets[u + 1]``.
    events: "item" (int32, row of ``items``), "time" (int64, s) and the declared event fields ("rating", float32).
    """

    def __init__(
        self, folder: Path, card: DatasetCard, items: pl.DataFrame, users: pl.DataFrame, events: pl.DataFrame
    ):
        self.folder = folder
        self.card = card
        self.items = items
        self.user_ids: list[str] = users["id"].to_list()
        counts = np.bincount(events["user"].to_numpy(), minlength=len(self.user_ids))
        self.offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.events: dict[str, np.ndarray] = {
            name: events[name].to_numpy() for name in events.columns if name != "user"
        }

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
        frames = {}
        for name, rows in (("items", card.items), ("users", card.users), ("events", card.events)):
            file = folder / f"{name}.parquet"
            try:
                frames[name] = pl.read_parquet(file)
            except (OSError, pl.exceptions.PolarsError) as error:
                raise UserError(f"{file}: cannot be read ({error}); prepare the dataset again") from error
            if len(frames[name]) != rows:
                raise UserError(
                    f"{file}: {len(frames[name])} rows, the card says {rows}; prepare the dataset again"
                )
        dataset = cls(folder, card, **frames)
        if (dataset.lengths == 0).any():
            empty = dataset.user_ids[int(dataset.lengths.argmin())]
            raise UserError(
                f"{folder / 'users.parquet'}: user {empty} has no events; prepare the dataset again"
            )
        return dataset

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.items)

    @property
    def num_events(self) -> int:
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
        """Declared fields that each event has a value of, besides the item."""
        return tuple(name for name in self.events if name not in KEY_COLUMNS)

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
        events = [
            Event(
                item=self.item_ids[self.events["item"][row]],
                time=int(self.events["time"][row]),
                fields={name: float(self.events[name][row]) for name in self.event_fields},
            )
            for row in rows
        ]
        return UserHistory(events, self.user_ids[user])


def fingerprint(events: pl.DataFrame, items: pl.DataFrame) -> str:
    """sha256 of the ordered events: user number, item title and every event column ("rating", "time").

    Titles stand for items, so that two copies of one release with different raw ids have one fingerprint.
    """
    digest = hashlib.sha256(f"events v{FORMAT_VERSION}".encode())
    titles = np.array(
        [int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "little") for title in items["title"]],
        dtype="<u8",
    )
    for name in sorted(events.columns):
        column = events[name].to_numpy()
        values = titles[column] if name == "item" else column
        digest.update(f"{name}:{values.dtype.str}:{len(values)};".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def check_writable(folder: Path) -> None:
    """Raise UserError where ``folder`` holds something else than a prepared dataset, which must not be replaced."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not (folder / "card.json").is_file():
        raise UserError(f"{folder}: exists and is no prepared dataset; choose another folder or remove it")


def write_dataset(
    folder: Path,
    events: pl.DataFrame,
    items: pl.DataFrame,
    users: pl.DataFrame,
    *,
    name: str,
    source: Source,
    fields: Sequence[FieldSpec],
    filters: Sequence[str] = (),
) -> Dataset:
    """Sort, check and write a dataset; an earlier dataset in ``folder`` is replaced once the new one is whole.

    events: user, item (row of ``items``), time, and the event fields, in the source's row order.
    items: id, title, genres, year, and any further declared item field. users: id, by user number.
    Raises UserError where there are no events or items, or a user without events.
    """
    check_writable(folder)
    if items.is_empty():
        raise UserError(f"{source.where}: the catalogue is empty; a dataset needs at least one item")
    if events.is_empty():
        raise UserError(f"{source.where}: there are no events; a dataset needs at least one")
    event_fields = [f.name for f in fields if f.level == "event" and f.name != "item"]
    types: dict[str, Any] = {"user": pl.Int32, "item": pl.Int32, "time": pl.Int64}
    types |= dict.fromkeys(event_fields, pl.Float32)
    events = events.select(pl.col(column).cast(dtype) for column, dtype in types.items())
    events = events.sort("user", "time", maintain_order=True)
    counts = np.bincount(events["user"].to_numpy(), minlength=len(users))
    if (counts == 0).any():
        raise UserError(
            f"{source.where}: user {users['id'][int(counts.argmin())]} has no events; remove that user"
        )
    items = items.drop("item", strict=False).with_row_index("item").cast({"item": pl.Int32})
    users = users.select(pl.int_range(pl.len(), dtype=pl.Int32).alias("user"), pl.col("id"))
    times = events["time"].to_numpy()
    card = DatasetCard(
        format_version=FORMAT_VERSION,
        name=name,
        source=source,
        users=len(users),
        items=len(items),
        events=len(events),
        time_span=(int(times.min()), int(times.max())),
        tie_rule=TIE_RULE,
        fields=tuple(fields),
        fingerprint=fingerprint(events, items),
        filters=tuple(filters),
        created_by=_created_by(),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}.", ignore_cleanup_errors=True
    ) as scratch:
        partial = Path(scratch) / "dataset"
        partial.mkdir()
        for part, frame in (("events", events), ("items", items), ("users", users)):
            frame.write_parquet(partial / f"{part}.parquet")
        (partial / "card.json").write_text(card.to_json(), encoding="utf-8")
        if folder.exists():
            os.replace(folder, Path(scratch) / "replaced")
        os.replace(partial, folder)
    return Dataset(folder, card, items, users, events)


def _created_by() -> str:
    try:
        return f"userllm {metadata.version('userllm')}"
    except metadata.PackageNotFoundError:
        return "userllm (from a source folder)"
