"""Event logs with one event per line. Reading is vectorised; only a bad line makes us look at lines one by one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from userllm.data.in_turn import ahead, each
from userllm.data.sources.raw_files import LineBlocks
from userllm.errors import UserError

ColumnType = Literal["integer", "number", "text"]
DTYPES: dict[ColumnType, type[pl.DataType]] = {"integer": pl.Int64, "number": pl.Float64, "text": pl.String}
PATTERNS: dict[ColumnType, re.Pattern[str]] = {
    "integer": re.compile(r"\s*[+-]?\d{1,18}\s*"),
    "number": re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*"),
    "text": re.compile(r".+", re.DOTALL),
}
SPELT: dict[ColumnType, str] = {"integer": "a whole number", "number": "a number", "text": "text"}
MEND = "mend or remove that line and prepare again"


@dataclass(frozen=True)
class SourceFile:
    """A raw file, and how messages name it (a member of a zip is read from a temporary place)."""

    path: Path
    label: str

    def lines(self) -> Iterator[tuple[int, str]]:
        """Line number from 1 and text of every line that is not blank."""
        with open(self.path, "rb") as raw:
            for number, line in enumerate(raw, 1):
                if line.strip():
                    yield number, decoded(line).rstrip("\r\n")

    def text(self) -> str:
        """The whole file."""
        return decoded(self.path.read_bytes())

    def bad_line(self, number: int, problem: str) -> UserError:
        return UserError(f"{self.label} line {number}: {problem}; {MEND}")


def decoded(raw: bytes) -> str:
    """UTF-8, else latin-1: MovieLens 100K and 1M are latin-1, all later releases UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def read_log(
    file: SourceFile,
    separator: str,
    columns: Mapping[str, ColumnType],
    header: Sequence[str] | None,
    size: int = 1 << 25,
) -> Iterator[pl.DataFrame]:
    """The named columns of a log in batches, rows in file order.

    columns: wanted columns and their types. header: the names of all columns where the file has no header line.
    separator: may be longer than one character ("::"). size: bytes of the file that are read at once.
    Raises UserError naming file and line where a field is missing or is not what its type says, or a column is missing.
    """
    has_header = header is None
    names = list(header) if header is not None else read_header(file, separator)
    if missing := [name for name in columns if name not in names]:
        raise UserError(
            f"{file.label} line 1: no column {', '.join(missing)}; the header names {', '.join(names)}"
        )
    types: dict[str, ColumnType] = {name: columns.get(name, "text") for name in names}
    numbers = [name for name, type_ in columns.items() if type_ == "number"]
    blocks = LineBlocks(file.path, size)
    if has_header:
        blocks.header()

    def parsed(block: bytes) -> pl.DataFrame:
        try:
            frame = pl.read_csv(
                block.replace(separator.encode(), b"\t") if len(separator) > 1 else block,
                has_header=False,
                separator="\t" if len(separator) > 1 else separator,
                quote_char=None,
                schema={name: DTYPES[type_] for name, type_ in types.items()},
            )
        except pl.exceptions.PolarsError as error:
            raise first_bad_line(file, separator, types, has_header) or UserError(
                f"{file.label}: cannot be read ({str(error).splitlines()[0]})"
            ) from error
        if any(column.null_count() for column in frame):
            frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))  # no blank lines
        frame = frame.select(list(columns))
        faults = [frame[name].null_count() for name in columns]
        if sum(faults) or not all(frame[name].is_finite().all() for name in numbers):
            raise first_bad_line(file, separator, types, has_header) or UserError(
                f"{file.label}: has missing fields"
            )
        return frame

    yield from each(parsed, ahead(block for block in blocks if not block.isspace()))


def read_header(file: SourceFile, separator: str) -> list[str]:
    """Column names of the header line; RecBole's types ("rating:float") are left off."""
    with open(file.path, "rb") as raw:
        line = raw.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
    if not line:
        raise UserError(f"{file.label} line 1: the header is missing; give a complete copy of the release")
    return [name.split(":")[0].strip().strip('"') for name in line.split(separator)]


def first_bad_line(
    file: SourceFile, separator: str, types: Mapping[str, ColumnType], has_header: bool
) -> UserError | None:
    """The error for the first line with a missing, extra or ill-typed field, None where there is none."""
    names = list(types)
    for number, line in file.lines():
        if has_header and number == 1:
            continue
        fields = line.split(separator)
        for name, field in zip(names, fields, strict=False):
            if not field.strip():
                return file.bad_line(number, f"{name} is missing")
            if not PATTERNS[types[name]].fullmatch(field):
                return file.bad_line(number, f"{name} is {field!r}, not {SPELT[types[name]]}")
        if len(fields) != len(names):
            return file.bad_line(number, f"{len(fields)} fields, expected {len(names)} ({', '.join(names)})")
    return None


def line_of_row(file: SourceFile, row: int, has_header: bool) -> int:
    """The line number of a row that ``read_log`` returned."""
    numbers = (number for number, _ in file.lines() if not (has_header and number == 1))
    return next(number for position, number in enumerate(numbers) if position == row)
