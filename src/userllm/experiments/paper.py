"""The papers' tables as data: paper.yaml, checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from userllm.errors import UserError


@dataclass(frozen=True)
class PaperTable:
    """A table of the papers: figures by row and column, None where the paper has none."""

    name: str
    """Version and table, "v1 T2"."""
    title: str
    unit: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]
    not_redone: str | None = None
    """Why no experiment stands beside it; None where one should."""

    def figure(self, row: str, column: str) -> float | None:
        """Raises UserError for an unknown row or column."""
        if row not in self.rows or column not in self.columns:
            raise UserError(f"paper.yaml: {self.name} has no row {row!r} or no column {column!r}")
        return self.rows[row][self.columns.index(column)]


@cache
def paper_tables() -> dict[str, PaperTable]:
    """Every table, by name. Raises ValueError where a row has more or fewer figures than there are columns."""
    told = yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))
    tables = {}
    for name, table in told.items():
        rows = {row: tuple(values) for row, values in table["rows"].items()}
        if bad := [row for row, values in rows.items() if len(values) != len(table["columns"])]:
            raise ValueError(f"paper.yaml: {name}: {bad[0]}: {len(rows[bad[0]])} figures")
        columns, reason = tuple(table["columns"]), table.get("not_redone")
        tables[name] = PaperTable(name, table["title"], table["unit"], columns, rows, reason)
    return tables


def paper_figure(table: str, row: str, column: str) -> float | None:
    """One figure. Raises UserError where there is no such table, row or column."""
    if table not in paper_tables():
        raise UserError(f"paper.yaml: no table {table!r}")
    return paper_tables()[table].figure(row, column)
