"""Descriptions of MovieLens movies from a table of the user's own: a CSV file with movieId and overview.

MovieLens numbers its movies alike in the releases 1M, 10M, 20M, 25M, 32M and latest; 100K has numbers of its own.
RecBole's copy of 1M has lost the numbers: its catalogue keeps the order of movies.dat, whose numbers run from 1 to 3952
with the gaps below.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from pathlib import Path

import polars as pl

from userllm.errors import UserError

ID, TEXT = "movieId", "overview"
_GAPS = """
91 221 323 622 646 677 686 689 740 817 883 995 1048 1072 1074 1182 1195 1229 1239 1338 1402 1403 1418 1435 1451 1452
1469 1478 1481 1491 1492 1505 1506 1512 1521 1530 1536 1540 1560 1576 1607 1618 1634 1637 1638 1691 1700 1712 1736 1737
1745 1751 1761 1763 1766 1775 1778 1786 1790 1800 1802 1803 1808 1813 1818 1823 1828 1838 3815
"""
NOT_IN_1M = frozenset(int(number) for number in _GAPS.split())
"""Numbers up to 3952 that no movie of the 1M release has."""


def with_descriptions(items: pl.DataFrame, file: Path) -> pl.DataFrame:
    """The catalogue with a column ``description``, null where the file has none.

    Raises UserError where the file is no such table, or has a description of none of these movies.
    """
    texts = read_descriptions(file)
    numbers = items["id"].to_list()
    if not all(number.isdecimal() for number in numbers):
        if numbers != items["title"].to_list() or len(numbers) != 3952 - len(NOT_IN_1M):
            raise UserError(
                f"{file}: these movies go by {numbers[0]!r}, not by MovieLens's numbers; "
                "give an original copy of the release"
            )
        numbers = [str(number) for number in range(1, 3953) if number not in NOT_IN_1M]
    column = [texts.get(number) for number in numbers]
    if not any(column):
        raise UserError(f"{file}: none of its movies is in the catalogue, whose first is number {numbers[0]}")
    return items.with_columns(pl.Series("description", column, dtype=pl.String))


def read_descriptions(file: Path) -> dict[str, str]:
    """Texts by movie number, from a CSV file, gzipped or not; empty ones are left out.

    Raises UserError naming file and line for anything that is not such a table.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file of descriptions")
    opened = gzip.open if file.suffix == ".gz" else open
    texts: dict[str, str] = {}
    try:
        with opened(file, "rt", encoding="utf-8", newline="") as lines:
            rows = csv.reader(lines, strict=True)
            header = next(rows, [])
            if ID not in header or TEXT not in header:
                raise UserError(
                    f"{file} line 1: the columns are {', '.join(header)}; {ID} and {TEXT} are needed"
                )
            for row in rows:
                if len(row) != len(header):
                    raise UserError(f"{file} line {rows.line_num}: {len(row)} fields, expected {len(header)}")
                number, text = row[header.index(ID)].strip(), " ".join(row[header.index(TEXT)].split())
                if not number.isdecimal():
                    raise UserError(f"{file} line {rows.line_num}: {ID} is {number!r}, not a whole number")
                if text:
                    texts[str(int(number))] = text
    except (csv.Error, UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: not a readable CSV file in UTF-8 ({error})") from error
    return texts
