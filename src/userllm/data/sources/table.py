"""Anyone's event log: CSV, TSV, Parquet or JSON Lines, plain, .gz or .zst, in any number of files of any size.

Rows stream through in batches: text -> times and numbers -> filters -> ``DatasetBuilder``. Nothing is left out unless
asked for, and the card says what became of every row: read = kept + rejected + filtered.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
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
from userllm.data.sources.raw_files import Format, Rejected, Rows, find_files, format_of, tells_format
from userllm.data.sources.table_config import ItemsConfig, TableConfig
from userllm.data.sources.values import TimeReader
from userllm.data.store import Dataset
from userllm.errors import UserError

A_YEAR = 365 * 24 * 3600
"""Seconds."""


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
    if item_paths and not old.card.recipe["items"]["key"]:
        raise UserError(
            f"{folder}: prepared without items, so that nothing says how theirs are read; prepare it again with --items"
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
            reader.check_keys(old)
        for batch in ahead(reader.batches(files)):
            if old is not None:
                _check_unit(batch, reader.time, old, config.path)
            builder.add(batch)
        reader.check_keys(old)
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
    return Source(kind, ", ".join(patterns), label, whole, "path", tuple(digests) if len(digests) > 1 else ())


def _joined(old: Source, new: Source) -> Source:
    """Raises UserError for a file that is in already: its events would be there twice."""
    there, added = (one.parts or (one.sha256,) for one in (old, new))
    if again := set(there) & set(added):
        raise UserError(
            f"{new.where}: in the dataset already, {len(again)} of {len(added)} files; give new ones alone"
        )
    both = hashlib.sha256((old.sha256 + new.sha256).encode()).hexdigest()
    where, file = f"{old.where}, {new.where}", f"{old.file}, then {new.file}"
    return replace(new, where=where, file=file, sha256=both, parts=(*there, *added))


def _check_unit(batch: EventBatch, time: TimeReader, old: Dataset, paths: Sequence[str]) -> None:
    """Raise UserError where new times, taken as the dataset's are, would all be of 1970 and the dataset's are not."""
    begins, of_1970 = old.card.time_span[0], batch.events["time"].is_between(0, A_YEAR * time.ticks - 1)
    if begins > A_YEAR and len(of_1970) and of_1970.all():
        raise UserError(
            f"{', '.join(paths)}: as {time} these events are of 1970, and the dataset begins in "
            f"{datetime.fromtimestamp(begins, UTC).year}; give times of the same unit"
        )


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
        self._lacking: dict[tuple[str, ...], set[str]] = {}

    @property
    def time(self) -> TimeReader:
        """How times are read, once that is known."""
        return self.events.time or TimeReader(self.config.time_unit, found=False)

    def batches(self, files: Sequence[Path]) -> Iterator[EventBatch]:
        """Every row of the files, in order."""
        for file in files:
            for rows in ahead(self._events(file)):
                yield self.events.batch(rows)

    def check_keys(self, old: Dataset | None) -> None:
        """Raise UserError where no row of the files that were read has a key: JSON names none of what it lacks.

        old: what they are added to; then they are few, and may lack what others have.
        """
        if old is not None:
            return
        for paths, lacking in self._lacking.items():
            if lacking:
                raise UserError(
                    f"{', '.join(paths)}: no row has {' or '.join(sorted(lacking))}; check how it is spelt"
                )

    def _events(self, file: Path) -> Iterator[Rows]:
        config = self.config
        kind = config.format or format_of(file)
        return self._rows(file, kind, config.separator, config.header, config.columns(), config.path)

    def _item_rows(self, file: Path) -> Iterator[Rows]:
        config, items = self.config, self.config.items
        kind = items.format or (config.format if not tells_format(file) else None) or format_of(file)
        wanted = [name for name in (items.key, items.title, items.category) if name]
        separator = config.separator if items.column_separator is None else items.column_separator
        return self._rows(file, kind, separator, items.header, wanted, items.path)

    def _rows(
        self, file: Path, kind: Format, separator: str, header: list[str], wanted: list[str], paths: list[str]
    ) -> Iterator[Rows]:
        """The rows of one of the files that ``paths`` are."""
        if kind == "parquet":
            return parquet_rows(file, wanted, self.block)
        if kind == "jsonl":
            return self._noting(json_rows(file, wanted, self.block), wanted, tuple(paths))
        separator = "\t" if kind == "tsv" else separator
        return csv_rows(file, separator, kind == "csv", header or None, wanted, self.block)

    def _noting(self, found: Iterator[Rows], wanted: list[str], paths: tuple[str, ...]) -> Iterator[Rows]:
        """The rows, and which keys none of them has."""
        for rows in found:
            if len(rows.frame):
                lacking = self._lacking.setdefault(paths, set(wanted))
                lacking -= {name for name in wanted if rows.frame[name].null_count() < len(rows.frame)}
            yield rows

    def items(self) -> pl.DataFrame:
        """The catalogue in the order of its files: id, title, category."""
        config = self.config.items
        seen: dict[str, tuple[Path, int]] = {}
        ids: list[str] = []
        titles: list[str] = []
        categories: list[tuple[str, ...]] = []
        for file in find_files(config.path):
            for rows in self._item_rows(file):
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
                        titles.append(" ".join((title or "").split()) or key)
                        categories.append(_categories(category, config.separator))
                self.rejects.take(sorted(bad, key=lambda one: one.line))
        frame = pl.DataFrame({"id": ids, "title": titles}, schema={"id": pl.String, "title": pl.String})
        if config.category:
            frame = frame.with_columns(list_column("category", categories))
        return frame


@lru_cache(maxsize=1 << 14)  # a catalogue has few different ones
def _categories(text: str | None, separator: str) -> tuple[str, ...]:
    """Each category once, in their order."""
    if not text:
        return ()
    if text.startswith("["):
        for read in (json.loads, ast.literal_eval):  # pandas writes a list as Python does
            try:
                return tuple(dict.fromkeys(str(value) for value in read(text) if value is not None))
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue
        return (text,)  # a plain text that begins like a list
    return tuple(dict.fromkeys(part.strip() for part in text.split(separator) if part.strip()))
