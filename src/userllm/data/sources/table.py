"""Anyone's event log: CSV, TSV, Parquet or JSON Lines, plain, .gz or .zst, in any number of files of any size.

Rows stream through in batches: text -> times and numbers -> filters -> ``DatasetBuilder``. Nothing is left out unless
asked for, and the card says what became of every row: read = kept + rejected + filtered.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import polars as pl

from userllm.data.build import REJECTS, DatasetBuilder, EventBatch, block_of, bytes_of
from userllm.data.card import FieldSpec, RowCounts, Source
from userllm.data.count_filters import CountFilters
from userllm.data.sources.csv_rows import csv_rows
from userllm.data.sources.fetch import sha256_of
from userllm.data.sources.json_rows import json_rows, parquet_rows
from userllm.data.sources.raw_files import MEND, Rejected, Rows, find_files, format_of
from userllm.data.sources.table_config import ItemsConfig, OnBadRows, TableConfig
from userllm.data.sources.values import TICKS, TimeReader, numbers_of
from userllm.data.store import Dataset
from userllm.errors import UserError

SHOWN = 60


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
    reader = TableReader(config, block_of(memory))
    fields = [FieldSpec("item", "event", "single")]
    fields += [FieldSpec(column, "event", "single") for column, _ in config.number_columns()]
    fields += [FieldSpec(column, "event", "text") for column in config.text]
    if config.items.path and config.items.category:
        fields.append(FieldSpec("category", "item", "multi"))
    fields.append(FieldSpec("title", "item", "text"))
    if old is not None:
        fields = list(old.card.fields)
    source = _source(config.path, files)
    with DatasetBuilder(out, fields, memory=memory) as builder:
        reader.rejects = Rejects(builder.files / REJECTS, config.on_bad_rows == "skip")
        if old is not None:
            builder.start_from(old, TimeReader(config.time_unit, found=False).ticks)
        if config.items.path:
            builder.add_items(reader.items())
        for batch in reader.batches(files):
            builder.add(batch)
        found = reader.time or TimeReader(config.time_unit, found=False)
        recipe = asdict(replace(config, path=[], items=replace(config.items, path=[]), time_unit=found.unit))
        filters = CountFilters(config.repeated)
        if old is None:
            filters = CountFilters(config.repeated, config.min_item_events, config.min_user_events)
        builder.finish(
            name=name,
            source=source if old is None else _joined(old.card.source, source),
            time=str(found) if old is None else old.card.time,
            ticks_per_second=found.ticks,
            count_filters=filters,
            recipe=recipe,
        )
    return Dataset.open(out)


def _source(patterns: Sequence[str], files: Sequence[Path]) -> Source:
    digests = [sha256_of(file) for file in files]
    whole = digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    label = files[0].name if len(files) == 1 else f"{files[0].name} and {len(files) - 1} more"
    return Source("table", ", ".join(patterns), label, whole, "path")


def _joined(old: Source, new: Source) -> Source:
    both = hashlib.sha256((old.sha256 + new.sha256).encode()).hexdigest()
    return replace(new, where=f"{old.where}, {new.where}", file=f"{old.file}, then {new.file}", sha256=both)


class Rejects:
    """Where bad rows go: into rejects.csv (file, line, reason) where they are left out, else into an error."""

    def __init__(self, file: Path, skip: bool):
        self.file, self.skip = file, skip

    def take(self, bad: Sequence[Rejected]) -> int:
        """Write them down and count them. Raises UserError for the first where none is left out."""
        if not bad:
            return 0
        if not self.skip:
            raise UserError(f"{bad[0].file} line {bad[0].line}: {bad[0].reason}; {MEND}")
        new = not self.file.exists()
        with open(self.file, "a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["file", "line", "reason"])
            writer.writerows([one.file, one.line, one.reason] for one in bad)
        return len(bad)


class TableReader:
    """Files -> batches of events, and the catalogue. ``time`` is how times are read, once that is known."""

    rejects: Rejects

    def __init__(self, config: TableConfig, block: int):
        self.config = config
        self.block = block
        self.time = None if config.time_unit == "auto" else TimeReader(config.time_unit, found=False)
        self.numbers = [name for name, _ in config.number_columns()]

    def batches(self, files: Sequence[Path]) -> Iterator[EventBatch]:
        """Every row of the files, in order."""
        for file in files:
            for rows in self._rows(file, self.config.columns()):
                yield self._batch(rows)

    def _rows(self, file: Path, wanted: list[str]) -> Iterator[Rows]:
        kind = self.config.format or format_of(file)
        if kind == "parquet":
            return parquet_rows(file, wanted, self.block)
        if kind == "jsonl":
            return json_rows(file, wanted, self.block)
        separator = "\t" if kind == "tsv" else self.config.separator
        return csv_rows(file, separator, kind == "csv", self.config.header or None, wanted, self.block)

    def _batch(self, rows: Rows) -> EventBatch:
        config, frame = self.config, rows.frame
        read = len(frame) + len(rows.rejected)
        if self.time is None and len(frame):
            self.time = TimeReader.find(frame[config.time], f"{rows.file}, column {config.time}")
        time = self.time or TimeReader("s", found=False)
        typed = pl.DataFrame(
            [
                _ids(frame[config.user]).alias("user"),
                _ids(frame[config.item]).alias("item"),
                time.ticks_of(frame[config.time]),
                *(numbers_of(frame[name]) for name in self.numbers),
                *(frame[name].cast(pl.String) for name in config.text),
            ]
        )
        needed = ["user", "item", "time", *self.numbers]
        bad = rows.rejected
        if any(typed[name].null_count() for name in needed):
            fault = typed.select(pl.any_horizontal(pl.col(needed).is_null())).to_series()
            bad = bad + self._reasons(rows, typed, fault, time)
            bad.sort(key=lambda one: one.line)
            typed = typed.filter(~fault)
        rejected = self.rejects.take(bad)
        filtered: dict[str, int] = {}
        for rule, keep in self._filters(time):
            left = typed.filter(keep)
            filtered[rule] = len(typed) - len(left)
            typed = left
        return EventBatch(typed, RowCounts(read, len(typed), rejected, filtered))

    def _reasons(self, rows: Rows, typed: pl.DataFrame, fault: pl.Series, time: TimeReader) -> list[Rejected]:
        """Why each faulty row is: its first missing column."""
        config = self.config
        meant = {config.user: "user", config.item: "item", config.time: "time"}
        meant |= {name: name for name in self.numbers}
        asked = {config.time: time.asked} | dict.fromkeys(self.numbers, "a number")
        lines = rows.lines()
        found = []
        for row in fault.arg_true().to_list():
            column = next(name for name, own in meant.items() if typed[own][row] is None)
            value = rows.frame[column][row]
            reason = f"{column} is missing"
            if value is not None and str(value).strip():
                shown = str(value)[:SHOWN] + ("..." if len(str(value)) > SHOWN else "")
                reason = f"{column} is {shown!r}, not {asked[column]}"
            found.append(Rejected(rows.file, int(lines[row]), reason))
        return found

    def _filters(self, time: TimeReader) -> Iterator[tuple[str, pl.Expr]]:
        config = self.config
        for rule, limit in (("before", config.after), ("from", config.before)):
            if limit is not None:
                seconds = TimeReader("iso", found=False).ticks_of(pl.Series([limit]))[0] / TICKS["us"]
                later = pl.col("time") >= seconds * time.ticks
                yield (
                    f"time {rule} {limit}" + (" on" if rule == "from" else ""),
                    later if rule == "before" else ~later,
                )
        for rule in config.at_least:
            column, _, value = rule.rpartition(":")
            yield f"{column} below {value}", pl.col(column) >= float(value)

    def items(self) -> pl.DataFrame:
        """The catalogue in the order of its files: id, title, category."""
        config = self.config.items
        wanted = [name for name in (config.key, config.title, config.category) if name]
        seen: dict[str, int] = {}
        ids: list[str] = []
        titles: list[str] = []
        categories: list[list[str]] = []
        for file in find_files(config.path):
            for rows in self._rows(file, wanted):
                lines, bad = rows.lines(), list(rows.rejected)
                for line, row in zip(
                    lines.tolist(), rows.frame.cast(pl.String).iter_rows(named=True), strict=True
                ):
                    key = row[config.key]
                    if not key:
                        bad.append(Rejected(rows.file, line, f"{config.key} is missing"))
                    elif key in seen:
                        bad.append(
                            Rejected(rows.file, line, f"item {key[:SHOWN]} is already on line {seen[key]}")
                        )
                    else:
                        seen[key] = line
                        ids.append(key)
                        titles.append((config.title and row[config.title]) or key)
                        categories.append(self._categories(row[config.category]) if config.category else [])
                self.rejects.take(sorted(bad, key=lambda one: one.line))
        frame = pl.DataFrame({"id": ids, "title": titles}, schema={"id": pl.String, "title": pl.String})
        if config.category:
            frame = frame.with_columns(pl.Series("category", categories, dtype=pl.List(pl.String)))
        return frame

    def _categories(self, text: str | None) -> list[str]:
        if not text:
            return []
        if text.startswith("["):
            try:
                return [str(value) for value in json.loads(text)]
            except ValueError:  # a plain text that begins like a list
                return [text]
        return [part.strip() for part in text.split(self.config.items.separator) if part.strip()]


def _ids(column: pl.Series) -> pl.Series:
    """Text; null where there is none."""
    text = column.cast(pl.String)
    return text if (text != "").all() else pl.select(pl.when(text != "").then(text)).to_series()
