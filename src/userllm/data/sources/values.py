"""Text -> times and numbers, a column at a time; what cannot be read becomes null, and somebody says why."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from userllm.errors import UserError

TICKS = {"s": 1_000_000, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
"""Ticks of a second, by unit; seconds may have fractions, so their ticks are microseconds."""
SPELT = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
ISO_FORMATS = (
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%d",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%d %H:%M:%S%.f%z",
    "%Y-%m-%d %H:%M%z",
)
DATE_IN_DIGITS = r"^(19|20)\d\d(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])$"
LEAST, MOST = -62_135_596_800, 253_402_300_799
"""Seconds since 1970 of the years 1 and 9999: a time outside was meant otherwise."""
SAMPLE = 10_000


@dataclass(frozen=True)
class TimeReader:
    """How a column of times is read. unit: of TICKS, "iso", or a strptime format. found: it was not given but found."""

    unit: str
    found: bool

    @property
    def ticks(self) -> int:
        """Ticks of a second."""
        return TICKS.get(self.unit, TICKS["us"])

    @property
    def asked(self) -> str:
        """What a time has to be, for messages."""
        text = {"iso": "a date or time as in ISO 8601"} | {
            u: f"{name} since 1970" for u, name in SPELT.items()
        }
        return f"{text.get(self.unit, f'a time like {self.unit}')} in the years 1 to 9999"

    def __str__(self) -> str:
        if self.unit in SPELT:
            text = f"{SPELT[self.unit]} since 1970"
        elif self.unit == "iso":
            text = "dates and times as in ISO 8601, UTC where they name no zone"
        else:
            text = f"dates and times like {self.unit!r}, UTC where they name no zone"
        return f"{text} ({'found out' if self.found else 'as told'})"

    @classmethod
    def find(cls, column: pl.Series, where: str) -> TimeReader:
        """From the first values of a column. Raises UserError where they are neither numbers nor ISO 8601."""
        values = column.drop_nulls().head(SAMPLE)
        if column.dtype.is_temporal():
            return cls("iso", True)
        values = values.filter(values != "")
        numbers = values.cast(pl.Float64, strict=False).drop_nulls()
        if len(numbers) * 2 > len(values):
            if values.cast(pl.String).str.contains(DATE_IN_DIGITS).all():
                raise UserError(
                    f"{where}: times like {values[0]} may be dates or seconds; say which with --time-unit "
                    '"%Y%m%d" or --time-unit s'
                )
            middle = abs(float(numbers.median() or 0.0))  # type: ignore[arg-type]
            return cls(
                next((u for u, top in (("s", 1e11), ("ms", 1e14), ("us", 1e17)) if middle < top), "ns"), True
            )
        if len(values) and cls("iso", True).ticks_of(values).null_count() * 2 < len(values):
            return cls("iso", True)
        example = repr(values[0][:40]) if len(values) else "nothing"
        raise UserError(
            f"{where}: cannot tell how times like {example} are meant; say so with --time-unit (s, ms, us, ns, iso, "
            'or a format like "%d.%m.%Y %H:%M")'
        )

    def ticks_of(self, column: pl.Series) -> pl.Series:
        """Ticks since 1970, Int64, null where there is no such time."""
        if self.unit in TICKS:
            found = _ticks_of_numbers(column, TICKS["us"] if self.unit == "s" else 1)
        elif column.dtype.is_temporal():
            found = column.cast(pl.Datetime("us")).cast(pl.Int64)
        else:
            found = _dates(
                column, ISO_FORMATS if self.unit == "iso" else (self.unit,), iso=self.unit == "iso"
            )
        frame = pl.select(
            pl.when(found.is_between(LEAST * self.ticks, MOST * self.ticks + self.ticks - 1)).then(found)
            if self.unit != "ns"
            else found
        )
        return frame.to_series().alias("time")


def _ticks_of_numbers(column: pl.Series, ticks: int) -> pl.Series:
    """Int64, each number ``ticks`` times, rounded down."""
    if column.dtype.is_temporal():
        return pl.Series(column.name, [None] * len(column), dtype=pl.Int64)
    most, floats = 2**63 - 1024, column.dtype.is_float()
    whole = column.cast(pl.Int64, strict=False)  # exact, where a float is not
    found = pl.when(whole.is_between(-(most // ticks), most // ticks)).then(whole * ticks)
    if floats or whole.null_count() > column.null_count():
        number = column.str.strip_chars() if column.dtype == pl.String else column
        parts = (number.cast(pl.Float64, strict=False) * ticks).floor()
        small = pl.when(parts.abs() < most).then(parts).cast(pl.Int64, strict=False)
        found = small if floats else pl.when(whole.is_null()).then(small).otherwise(found)
    return pl.select(found).to_series()


def _dates(column: pl.Series, formats: tuple[str, ...], iso: bool) -> pl.Series:
    text = column.str.strip_chars()
    if iso:
        text = (
            text.str.replace(r"[Tt]", " ")
            .str.replace(r" ?[Zz]$", "+0000")
            .str.replace(r"([+-]\d\d):?(\d\d)$", "$1$2")
            .str.replace(r"(:\d\d(?:\.\d+)?[+-]\d\d)$", "${1}00")
        )
    found = pl.Series(column.name, [None] * len(column), dtype=pl.Int64)
    for pattern in formats:
        left = found.is_null() & text.is_not_null()
        if not left.any():
            break
        zoned = "%z" in pattern
        try:
            time = text.filter(left).str.to_datetime(
                pattern, time_unit="us", time_zone="UTC" if zoned else None, strict=False, exact=True
            )
        except pl.exceptions.PolarsError as error:
            raise UserError(
                f"--time-unit {pattern!r}: no format of times ({str(error).splitlines()[0]}); give one like "
                '"%d.%m.%Y %H:%M"'
            ) from error
        found = found.scatter(left.arg_true(), time.cast(pl.Int64))
    return found


def numbers_of(column: pl.Series) -> pl.Series:
    """Float32, null where there is no finite number."""
    if column.dtype.is_temporal():
        return pl.Series(column.name, [None] * len(column), dtype=pl.Float32)
    found = column.cast(pl.Float64, strict=False)
    if found.null_count() > column.null_count():
        found = column.str.strip_chars().cast(pl.Float64, strict=False)
    found = found.cast(pl.Float32)
    return pl.select(pl.when(found.is_finite()).then(found).alias(column.name)).to_series()
