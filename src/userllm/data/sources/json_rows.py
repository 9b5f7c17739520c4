"""Rows of JSON Lines and of Parquet files."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from userllm.data.sources.raw_files import POLARS_FAULTS, LineBlocks, Rejected, Rows
from userllm.errors import UserError

LITERAL = (b"{'", b"{u'")
HALF = "half of a surrogate pair, which is no character"
BYTES_A_ROW = 64
"""What a row of a Parquet file is taken to need in memory, to cut the file into batches."""


LONGEST_LITERAL = 1 << 20
"""Bytes of a Python literal that is read: parsing one may take hundreds of times its size in memory."""


def json_rows(path: Path, wanted: Sequence[str], size: int) -> Iterator[Rows]:
    """The wanted keys of a file with one JSON object per line, as text; null where an object lacks one.

    A line that begins as Python spells a dict (``{'asin': ...``) is read as a literal.
    """
    blocks = LineBlocks(path, size)
    for block in blocks:
        yield JsonBlock(str(path), block, blocks.line, wanted).rows()


def object_of(raw: bytes) -> dict[str, Any]:
    """The object that a line is, JSON or a Python literal. Raises ValueError that says what is wrong with it."""
    try:
        value = _literal(raw) if raw.startswith(LITERAL) else json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"not JSON ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _literal(raw: bytes) -> Any:
    """A Python literal of text, numbers, lists and dicts. Nothing in it is ever run. Raises ValueError for others."""
    if len(raw) > LONGEST_LITERAL:
        raise ValueError(f"a Python literal of more than {LONGEST_LITERAL >> 20} MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\\d" in a text is no valid escape, and means what it says
            return ast.literal_eval(raw.decode().strip())
    except UnicodeDecodeError:
        raise
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        reason = str(error.args[0] if error.args else type(error).__name__).partition(" on line ")[0]
        raise ValueError(f"neither JSON nor a Python literal ({reason})") from error


class JsonBlock:
    """Lines that are parsed at once; where that fails each half on its own, until the bad ones stand alone."""

    def __init__(self, label: str, block: bytes, line: int, wanted: Sequence[str]):
        self.label, self.line = label, line
        self.schema = dict.fromkeys(wanted, pl.String)
        self.lines = block.split(b"\n")
        self.may_be_half = b"\\ud" in block.lower()
        self.numbers = [np.empty(0, dtype=np.int64)]
        self.frames = [pl.DataFrame(schema=self.schema)]
        self.rejected: list[Rejected] = []

    def rows(self) -> Rows:
        for place, raw in enumerate(self.lines):
            if raw.startswith(LITERAL):
                self._read_literal(place)
            elif self.may_be_half and b"\\ud" in raw.lower() and _half_a_character(raw):
                self._reject(place, HALF)
        self._parse(0, len(self.lines))
        self.rejected.sort(key=lambda bad: bad.line)
        return Rows(self.label, pl.concat(self.frames), lambda: np.concatenate(self.numbers), self.rejected)

    def _parse(self, start: int, stop: int) -> None:
        full = start + np.flatnonzero([bool(raw.strip()) for raw in self.lines[start:stop]])
        if not len(full):
            return
        try:
            frame = pl.read_ndjson(b"\n".join(self.lines[start:stop]), schema=self.schema)
        except POLARS_FAULTS:
            frame = None
        if frame is not None and len(frame) == len(full):
            self.frames.append(frame)
            self.numbers.append(self.line + full)
        elif stop - start == 1:
            self._reject(start, _problem(self.lines[start]))
        else:
            middle = (start + stop) // 2
            self._parse(start, middle)
            self._parse(middle, stop)

    def _read_literal(self, place: int) -> None:
        """Turn a line that is a Python literal into one of JSON."""
        try:
            value = object_of(self.lines[place])
            self.lines[place] = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            self._reject(place, HALF)
        except TypeError as error:
            self._reject(place, f"neither JSON nor a Python literal ({error})")
        except ValueError as error:
            self._reject(place, str(error))

    def _reject(self, place: int, reason: str) -> None:
        self.rejected.append(Rejected(self.label, self.line + place, reason))
        self.lines[place] = b""


def _half_a_character(raw: bytes) -> bool:
    try:
        json.dumps(json.loads(raw), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except ValueError:  # no JSON at all: found out when it is parsed
        return False
    return False


def _problem(raw: bytes) -> str:
    try:
        object_of(raw)
    except ValueError as error:
        return str(error)
    return "not JSON that can be read"


def parquet_rows(path: Path, wanted: Sequence[str], size: int) -> Iterator[Rows]:
    """The wanted columns of a Parquet file. Numbers are text as in a CSV file; dates and times keep their type.

    Raises UserError where the file is damaged or lacks a column.
    """
    batch = max(1, size // BYTES_A_ROW)
    start = 0
    try:
        file = pl.scan_parquet(path)
        names = file.collect_schema().names()
        if missing := [name for name in wanted if name not in names]:
            raise UserError(f"{path}: no column {', '.join(missing)}; the columns are {', '.join(names)}")
        total = int(file.select(pl.len()).collect().item())
        while start < total:
            frame = file.select(wanted).slice(start, batch).collect()
            if len(frame) != min(batch, total - start):
                raise UserError(f"{path} after row {start}: rows are missing; fetch or make the file again")
            frame = frame.select(_as_text(frame[name]) for name in wanted)
            stop = start + len(frame)
            yield Rows(str(path), frame, lambda start=start, stop=stop: np.arange(start + 1, stop + 1))
            start = stop
    except (OSError, *POLARS_FAULTS) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} after row {start}: cannot be read ({reason}); make the file again"
        ) from error


def _as_text(column: pl.Series) -> pl.Series:
    if column.dtype == pl.String or column.dtype in (pl.Date, pl.Datetime):
        return column
    if column.dtype.is_float():
        whole = column.cast(pl.Int64, strict=False)
        same = whole.cast(column.dtype) == column
        text = pl.when(same).then(whole.cast(pl.String)).otherwise(column.cast(pl.String))
        return pl.select(text.alias(column.name)).to_series()
    if column.dtype.is_nested() or column.dtype in (pl.Binary, pl.Duration):
        texts = [None if value is None else json.dumps(value, default=str) for value in column.to_list()]
        return pl.Series(column.name, texts, dtype=pl.String)
    return column.cast(pl.String)
