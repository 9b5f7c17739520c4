"""Rows of text -> events with times and numbers, filtered; what became of every row is counted."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from userllm.data.build import EventBatch
from userllm.data.card import RowCounts
from userllm.data.sources.event_filters import EventFilters
from userllm.data.sources.raw_files import MEND, Rejected, Rows
from userllm.data.sources.values import TimeReader, numbers_of
from userllm.errors import UserError

SHOWN = 60
KEYS = ("user", "item", "time")


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


class EventRows:
    """Makes events of rows.

    columns: what an event's parts are called in the rows: "user", "item", "time" and each field -> column. numbers,
    texts: which fields are what. time: how times are read; None until it is found out from the first rows.
    """

    def __init__(
        self,
        columns: Mapping[str, str],
        numbers: Sequence[str],
        texts: Sequence[str],
        filters: EventFilters,
        rejects: Rejects,
        time: TimeReader | None = None,
    ):
        self.columns, self.numbers, self.texts = dict(columns), list(numbers), list(texts)
        self.filters, self.rejects, self.time = filters, rejects, time

    def batch(self, rows: Rows) -> EventBatch:
        """The events of these rows. Raises UserError for a bad one, unless bad rows are left out."""
        column, frame = self.columns, rows.frame
        read = len(frame) + len(rows.rejected)
        if self.time is None and len(frame):
            self.time = TimeReader.find(frame[column["time"]], f"{rows.file}, column {column['time']}")
        time = self.time or TimeReader("s", found=False)
        typed = pl.DataFrame(
            [
                _ids(frame[column["user"]]).alias("user"),
                _ids(frame[column["item"]]).alias("item"),
                time.ticks_of(frame[column["time"]]),
                *(numbers_of(frame[column[name]]).alias(name) for name in self.numbers),
                *(frame[column[name]].cast(pl.String).alias(name) for name in self.texts),
            ]
        )
        needed = [*KEYS, *self.numbers]
        bad = rows.rejected
        if any(typed[name].null_count() for name in needed):
            fault = typed.select(pl.any_horizontal(pl.col(needed).is_null())).to_series()
            bad = bad + self._reasons(rows, typed, fault, time)
            bad.sort(key=lambda one: one.line)
            typed = typed.filter(~fault)
        rejected = self.rejects.take(bad)
        filtered: dict[str, int] = {}
        for rule, keep in self.filters.rules(time):
            left = typed.filter(keep)
            filtered[rule] = len(typed) - len(left)
            typed = left
        return EventBatch(typed, RowCounts(read, len(typed), rejected, filtered))

    def _reasons(self, rows: Rows, typed: pl.DataFrame, fault: pl.Series, time: TimeReader) -> list[Rejected]:
        """Why each faulty row is: its first missing part."""
        asked = {"time": time.asked} | dict.fromkeys(self.numbers, "a number")
        lines = rows.lines()
        found = []
        for row in fault.arg_true().to_list():
            name = next(one for one in (*KEYS, *self.numbers) if typed[one][row] is None)
            column = self.columns[name]
            value = rows.frame[column][row]
            reason = f"{column} is missing"
            if value is not None and str(value).strip():
                shown = str(value)[:SHOWN] + ("..." if len(str(value)) > SHOWN else "")
                reason = f"{column} is {shown!r}, not {asked[name]}"
            found.append(Rejected(rows.file, int(lines[row]), reason))
        return found


def _ids(column: pl.Series) -> pl.Series:
    """Text; null where there is none."""
    text = column.cast(pl.String)
    return text if (text != "").all() else pl.select(pl.when(text != "").then(text)).to_series()
