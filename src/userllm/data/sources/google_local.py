"""Google Local 2021: reviews of places (Li, Shang and McAuley 2022; Yan et al. 2023).

review-STATE.json.gz, review-STATE_10.json.gz, and meta-STATE.json.gz. Which one a file is is told by what is in it.
"""

from __future__ import annotations

import re
from pathlib import Path

from userllm.data.sources.catalogue import ItemForm
from userllm.data.sources.reviews import ItemFile, Publisher, ReviewFile, ReviewForm, first_keys
from userllm.errors import UserError

NAME = "google-local"
REVIEWS = ReviewForm(
    "Google Local reviews in the form of 2021",
    {"user": "user_id", "item": "gmap_id", "time": "time", "rating": "rating", "text": "text"},
    "ms",
)
PLACES = ItemForm(("gmap_id",), "name", ("category",), paths=False)
NAMED = re.compile(r"review-(?P<state>.+?)(?:_10)?\.json(?:\.gz|\.zst)?$")


def recognise(path: Path) -> ReviewFile | ItemFile:
    """What a file is. Raises UserError where it is neither reviews nor places."""
    keys = first_keys(path)
    if "user_id" in keys and "gmap_id" in keys:
        found = NAMED.fullmatch(path.name)
        return ReviewFile(path, REVIEWS, found["state"].replace("_", " ") if found else None)
    if "gmap_id" in keys:
        return ItemFile(path, PLACES)
    raise UserError(
        f"{path} line 1: neither a review nor a place of Google Local's; its keys are {', '.join(keys)[:200]}"
    )


GOOGLE_LOCAL = Publisher(NAME, ("text",), "place", recognise, by_category=False, has_translations=True)
