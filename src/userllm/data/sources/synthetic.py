"""A small generated dataset for smoke runs: it needs no network, and numbers made with it mean nothing.

Every user prefers one genre and, within it, moves on to neighbouring titles, so that there is something to learn.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import polars as pl

from userllm.data.sources.movielens import FIELDS
from userllm.data.store import Dataset, Source, write_dataset

RELEASE = "synthetic"
GENRES = ("Action", "Comedy", "Drama", "Horror", "Musical", "Western")
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
