"""Small generated datasets for smoke runs: they need no network, and numbers made with them mean nothing.

In "synthetic" every user prefers one genre and, within it, moves on to neighbouring titles, so that there is something
to learn. In "synthetic-reviews" everybody has a kind of thing, a length and a phrase of their own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import polars as pl

from userllm.data.sources import rent_the_runway
from userllm.data.sources.movielens import FIELDS
from userllm.data.store import Dataset, Source, write_dataset
from userllm.data.text_length import LENGTH, text_lengths

RELEASE = "synthetic"
REVIEWS = "synthetic-reviews"
GENRES = ("Action", "Comedy", "Drama", "Horror", "Musical", "Western")
KINDS = ("coat", "dress", "gown", "skirt")
_MOODS = ("It fell apart.", "It hardly fits.", "It is fine.", "It fits well.", "I love it.")
_PHRASES = (
    "Warm and soft.",
    "My sister agrees.",
    "Worn at a wedding.",
    "Too long for me.",
    "Many compliments.",
)
_WORDS = ("Silver", "River", "Night", "Garden", "Letter", "Winter", "Harbour", "Mirror", "Summer", "Tower")


def prepare_synthetic(out: Path, users: int = 150, items: int = 60, seed: int = 0) -> Dataset:
    """Write the dataset, named "synthetic", into ``out``. 15 to 60 events a user."""
    random = np.random.default_rng(seed)
    genre = np.arange(items) % len(GENRES)
    titles = [f"{_WORDS[i % 10]} {_WORDS[(i * 7 + i // 10) % 10]} {i}" for i in range(items)]
    rows = []
    for user in range(users):
        own = np.flatnonzero(genre == random.integers(len(GENRES)))
        place = int(random.integers(len(own)))
        for event in range(int(random.integers(15, 60))):
            if random.random() < 0.7:
                place = (place + 1) % len(own)
                item = int(own[place])
            else:
                item = int(random.integers(items))
            rows.append((user, item, 1_000_000_000 + 86_400 * event, float(random.integers(1, 6))))
    events = pl.DataFrame(rows, schema=["user", "item", "time", "rating"], orient="row")
    catalogue = pl.DataFrame(
        {
            "id": [str(i) for i in range(items)],
            "title": titles,
            "genres": [[GENRES[g]] for g in genre],
            "year": [None] * items,
        },
        schema={"id": pl.String, "title": pl.String, "genres": pl.List(pl.String), "year": pl.Int32},
    )
    names = pl.DataFrame({"id": [str(u) for u in range(users)]})
    digest = hashlib.sha256(repr((users, items, seed)).encode()).hexdigest()
    source = Source("generated", f"{users} users, {items} items, seed {seed}", "none", digest, "generator")
    return write_dataset(out, events, catalogue, names, name=RELEASE, source=source, fields=FIELDS)


def prepare_synthetic_reviews(out: Path, users: int = 60, items: int = 40, seed: int = 0) -> Dataset:
    """Write the dataset, named "synthetic-reviews", into ``out``: Rent the Runway's fields, 6 to 12 reviews a user."""
    random = np.random.default_rng(seed)
    kinds = [KINDS[item % len(KINDS)] for item in range(items)]
    rows = []
    for user in range(users):
        own, phrase = int(random.integers(len(KINDS))), _PHRASES[int(random.integers(len(_PHRASES)))]
        sentences = int(random.integers(1, 4))
        for event in range(int(random.integers(6, 13))):
            item = int(random.integers(items))
            if random.random() < 0.7:
                item += own - item % len(KINDS)
            mood = int(random.integers(len(_MOODS)))
            text = " ".join([_MOODS[mood], phrase, f"A {kinds[item]} to remember."][:sentences])
            rows.append(
                (user, item, 1_000_000_000 + 86_400 * event, 2.0 * (mood + 1), f"{kinds[item]} {event}", text)
            )
    names = ["user", "item", "time", "rating", "summary", "text"]
    events = pl.DataFrame(rows, schema=names, orient="row").with_columns(pl.col("rating").cast(pl.Float32))
    catalogue = pl.DataFrame(
        {
            "id": [str(item) for item in range(items)],
            "title": [f"{kind} {item}" for item, kind in enumerate(kinds)],
            "category": kinds,
        }
    )
    ids = pl.DataFrame({"id": [str(user) for user in range(users)]})
    digest = hashlib.sha256(repr((REVIEWS, users, items, seed)).encode()).hexdigest()
    source = Source("generated", f"{users} users, {items} items, seed {seed}", "none", digest, "generator")
    return write_dataset(
        out, events.with_columns(text_lengths(events["text"]).alias(LENGTH)), catalogue, ids,
        name=REVIEWS, source=source, fields=rent_the_runway.FIELDS,
    )  # fmt: skip
