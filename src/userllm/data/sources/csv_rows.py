"""Rows of CSV and TSV files. A block of regular lines is parsed as a whole; any other is looked at record by record.

Regular means that both ways must agree: every quote stands beside a separator, a line's end or another quote, there
is no NUL, and as many rows and separators as there have to be.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from userllm.data.sources.raw_files import LineBlocks, Rejected, Rows, occurrences
from userllm.errors import UserError

LONGEST_RECORD = 16 << 20
"""Bytes that a quoted field may run on for; after that its quote counts as one that is never closed."""
SHOWN = 40
csv.field_size_limit(LONGEST_RECORD)  # Python's own limit is 128 KiB

QUOTE, NEWLINE, RETURN = 34, 10, 13


def csv_rows(
    path: Path, separator: str, quoted: bool, header: Sequence[str] | None, wanted: Sequence[str], size: int
) -> Iterator[Rows]:
    """The wanted columns of a file, as text.

    header: the names of all columns where the file's first line does not say them. quoted: whether quotes mean
    something. Raises UserError where the file is empty, or the header lacks a wanted column or names it twice.
    """
    blocks = LineBlocks(path, size)
    names = list(header) if header is not None else _names(path, blocks.header(), separator, quoted)
    for name in wanted:
        if names.count(name) != 1:
            problem = (
                f"no column {name}"
                if name not in names
                else f"column {name} is there {names.count(name)} times"
            )
            raise UserError(f"{path} line 1: {problem}; the columns are {', '.join(names)}")
    places = [names.index(name) for name in wanted]
    reader = CsvReader(str(path), separator, quoted, len(names), dict(zip(wanted, places, strict=True)))
    for block in blocks:
        rows = reader.fast(block, blocks.line)
        if rows is None:
            rows, tail = reader.careful(block, blocks.line, blocks.ended)
            blocks.put_back(tail)
        yield rows


def _names(path: Path, line: bytes, separator: str, quoted: bool) -> list[str]:
    try:
        text = line.decode()
        names = (
            next(csv.reader([text], delimiter=separator, strict=True)) if quoted else text.split(separator)
        )
    except (UnicodeDecodeError, csv.Error, StopIteration) as error:
        raise UserError(f"{path} line 1: the header cannot be read ({error or 'it is empty'})") from error
    return [name.strip() for name in names]


class CsvReader:
    """Blocks of lines -> rows. columns: wanted names and their places in a line of ``width`` fields."""

    def __init__(self, label: str, separator: str, quoted: bool, width: int, columns: Mapping[str, int]):
        self.label, self.separator, self.quoted, self.width = label, separator, quoted, width
        self.columns = dict(columns)
        taken = {place: name for name, place in columns.items()}
        self._schema = {taken.get(n, f"\0{n}"): pl.String for n in range(width)}

    def fast(self, block: bytes, line: int) -> Rows | None:
        """All rows of a regular block, None of any other."""
        if b"\0" in block or (b"\r" in block and block.count(b"\r") != block.count(b"\r\n")):
            return None
        ends: np.ndarray | None = None
        if self.quoted and b'"' in block:
            regular = self._regular(block)
            if regular is None:
                return None
            ends, separators = regular
            records = len(ends)
        else:
            records = occurrences(block, b"\n") + (not block.endswith(b"\n"))
            separators = occurrences(block, self.separator.encode())
        if (
            separators != records * (self.width - 1) or self.width == 1
        ):  # a line too short, too long, or blank
            return None
        try:
            frame = pl.read_csv(
                block,
                has_header=False,
                schema=self._schema,
                separator=self.separator,
                quote_char='"' if self.quoted else None,
            )
        except pl.exceptions.PolarsError:
            return None
        if len(frame) != records:
            return None
        return Rows(self.label, frame.select(list(self.columns)), lambda: self._lines(line, records, ends))

    def _regular(self, block: bytes) -> tuple[np.ndarray, int] | None:
        """Which of the block's lines end a record, by number from 0, and the separators; None of irregular quotes."""
        raw = np.frombuffer(block, dtype=np.uint8)
        separator = ord(self.separator)
        quotes, newlines = np.flatnonzero(raw == QUOTE), np.flatnonzero(raw == NEWLINE)
        if len(quotes) % 2:
            return None
        opening, closing = quotes[::2], quotes[1::2]
        before = raw[np.maximum(opening - 1, 0)]
        after = raw[np.minimum(closing + 1, len(raw) - 1)]
        begins = np.isin(before, (separator, NEWLINE, QUOTE)) | (opening == 0)
        stops = np.isin(after, (separator, NEWLINE, RETURN, QUOTE)) | (closing == len(raw) - 1)
        if not (begins.all() and stops.all()):
            return None
        if not len(newlines) or newlines[-1] != len(raw) - 1:
            newlines = np.append(newlines, len(raw))
        ends = np.flatnonzero(np.searchsorted(quotes, newlines) % 2 == 0)
        separators = np.searchsorted(quotes, np.flatnonzero(raw == separator)) % 2 == 0
        return ends, int(separators.sum())

    def _lines(self, line: int, records: int, ends: np.ndarray | None) -> np.ndarray:
        if ends is None:
            return np.arange(line, line + records)
        return line + np.concatenate([[0], ends[:-1] + 1])

    def careful(self, block: bytes, line: int, last: bool) -> tuple[Rows, bytes]:
        """The rows of a block, one by one, bad ones with what is wrong; and a record that has not ended."""
        lines = block.split(b"\n")
        if not lines[-1]:
            lines.pop()
        found: list[list[str]] = []
        numbers: list[int] = []
        rejected: list[Rejected] = []
        place = 0
        while place < len(lines):
            fields, used, problem = self._record(lines, place, last)
            if used == 0:
                break
            if problem:
                rejected.append(Rejected(self.label, line + place, problem))
            elif fields:
                found.append(fields)
                numbers.append(line + place)
            place += used
        tail = b"\n".join(lines[place:])
        columns = {name: [fields[at] for fields in found] for name, at in self.columns.items()}
        frame = pl.DataFrame(columns, schema=dict.fromkeys(self.columns, pl.String))
        return Rows(self.label, frame, lambda: np.array(numbers, dtype=np.int64), rejected), (
            tail + b"\n" if tail else b""
        )

    def _record(self, lines: list[bytes], place: int, last: bool) -> tuple[list[str], int, str]:
        """(fields, lines used, problem) of the record that begins here; 0 lines where more are needed."""
        raw = lines[place].removesuffix(b"\r")
        if not raw.strip():
            return [], 1, ""
        used = 1
        try:
            if self.quoted and b'"' in raw:
                reader = csv.reader(self._text(lines, place), delimiter=self.separator, strict=True)
                fields = next(reader)
                used = reader.line_num
            else:
                fields = raw.decode().split(self.separator)
        except UnicodeDecodeError:
            return [], 1, "not UTF-8"
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                if not last and sum(map(len, lines[place:])) < LONGEST_RECORD:
                    return [], 0, ""
                return [], 1, "a quote that is opened is never closed"
            return [], 1, f"not CSV ({error})"
        if len(fields) != self.width:
            return [], used, f"{len(fields)} fields, expected {self.width}"
        if any("\0" in field for field in fields):
            return [], used, "holds a NUL"
        return fields, used, ""

    def _text(self, lines: list[bytes], place: int) -> Iterator[str]:
        """Lines from here on for csv.reader, with their ends, as far as a record may reach."""
        length = 0
        for raw in lines[place:]:
            if length > LONGEST_RECORD:
                return
            length += len(raw)
            yield raw.decode() + "\n"
