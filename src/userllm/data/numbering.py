"""Raw ids as numbers: in order of first appearance, or by a catalogue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

LARGEST_ID = 1 << 24
"""Of a catalogue whose ids are looked up in a table."""
RUNS_SEEN = 1000
"""Ids looked at to find out whether equal ones stand together."""


class Numbering:
    """Raw ids -> numbers from 0, in order of first appearance."""

    def __init__(self, known: Sequence[str] = ()):
        self._type = pl.Categorical(pl.Categories.random())
        self._codes_live = pl.Series(
            dtype=self._type
        )  # polars forgets the codes of a type that no series has
        self._number = np.empty(0, dtype=np.int32)
        self._ids: list[pl.Series] = []
        self.size = 0
        if len(known):
            self.numbers(pl.Series(known, dtype=pl.String))

    def numbers(self, ids: pl.Series) -> np.ndarray:
        """int32, one for each id; none of them may be null."""
        if len(ids) > 4 * RUNS_SEEN and ids.head(RUNS_SEEN).rle_id()[-1] * 8 < RUNS_SEEN:
            runs = ids.rle().struct.unnest()  # a log in order of users: number each stretch once
            return np.repeat(self._numbers(runs["value"]), runs["len"].to_numpy())
        return self._numbers(ids)

    def _numbers(self, ids: pl.Series) -> np.ndarray:
        ids = ids.cast(pl.String)
        codes = ids.cast(self._type).to_physical().to_numpy()
        top = int(codes.max()) + 1 if len(codes) else 0
        if top > len(self._number):
            room = np.full(max(top, 2 * len(self._number)), -1, dtype=np.int32)
            room[: len(self._number)] = self._number
            self._number = room
        numbers = self._number[codes]
        if (new := numbers < 0).any():
            frame = pl.DataFrame({"code": codes[new], "id": ids.filter(pl.Series(new))})
            frame = frame.unique("code", keep="first", maintain_order=True)
            self._number[frame["code"].to_numpy()] = np.arange(self.size, self.size + len(frame))
            self._ids.append(frame["id"].cast(pl.String))
            self.size += len(frame)
            numbers = self._number[codes]
        return numbers

    @property
    def ids(self) -> pl.Series:
        """Raw ids by number."""
        return pl.concat([pl.Series(dtype=pl.String), *self._ids]).alias("id")


class ItemNumbers:
    """Ids -> rows of the catalogue, int32, -1 for an id that is not in it. Whole numbers are looked up in a table."""

    def __init__(self, ids: pl.Series):
        self.table: np.ndarray | None = None
        self.frame = pl.DataFrame({"id": ids}).with_row_index("number")
        if ids.dtype == pl.Int64 and ids.is_between(0, LARGEST_ID).all():
            self.table = np.full(int(ids.max()) + 2, -1, dtype=np.int32)  # type: ignore[arg-type]
            self.table[ids.to_numpy()] = np.arange(len(ids))

    def __call__(self, ids: pl.Series) -> np.ndarray:
        if self.table is not None:
            places = ids.to_numpy()
            outside = (places < 0) | (places >= len(self.table))
            return self.table[np.where(outside, len(self.table) - 1, places) if outside.any() else places]
        found = ids.to_frame("id").join(self.frame, on="id", how="left", maintain_order="left")["number"]
        return found.cast(pl.Int32).fill_null(-1).to_numpy()
