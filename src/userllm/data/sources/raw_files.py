"""Raw files of a table: found by name or pattern, unpacked on the way, read in blocks that end with a line."""

from __future__ import annotations

import glob
import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import polars as pl
import zstandard

from userllm.errors import UserError

Format = Literal["csv", "tsv", "jsonl", "parquet"]
POLARS_FAULTS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
FORMATS: dict[str, Format] = {
    ".csv": "csv", ".tsv": "tsv", ".txt": "tsv", ".inter": "tsv", ".item": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
PACKED = (".gz", ".zst")
LONGEST_LINE = 256 << 20
PACKED_BLOCK = 1 << 16
MEND = "mend or remove that line, or leave such rows out with --on-bad-rows skip"


@dataclass(frozen=True)
class Rejected:
    """A bad row: where it is (from 1: a line, or a row of a Parquet file) and what is wrong with it."""

    file: str
    line: int
    reason: str


@dataclass
class Rows:
    """Rows of a raw file in its order.

    frame: the wanted columns, text but for Parquet's own types, null where a value is missing. lines: the line of each
    row [rows], worked out when it is asked for. rejected: records that are no rows at all.
    """

    file: str
    frame: pl.DataFrame
    lines: Callable[[], np.ndarray]
    rejected: list[Rejected] = field(default_factory=list)


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files, in the order given, those of a pattern in the order of their names. Raises UserError for no file."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        names = (
            [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        )
        names = [name for name in names if name.is_file()]
        if not names:
            raise UserError(f'{pattern}: no such file; give files, or a pattern in quotes ("logs/*.csv.gz")')
        found |= dict.fromkeys(names)
    if not found:
        raise UserError("there are no files; give at least one with --path")
    return list(found)


def format_of(path: Path) -> Format:
    """By the ending, "log.csv.gz" like "log.csv". Raises UserError for another one."""
    if not tells_format(path):
        raise UserError(
            f"{path}: cannot tell its format from its name; say which with --format (csv, tsv, jsonl, parquet)"
        )
    return FORMATS[_ending(path)]


def tells_format(path: Path) -> bool:
    """Whether a file's name says its format."""
    return _ending(path) in FORMATS


def _ending(path: Path) -> str:
    return next((end for end in reversed(path.suffixes) if end.lower() not in PACKED), "").lower()


def occurrences(block: bytes, byte: bytes) -> int:
    """How often a byte occurs: where it does so often, several times faster than ``bytes.count``."""
    return int(np.count_nonzero(np.frombuffer(block, dtype=np.uint8) == ord(byte)))


class LineBlocks:
    """The bytes of a text file, unpacked, in blocks that end with a line; what a reader cannot use yet it puts back.

    Memory is a few blocks. ``line`` is the number of the line that the block at hand begins with; ``ended`` is True
    once the block at hand is the last. Raises UserError, with the line, where the file is damaged.
    """

    def __init__(self, path: Path, size: int):
        self.path, self.size = path, size
        self.line = 1
        self.ended = False
        self._rest = b""
        self._tail = b""
        self._file = _opened(path)
        self._fill()
        self._rest = self._rest.removeprefix(b"\xef\xbb\xbf")

    def header(self) -> bytes:
        """The first line, without its end."""
        while b"\n" not in self._rest and self._fill():
            pass
        line, end, self._rest = self._rest.partition(b"\n")
        self.line += len(end)
        return line.rstrip(b"\r")

    def __iter__(self) -> Iterator[bytes]:
        while not self.ended:
            raw = self._read()
            self.ended = not raw
            end = raw.rfind(b"\n") + 1
            if end:
                block, self._rest = b"".join((self._rest, memoryview(raw)[:end])), raw[end:]
            elif b"\n" in self._rest and not self.ended:  # what the header's block left
                end = self._rest.rfind(b"\n") + 1
                block, self._rest = self._rest[:end], self._rest[end:] + raw
            else:
                block, self._rest = (self._rest, b"") if self.ended else (b"", self._rest + raw)
            if block:
                self._tail = b""
                yield block
                self.line += occurrences(block, b"\n") - self._tail.count(b"\n")
                self._rest = self._tail + self._rest if self._tail else self._rest
        self._file.close()

    def close(self) -> None:
        """Where the rest is not wanted."""
        self._file.close()

    def put_back(self, tail: bytes) -> None:
        """The end of the block at hand will be read again with what follows it; not of the last block."""
        self._tail = tail

    def _fill(self) -> bool:
        """Read on; False at the end of the file."""
        raw = self._read()
        self._rest = self._rest + raw if self._rest else raw
        return bool(raw)

    def _read(self) -> bytes:
        """What comes next; nothing at the end of the file."""
        if len(self._rest) > LONGEST_LINE:
            raise UserError(
                f"{self.path} line {self.line}: longer than {LONGEST_LINE >> 20} MiB; this is no table"
            )
        try:
            return self._file.read(max(self.size, len(self._rest)))  # of a long line twice as much each time
        except EOFError as error:
            raise self._damaged("ends in the middle of its packed data") from error
        except (OSError, zlib.error, zstandard.ZstdError) as error:
            raise self._damaged(f"cannot be read ({error})") from error

    def _damaged(self, problem: str) -> UserError:
        whole = self.line - 1 + self._rest.count(b"\n")
        return UserError(f"{self.path} after line {whole}: {problem}; fetch or pack the file again")


class Unpacked:
    """Reads a .zst file of any number of frames; unlike zstandard's own reader it notices a missing end."""

    def __init__(self, raw: BinaryIO):
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._unused = b""

    def read(self, size: int) -> bytes:
        """About ``size`` bytes, b"" at the end. Raises EOFError for a file that is cut off."""
        parts, length = [], 0
        while length < size:
            packed = self._unused or self._raw.read(PACKED_BLOCK)
            self._unused = b""
            if not packed:
                if self._begun:
                    raise EOFError
                break
            self._begun = True
            parts.append(self._frame.decompress(packed))
            length += len(parts[-1])
            if self._frame.eof:
                self._unused = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._begun = False
        return b"".join(parts)

    def close(self) -> None:
        self._raw.close()


def _opened(path: Path) -> BinaryIO | gzip.GzipFile | Unpacked:
    try:
        raw = open(path, "rb")  # noqa: SIM115 - closed with the blocks
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return Unpacked(raw) if path.suffix.lower() == ".zst" else raw
