"""Event columns on disk: one flat .npy file per column, memory-mapped; texts in one file that events point into.

Events are sorted by user, so no column holds the user: ``offsets[u]:offsets[u + 1]`` are the events of user u.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import polars as pl

BLOCK = 1 << 22
"""Rows that are looked at together where a whole column is read."""


def column_file(folder: Path, name: str) -> Path:
    """The file of a column; a name may hold anything ("review/text")."""
    return folder / f"{quote(name, safe='')}.npy"


class ColumnWriter:
    """Writes a .npy file piece by piece. Its header is right once it is closed."""

    def __init__(self, file: Path, dtype: str):
        self.dtype = np.dtype(dtype)
        self.rows = 0
        self._file = open(file, "wb")  # noqa: SIM115 - closed by close
        self._start = self._write_header()

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).data)
        self.rows += len(values)

    def close(self) -> None:
        if self._file.closed:
            return
        self._file.seek(0)
        if self._write_header() != self._start:
            raise AssertionError("numpy reserves room for the length of an array in its header")
        self._file.close()

    def _write_header(self) -> int:
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": self.dtype.str, "fortran_order": False, "shape": (self.rows,)}
        )
        return self._file.tell()


def read_column(folder: Path, name: str) -> np.ndarray:
    """A column, memory-mapped: read when it is looked at. Raises OSError or ValueError if it is damaged."""
    return np.load(column_file(folder, name), mmap_mode="r").view(np.ndarray)


def read_stretch(folder: Path, name: str, start: int, stop: int) -> np.ndarray:
    """Rows ``start:stop`` of a column, copied into memory: pages of a mapped file would count as memory, too."""
    with open(column_file(folder, name), "rb") as file:
        np.lib.format.read_magic(file)  # type: ignore[arg-type]
        _, _, dtype = np.lib.format.read_array_header_1_0(file)
        file.seek(start * dtype.itemsize, os.SEEK_CUR)
        return np.fromfile(file, dtype, stop - start)


def write_column(folder: Path, name: str, values: np.ndarray) -> None:
    """A whole column at once."""
    writer = ColumnWriter(column_file(folder, name), values.dtype.newbyteorder("<").str)
    writer.append(values)
    writer.close()


class TextWriter:
    """Appends texts to one file. A text is its length in bytes (4, little-endian) and then its UTF-8."""

    def __init__(self, file: Path):
        self._file = open(file, "ab")  # noqa: SIM115 - closed by close
        self._end = self._file.tell()

    def append(self, texts: Sequence[str | None]) -> np.ndarray:
        """Where each text begins, int64. None is written as an empty text."""
        raw = [(text or "").encode() for text in texts]
        lengths = np.array([len(text) for text in raw], dtype="<u4")
        heads = lengths.tobytes()
        self._file.write(b"".join(heads[4 * n : 4 * n + 4] + text for n, text in enumerate(raw)))
        ends = self._end + np.cumsum(lengths.astype(np.int64) + 4)
        starts = np.append(self._end, ends[:-1]).astype(np.int64)[: len(raw)]
        self._end = int(ends[-1]) if len(raw) else self._end
        return starts

    def close(self) -> None:
        self._file.close()


class Texts:
    """Reads texts back, each on its own; the file is memory-mapped."""

    def __init__(self, file: Path):
        self.file = file
        with open(file, "rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            self._map = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) if size else b""

    def at(self, starts: Iterable[int]) -> list[str]:
        """The texts that begin there."""
        return [raw.decode() for raw in self.raw(starts)]

    def raw(self, starts: Iterable[int]) -> Iterator[bytes]:
        """The same as UTF-8."""
        data = self._map
        for start in starts:
            begin = start + 4
            yield data[begin : begin + int.from_bytes(data[start:begin], "little")]


def fingerprint(
    offsets: np.ndarray, columns: Mapping[str, np.ndarray], titles: Iterable[str], texts: Texts | None = None
) -> str:
    """sha256 of the ordered events: user number, item title and every event column ("rating", "time").

    columns: numbers, and of texts where they begin (int64 columns other than "time"). Titles stand for items, so that
    two copies of one release with different raw ids have one fingerprint; texts count as they read. Columns are
    looked at block by block.
    """
    digest = hashlib.sha256(b"events v1")
    hashed = np.array(
        [int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "little") for title in titles],
        dtype="<u8",
    )
    rows = int(offsets[-1])
    kinds: dict[str, str] = {"user": "<i4", "item": hashed.dtype.str}
    for name in sorted({"user", *columns}):
        column: Any = columns.get(name)
        textual = name not in ("user", "time") and column.dtype == np.int64
        kind = "text" if textual else kinds.get(name) or column.dtype.str
        digest.update(f"{name}:{kind}:{rows};".encode())
        for start in range(0, rows, BLOCK):
            stop = min(start + BLOCK, rows)
            if name == "user":
                digest.update(users_of(offsets, start, stop).data)
            elif name == "item":
                digest.update(hashed[column[start:stop]].data)
            elif textual:
                assert texts is not None
                for raw in texts.raw(column[start:stop].tolist()):
                    digest.update(len(raw).to_bytes(4, "little") + raw)
            else:
                digest.update(np.ascontiguousarray(column[start:stop]).data)
    return digest.hexdigest()


def catalogue_hash(items: pl.DataFrame) -> str:
    """sha256 of the item table as it stands: the items in their order, with their ids, titles and every item field."""
    digest = hashlib.sha256(b"catalogue v1")
    for name in sorted(items.columns):
        for block in items.select(name).iter_slices():
            digest.update(json.dumps([name, block[name].to_list()], default=str).encode())
    return digest.hexdigest()


def distinct(column: np.ndarray) -> np.ndarray:
    """The values of a column in order, each once."""
    found = np.empty(0, dtype=column.dtype)
    for start in range(0, len(column), BLOCK):
        found = np.union1d(found, np.unique(column[start : start + BLOCK]))
    return found


def users_of(offsets: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The users of the events ``start:stop``, int32."""
    first = int(np.searchsorted(offsets, start, side="right")) - 1
    last = int(np.searchsorted(offsets, stop, side="left"))
    counts = np.diff(np.clip(offsets[first : last + 1], start, stop))
    return np.repeat(np.arange(first, last, dtype=np.int32), counts)
