"""Which events are kept, and how rows that cannot be read are met: settings of everything that is streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from userllm.data.build import bytes_of
from userllm.data.count_filters import CountFilters, Repeated
from userllm.data.sources.values import TICKS, TimeReader, numbers_of
from userllm.errors import UserError
from userllm.ranges import PositiveInt, check_ranges

OnBadRows = Literal["error", "skip"]


@dataclass
class EventFilters:
    """What is kept of an event log; everything, unless asked otherwise."""

    after: str | None = None
    """Keep events from this time on: YYYY-MM-DD, or with a time of day (UTC)."""
    before: str | None = None
    """Keep events before this time."""
    at_least: list[str] = field(default_factory=list)
    """Keep events whose field has this value or more, as COLUMN:VALUE ("rating:4")."""
    repeated: Repeated = "all"
    """Of a user's events with one item keep all, the first, or the last."""
    min_item_events: PositiveInt = 1
    """Leave out items with fewer events."""
    min_user_events: PositiveInt = 1
    """Leave out users with fewer events. Both minima hold in the end."""
    on_bad_rows: OnBadRows = "error"
    """What happens at a row that cannot be read: stop and name it, or leave it out and list it in rejects.csv."""
    memory: str = "2GiB"
    """About how much memory to use, whatever the size of the files."""

    def check(self, numbers: Sequence[str]) -> None:
        """Raise UserError for settings that cannot be. numbers: the event fields that are numbers."""
        check_ranges(self)
        bytes_of(self.memory)
        for rule in self.at_least:
            column, _, value = rule.rpartition(":")
            if column not in numbers or numbers_of(pl.Series([value])).null_count():
                raise UserError(
                    f"at_least {rule!r}: give COLUMN:VALUE, where COLUMN is a field that is a number"
                )
        for name in ("after", "before"):
            limit = getattr(self, name)
            if limit is not None and _ticks(limit) is None:
                raise UserError(
                    f"{name} is {limit!r}; give a date like 2015-01-31, or a time like 2015-01-31T12:00"
                )

    def rules(self, time: TimeReader) -> Iterator[tuple[str, pl.Expr]]:
        """What each filter of single events says, and which events it keeps: a test of ``time`` in ticks and fields."""
        for rule, limit in (("before", self.after), ("from", self.before)):
            if limit is not None:
                later = pl.col("time") >= (_ticks(limit) or 0) / TICKS["us"] * time.ticks
                yield (
                    f"time {rule} {limit}" + (" on" if rule == "from" else ""),
                    later if rule == "before" else ~later,
                )
        for rule in self.at_least:
            column, _, value = rule.rpartition(":")
            yield f"{column} below {value}", pl.col(column) >= float(value)

    def counts(self) -> CountFilters:
        """The filters that need all events at once."""
        return CountFilters(self.repeated, self.min_item_events, self.min_user_events)


def _ticks(limit: str) -> int | None:
    """Microseconds since 1970."""
    return TimeReader("iso", found=False).ticks_of(pl.Series([limit]))[0]
