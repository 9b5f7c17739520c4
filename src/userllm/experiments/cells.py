"""Finished cells on disk: one JSON file and one Parquet file each. Cells of several machines are merged by copying.

    OUT/cells/<scale>-<cell>-s<seed>-<hash>.json      settings, versions, hardware, timings, metrics, a few texts
    OUT/cells/<scale>-<cell>-s<seed>-<hash>.parquet   every user's numbers, by task and system

A cell goes by the hash of its settings. An experiment whose settings change finds nothing under the old hash, and two
experiments that ask for the same settings share the cell.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from userllm.errors import UserError
from userllm.json_file import read_object
from userllm.whole_file import whole, write_text

FORMAT_VERSION = 1
_TOLD = ("settings", "config", "metrics")
"""What a cell's JSON file holds at least."""
_AGAIN = "remove the cell's two files and run it again"


@dataclass(frozen=True)
class FinishedCell:
    """A cell as stored. ``told`` is its JSON file."""

    file: Path
    told: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """metrics.json of the run."""
        metrics: dict[str, Any] = self.told["metrics"]
        return metrics

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.told["settings"]["seed"])

    @property
    def pace(self) -> tuple[float, float]:
        """Seconds of its machine for one second of the budgets of stage 1 and 2. Cells tell two numbers, or one for
        both stages; older ones tell none and had 1."""
        told = self.told.get("pace", 1.0)
        first, second = told if isinstance(told, list) else (told, told)
        return first, second

    def per_user(self) -> pl.DataFrame:
        """task, user, system, and a column per number there is of a user's answer: rank, log_likelihood, and what is
        measured of written texts (rougeLsum, ...). Null or NaN where there is none; older cells lack some columns."""
        file = self.file.with_suffix(".parquet")
        return _read(file, file.stat().st_mtime_ns)

    @property
    def texts(self) -> dict[str, list[dict[str, str]]]:
        """By task that is answered in free text, the first users' prompt, target and texts by system."""
        texts: dict[str, list[dict[str, str]]] = self.told.get("texts", {})
        return texts


@lru_cache(maxsize=512)
def _read(file: Path, _changed: int) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(file)
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{file}: cannot be read ({_first_line(error)}); {_AGAIN}") from error
    if missing := [name for name in ("task", "user", "system") if name not in frame.columns]:
        raise UserError(f"{file}: has no column {missing[0]}; {_AGAIN}")
    return frame


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


class CellStore:
    """The folder of the finished cells."""

    def __init__(self, out: Path):
        self.folder = out / "cells"

    def find(self, settings_hash: str) -> FinishedCell | None:
        """The cell with these settings. Raises UserError where its file is damaged."""
        for file in sorted(self.folder.glob(f"*-{settings_hash}.json")):
            told = read_object(file, _AGAIN)
            whole = told.get("format_version") == FORMAT_VERSION and all(key in told for key in _TOLD)
            if not whole or not file.with_suffix(".parquet").is_file():
                raise UserError(f"{file}: not a whole cell of this version; {_AGAIN}")
            return FinishedCell(file, told)
        return None

    def store(self, name: str, told: dict[str, Any], per_user: Path) -> FinishedCell:
        """Write a cell; its JSON file, which makes it a cell, comes last. Both appear whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name}.json"
        with whole(file.with_suffix(".parquet")) as partial:
            shutil.copyfile(per_user, partial)
        told = {"format_version": FORMAT_VERSION} | told
        write_text(file, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        return FinishedCell(file, told)
