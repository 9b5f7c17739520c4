"""Amazon's reviews in every form they were published in (McAuley et al. 2015; Ni et al. 2019; Hou et al. 2024).

2014: reviews_X.json.gz, reviews_X_5.json.gz, ratings_X.csv; meta_X.json.gz, whose lines are Python literals.
2018: X.json.gz, X_5.json.gz, X.csv; meta_X.json.gz. 2023: X.jsonl.gz, X.csv.gz; meta_X.jsonl.gz.
Which one a file is is told by what is in it; its name tells the department X, the category of items without another.
"""

from __future__ import annotations

import re
from pathlib import Path

from userllm.data.sources.catalogue import ItemForm
from userllm.data.sources.raw_files import format_of
from userllm.data.sources.reviews import (
    ItemFile,
    Publisher,
    ReviewFile,
    ReviewForm,
    first_keys,
    first_lines,
)
from userllm.errors import UserError

NAME = "amazon"
TEXTS = ("summary", "text")
OLD = ReviewForm(
    "Amazon reviews in the form of 2014 and 2018",
    {
        "user": "reviewerID", "item": "asin", "time": "unixReviewTime", "rating": "overall", "summary": "summary",
        "text": "reviewText",
    },
    "s",
)  # fmt: skip
ITEMS = ItemForm(("parent_asin", "asin"), "title", ("categories", "category"), paths=True)
ASIN = 10
"""Characters of an item's id. A user's is mostly longer."""
NAMED = re.compile(
    r"(?:reviews_|ratings_)?(?P<group>.+?)(?:_5)?(?:\.(?:train|valid|test))?\.(?:jsonl?|csv)(?:\.gz|\.zst)?$"
)
EVERYTHING = {
    "complete",
    "kcore",
    "user_dedup",
    "item_dedup",
    "aggressive_dedup",
    "All_Amazon_Review",
    "All_Amazon",
}


def recognise(path: Path) -> ReviewFile | ItemFile:
    """What a file is. Raises UserError where it is none of the published forms."""
    found = NAMED.fullmatch(path.name)
    group = found["group"] if found and found["group"] not in EVERYTHING else None
    group = group.replace("_", " ") if group else None
    if format_of(path) == "csv":
        return ReviewFile(path, _ratings(path), group)
    keys = first_keys(path)
    named = not {"parent_asin", "asin"}.isdisjoint(keys)
    if "reviewerID" in keys:
        return ReviewFile(path, OLD, group)
    if "user_id" in keys and named:
        return ReviewFile(
            path, _new(csv=False, time="timestamp" if "timestamp" in keys else "sort_timestamp"), group
        )
    if named:
        return ItemFile(path, ITEMS)
    raise UserError(
        f"{path} line 1: neither a review nor an item of Amazon's; its keys are {', '.join(keys)[:200]}"
    )


def _new(csv: bool, time: str) -> ReviewForm:
    columns = {"user": "user_id", "item": "parent_asin", "time": time, "rating": "rating"}
    if csv:
        return ReviewForm("Amazon ratings in the form of 2023", columns, "ms", csv=True)
    return ReviewForm(
        "Amazon reviews in the form of 2023",
        columns | {"summary": "title", "text": "text"},
        "ms",
        other_item="asin",
    )


def _ratings(path: Path) -> ReviewForm:
    """Ratings alone: with a header line in 2023; before, without one, the item first (2018) or the user (2014).

    Raises UserError where the lines do not say which.
    """
    rows = [line.decode(errors="replace").strip().split(",") for line in first_lines(path)]
    if {"user_id", "parent_asin", "rating", "timestamp"} <= set(rows[0]):
        return _new(csv=True, time="timestamp")
    whole = [row for row in rows if len(row) == 4]
    first, second = (sum(len(row[place]) == ASIN for row in whole) > 0.9 * len(whole) for place in (0, 1))
    if first == second:
        raise UserError(
            f"{path}: cannot tell users from items in {','.join(rows[0])[:80]!r}; prepare it with `data prepare table "
            "--header user item rating time`, the columns in their order"
        )
    header = ("item", "user", "rating", "time") if first else ("user", "item", "rating", "time")
    columns = {name: name for name in header}
    return ReviewForm(
        f"Amazon ratings in the form of {2018 if first else 2014}", columns, "s", csv=True, header=header
    )


AMAZON = Publisher(NAME, TEXTS, "product", recognise, by_category=True, has_translations=False)
