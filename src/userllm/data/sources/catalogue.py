"""What publishers know of their items: files with one object per item -> titles and categories."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from userllm.data.sources.event_rows import Rejects
from userllm.data.sources.json_rows import HALF, object_of
from userllm.data.sources.list_column import list_column
from userllm.data.sources.raw_files import LineBlocks, Rejected
from userllm.data.sources.review_texts import plain, plain_text

SCRIPT = "getTime"
"""In a title that is a piece of a web page instead (Amazon 2018; its publisher says to look for this)."""
SCHEMA = {"id": pl.String, "title": pl.String, "category": pl.List(pl.String)}


@dataclass(frozen=True)
class ItemForm:
    """One published form of metadata. keys: which name the item, the first that is there. paths: whether categories are
    paths from the general to the special, of which only the end counts."""

    keys: tuple[str, ...]
    title: str
    category: tuple[str, ...]
    paths: bool


class Catalogue:
    """The items of a dataset.

    reviewed: id and group of the items of the reviews, by number. everything: also items that metadata alone names.
    thing: what an item is called of which nothing is known.
    """

    def __init__(self, reviewed: pl.DataFrame, everything: bool, thing: str):
        self.reviewed, self.everything, self.thing = reviewed, everything, thing
        self._frames = [pl.DataFrame(schema=SCHEMA)]
        self._rejected = self._read = self._repeated = self._untitled = self._unknown = 0

    @cached_property
    def _wanted(self) -> set[str]:
        return set(self.reviewed["id"].to_list())

    def read(self, path: Path, form: ItemForm, size: int, rejects: Rejects) -> None:
        """Add a file of metadata. Raises UserError for a row that is none, unless bad rows are left out."""
        key = re.compile(rf"""['"](?:{"|".join(form.keys)})['"]\s*:\s*['"]([^'"]+)['"]""".encode())
        blocks = LineBlocks(path, size)
        for block in blocks:
            rows, bad = [], []
            for line, raw in enumerate(block.split(b"\n"), blocks.line):
                if not raw.strip():
                    continue
                self._read += 1
                if (
                    not self.everything
                ):  # most metadata is of items that are not in the reviews: not worth parsing
                    ids = key.findall(raw)
                    if ids and not any(one.decode(errors="replace") in self._wanted for one in ids):
                        continue
                try:
                    rows.append(_item(object_of(raw), form))
                except UnicodeEncodeError:
                    bad.append(Rejected(str(path), line, HALF))
                except ValueError as error:
                    bad.append(Rejected(str(path), line, str(error)))
            self._rejected += rejects.take(bad)
            ids, titles, categories = zip(*rows, strict=True) if rows else ((), (), ())
            columns = [
                pl.Series("id", ids, dtype=pl.String),
                _titles(pl.Series(titles, dtype=pl.String)),
                list_column("category", categories),
            ]
            self._frames.append(pl.DataFrame(columns))

    def items(self) -> pl.DataFrame:
        """id, title, category: a row per item, those of the reviews first. Of rows about one item the first counts."""
        about = pl.concat(self._frames)
        self._repeated = len(about) - about["id"].n_unique()
        about = about.unique("id", keep="first", maintain_order=True)
        known = self.reviewed.join(about, on="id", how="left", maintain_order="left")
        self._unknown = len(self.reviewed.join(about, on="id", how="anti"))
        if self.everything:
            others = about.join(self.reviewed, on="id", how="anti", maintain_order="left")
            known = pl.concat([known, others], how="diagonal")
        self._untitled = known["title"].null_count()
        own = pl.when(pl.col("category").list.len() > 0).then("category")
        group = (
            pl.when(pl.col("group").is_not_null())
            .then(pl.concat_list("group"))
            .otherwise(pl.lit([], SCHEMA["category"]))
        )
        known = known.with_columns(own.otherwise(group).alias("category"))
        shown = pl.concat_str(
            pl.coalesce(pl.col("category").list.first(), pl.lit(self.thing)), pl.lit(" "), "id"
        )
        return known.select("id", pl.coalesce("title", shown).alias("title"), "category")

    def notes(self, files: int) -> list[str]:
        """What the card has to say of the items, once they are made."""
        total = len(self.reviewed)
        if not files:
            return [f"no metadata was given: all {total:,} items are shown by category and id"]
        notes = (
            [f"{self._unknown:,} of {total:,} items of the reviews have no metadata"] if self._unknown else []
        )
        if self._untitled:
            notes.append(f"{self._untitled:,} items have no title and are shown by category and id")
        if self._repeated:
            notes.append(f"{self._repeated:,} rows of metadata repeat an item; the first counts")
        if self._rejected:
            notes.append(f"{self._rejected:,} of {self._read:,} rows of metadata are rejected")
        return notes


def _titles(column: pl.Series) -> pl.Series:
    """On one line; null where there is none, or a piece of a web page."""
    titles = plain(column).str.replace_all(r"\s+", " ")
    kept = pl.when((titles != "") & ~titles.str.contains(SCRIPT, literal=True)).then(titles)
    return pl.select(kept.alias("title")).to_series()


def _item(value: dict[str, Any], form: ItemForm) -> tuple[str, str | None, list[str]]:
    """(id, title, categories). Raises ValueError where there is no id, or half a character somewhere."""
    name = next((value[key] for key in form.keys if value.get(key) not in (None, "")), None)
    if name is None:
        raise ValueError(f"{form.keys[0]} is missing")
    title = value.get(form.title)
    given = next((value[key] for key in form.category if value.get(key)), None)
    title = title if isinstance(title, str) else None
    categories = dict.fromkeys(plain_text(one).strip() for one in _categories(given, form.paths))
    "\n".join([str(name), title or "", *categories]).encode()
    return str(name), title, [one for one in categories if one]


def _categories(given: Any, paths: bool) -> Iterator[str]:
    """The names, or the ends of paths: of a list, of a list of lists, or one name."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, list) and any(isinstance(one, list) for one in given):
        for one in given:
            yield from _categories(one, paths)
    elif isinstance(given, list):
        names = [one for one in given if isinstance(one, str) and "<" not in one]
        yield from names[-1:] if paths else names
