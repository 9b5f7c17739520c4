"""Anyone's event log: CSV, TSV, Parquet or JSON Lines, plain, .gz or .zst, in any number of files of any size.

Rows stream through in batches: text -> times and numbers -> filters -> ``DatasetBuilder``. Nothing is left out unless
asked for, and the card says what became of every row: read = kept + rejected + filtered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import polars as pl

from userllm.data.build import REJECTS, DatasetBuilder, EventBatch, block_of, bytes_of
from userllm.data.card import FieldSpec, Source
from userllm.data.count_filters import CountFilters
from userllm.data.in_turn import ahead, aside
from userllm.data.sources.csv_rows import csv_rows
from userllm.data.sources.event_filters import OnBadRows
from userllm.data.sources.event_rows import SHOWN, EventRows, Rejects
from userllm.data.sources.fetch import sha256_of
from userllm.data.sources.json_rows import json_rows, parquet_rows
from userllm.data.sources.list_column import list_column
from userllm.data.sources.raw_files import Rejected, Rows, find_files, format_of
from userllm.data.sources.table_config import ItemsConfig, TableConfig
from userllm.data.sources.values import TimeReader
from userllm.data.store import Dataset
from userllm.errors import UserError


def prepare_table(config: TableConfig, out: Path, name: str = "table") -> Dataset:
    """Prepare an event log as a dataset in ``out``. Raises UserError, naming file and line."""
    return _build(config, out, name, None)


def append_table(
    folder: Path,
    paths: Sequence[str],
    item_paths: Sequence[str] = (),
    *,
    memory: str = "2GiB",
    on_bad_rows: OnBadRows = "error",
) -> Dataset:
    """Add new rows to a dataset that ``prepare_table`` made, read by the same settings; ids and numbers stay.

    Users and items that are new get the numbers after the old ones. The minima of events are not asked of new rows.
    Raises UserError where the dataset came from elsewhere; until the new dataset is whole the old one stays.
    """
    old = Dataset.open(folder)
    if old.card.recipe is None:
        raise UserError(
            f"{folder}: made from {old.card.source.kind}, not by `data prepare table`; prepare it again "
            "from all its files"
        )
    items = ItemsConfig(**old.card.recipe["items"] | {"path": list(item_paths)})
    new = {"path": list(paths), "items": items, "memory": memory, "on_bad_rows": on_bad_rows}
    return _build(TableConfig(**old.card.recipe | new), folder, old.card.name, old)


def _build(config: TableConfig, out: Path, name: str, old: Dataset | None) -> Dataset:
    files = find_files(config.path)
    memory = bytes_of(config.memory)
    fields = [FieldSpec("item", "event", "single")]
    fields += [FieldSpec(column, "event", "single") for column, _ in config.number_columns()]
    fields += [FieldSpec(column, "event", "text") for column in config.text]
    if config.items.path and config.items.category:
        fields.append(FieldSpec("category", "item", "multi"))
    fields.append(FieldSpec("title", "item", "text"))
    if old is not None:
        fields = list(old.card.fields)
    with DatasetBuilder(out, fields, memory=memory) as builder:
        given = aside(lambda: source_of("table", config.path, files))
        rejects = Rejects(builder.files / REJECTS, config.on_bad_rows == "skip")
        reader = TableReader(config, block_of(memory), rejects)
        if old is not None:
            builder.start_from(old, TimeReader(config.time_unit, found=False).ticks)
        if config.items.path:
            builder.add_items(reader.items())
        for batch in ahead(reader.batches(files)):
            builder.add(batch)
        found = reader.time
        recipe = asdict(replace(config, path=[], items=replace(config.items, path=[]), time_unit=found.unit))
        builder.finish(
            name=name,
            source=given() if old is None else _joined(old.card.source, given()),
            time=str(found) if old is None else old.card.time,
            ticks_per_second=found.ticks,
            count_filters=config.counts() if old is None else CountFilters(config.repeated),
            recipe=recipe,
            notes=(),
        )
    return Dataset.open(out)


def source_of(kind: str, patterns: Sequence[str], files: Sequence[Path]) -> Source:
    """What the card says of files that somebody gave: a checksum over all of them."""
    digests = [sha256_of(file) for file in files]
    whole = digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    label = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    return Source(kind, ", ".join(patterns), label, whole, "path")


def _joined(old: Source, new: Source) -> Source:
    both = hashlib.sha256((old.sha256 + new.sha256).encode()).hexdigest()
    return replace(new, where=f"{old.where}, {new.where}", file=f"{old.file}, then {new.file}", sha256=both)


class TableReader:
    """Files -> batches of events, and the catalogue."""

    def __init__(self, config: TableConfig, block: int, rejects: Rejects):
        self.config, self.block, self.rejects = config, block, rejects
        numbers = [name for name, _ in config.number_columns()]
        columns = {"user": config.user, "item": config.item, "time": config.time}
        columns |= {name: name for name in [*numbers, *config.text]}
        unit = config.time_unit
        time = None if unit == "auto" else TimeReader(unit, found=False)
        self.events = EventRows(columns, numbers, config.text, config, rejects, time)

    @property
    def time(self) -> TimeReader:
        """How times are read, once that is known."""
        return self.events.time or TimeReader(self.config.time_unit, found=False)

    def batches(self, files: Sequence[Path]) -> Iterator[EventBatch]:
        """Every row of the files, in order."""
        for file in files:
            for rows in ahead(self._rows(file, self.config.columns())):
                yield self.events.batch(rows)

    def _rows(self, file: Path, wanted: list[str]) -> Iterator[Rows]:
        kind = self.config.format or format_of(file)
        if kind == "parquet":
            return parquet_rows(file, wanted, self.block)
        if kind == "jsonl":
            return json_rows(file, wanted, self.block)
        separator = "\t" if kind == "tsv" else self.config.separator
        return csv_rows(file, separator, kind == "csv", self.config.header or None, wanted, self.block)

    def items(self) -> pl.DataFrame:
        """The catalogue in the order of its files: id, title, category."""
        config = self.config.items
        wanted = [name for name in (config.key, config.title, config.category) if name]
        seen: dict[str, tuple[Path, int]] = {}
        ids: list[str] = []
        titles: list[str] = []
        categories: list[tuple[str, ...]] = []
        for file in find_files(config.path):
            for rows in self._rows(file, wanted):
                lines, bad = rows.lines(), list(rows.rejected)
                text = {name: rows.frame[name].cast(pl.String).to_list() for name in rows.frame.columns}
                nothing = [None] * len(lines)
                for line, key, title, category in zip(
                    lines.tolist(),
                    text[config.key],
                    text.get(config.title, nothing),
                    text.get(config.category, nothing),
                    strict=True,
                ):
                    if not key:
                        bad.append(Rejected(rows.file, line, f"{config.key} is missing"))
                    elif key in seen:
                        where, before = seen[key]
                        there = f"line {before}" + (f" of {where.name}" if where != file else "")
                        bad.append(Rejected(rows.file, line, f"item {key[:SHOWN]} is already on {there}"))
                    else:
                        seen[key] = (file, line)
                        ids.append(key)
                        titles.append(title or key)
                        categories.append(_categories(category, config.separator))
                self.rejects.take(sorted(bad, key=lambda one: one.line))
        frame = pl.DataFrame({"id": ids, "title": titles}, schema={"id": pl.String, "title": pl.String})
        if config.category:
            frame = frame.with_columns(list_column("category", categories))
        return frame


@lru_cache(maxsize=1 << 14)  # a catalogue has few different ones
def _categories(text: str | None, separator: str) -> tuple[str, ...]:
    if not text:
        return ()
    if text.startswith("["):
        try:
            return tuple(str(value) for value in json.loads(text))
        except ValueError:  # a plain text that begins like a list
            return (text,)
    return tuple(part.strip() for part in text.split(separator) if part.strip())
