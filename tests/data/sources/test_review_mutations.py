"""Damaged reviews and metadata: prepared, with every row accounted for, or refused in one line. Content is invented."""

import csv
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from userllm.data import Dataset
from userllm.data.sources.by_name import REVIEWS as PUBLISHERS
from userllm.data.sources.reviews import prepare_reviews
from userllm.data.sources.reviews_config import ReviewsConfig
from userllm.errors import UserError

from .mutations import mutated
from .published import (
    item_2014,
    item_2018,
    item_2023,
    place,
    place_review,
    review_2014,
    review_2018,
    review_2023,
)

MUTATIONS = 120
TEXTS = [
    "fine", "", "it's \"quoted\"", "two<br />lines &amp; more", "größe \U0001f600", "x" * 400,
    "(Translated by Google) Good\n\n(Original)\nGut", "a \\ backslash, a comma",
]  # fmt: skip
FORMS = {
    "2014": ("reviews_Books_5.json", review_2014, json.dumps, item_2014, repr),
    "loose": ("reviews_Books.json", review_2014, repr, item_2014, repr),
    "2018": ("Books.json", review_2018, json.dumps, item_2018, json.dumps),
    "2023": ("Books.jsonl", review_2023, json.dumps, item_2023, json.dumps),
}


def write(kind: str, random: np.random.Generator) -> tuple[str, bytes, bytes]:
    """The name of the reviews' file, reviews and metadata."""

    def text() -> str:
        return TEXTS[random.integers(len(TEXTS))]

    reviews = [
        (f"A{random.integers(9)}USERNUMBER", f"B{random.integers(12):09}", float(random.integers(1, 6)),
         int(random.integers(10**9)), text(), text())
        for _ in range(int(random.integers(1, 25)))
    ]  # fmt: skip
    about = [
        (f"B{n:09}", text() or None, ["Books", f"Shelf {n % 3}"][: random.integers(3)]) for n in range(10)
    ]
    if kind == "ratings":
        lines = [f"{item},{user},{rating},{time}" for user, item, rating, time, _, _ in reviews]
        return "Books.csv", "\n".join(lines).encode(), b""
    if kind == "places":
        rows = [
            json.dumps(place_review(n, u, i, None if r < 2 else int(r), t * 1000, x or None))
            for n, (u, i, r, t, _, x) in enumerate(reviews)
        ]
        places = [json.dumps(place(i, name, shelves or None)) for i, name, shelves in about]
        return "review-Ohio.json", "\n".join(rows).encode(), "\n".join(places).encode()
    name, review, spelt, item, item_spelt = FORMS[kind]
    rows = [spelt(review(n, one)) for n, one in enumerate(reviews)]
    return name, "\n".join(rows).encode(), "\n".join(item_spelt(item(*one)) for one in about).encode()


def outcome(kind: str, folder: Path, out: Path, **settings) -> Dataset | str:
    publisher = PUBLISHERS["google-local" if kind == "places" else "amazon"]
    files = [str(file) for file in sorted(folder.iterdir())]
    try:
        dataset = prepare_reviews(publisher, files, out, ReviewsConfig(**settings))
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 1000
        assert any(Path(file).name in message for file in files) or "there are no events" in message, message
        return message
    counts = dataset.card.rows
    assert counts.read == counts.kept + counts.rejected + sum(counts.filtered.values())
    assert counts.kept == dataset.num_events
    rejects, written = dataset.files / "rejects.csv", []
    if rejects.exists():
        with open(rejects, newline="", encoding="utf-8") as lines:
            written = list(csv.DictReader(lines))
    assert all(int(bad["line"]) >= 1 and bad["reason"] and bad["file"] in files for bad in written)
    metadata = [bad for bad in written if Path(bad["file"]).name.startswith("meta")]
    assert len(written) - len(metadata) == counts.rejected
    said = [note for note in dataset.card.notes if "rows of metadata are rejected" in note]
    assert [note.split()[0] for note in said] == ([str(len(metadata))] if metadata else [])
    assert dataset.items["title"].null_count() == 0
    assert (dataset.items["title"] != "").all()
    return dataset


@pytest.mark.slow  # 720 files, each prepared three times: a minute of CPU
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["2014", "loose", "2018", "2023", "ratings", "places"])
def test_mutated_files(kind, tmp_path):
    """Prepared, with every row accounted for and the same in one block or many; or refused in one line."""
    folder = tmp_path / "raw"
    prepared = rejected = 0
    for seed in range(MUTATIONS):
        random = np.random.default_rng([seed, len(kind)])
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        name, reviews, about = write(kind, random)
        packed = random.integers(3) == 0
        if about and random.integers(3) == 0:
            about = mutated(about, random)
        elif not packed or random.integers(2):
            reviews = mutated(reviews, random)
        else:
            reviews = mutated(gzip.compress(reviews), random)
            packed = False
            name += ".gz"
        (folder / (name + ".gz" * bool(packed))).write_bytes(gzip.compress(reviews) if packed else reviews)
        if about:
            (folder / f"meta_{name.removesuffix('.gz')}").write_bytes(about)
        found = outcome(kind, folder, tmp_path / "out", on_bad_rows="skip")
        small = outcome(kind, folder, tmp_path / "small", on_bad_rows="skip", memory="4kB")
        strict = outcome(kind, folder, tmp_path / "strict")
        if isinstance(found, str):
            assert isinstance(small, str), (seed, found)
            assert isinstance(strict, str), (seed, found)
            continue
        prepared += 1
        bad = (found.files / "rejects.csv").exists()
        rejected += bad
        assert isinstance(small, Dataset), (seed, small)
        assert small.card.fingerprint == found.card.fingerprint, seed
        assert small.card.rows == found.card.rows, seed
        assert small.card.notes == found.card.notes, seed
        assert small.items.equals(found.items), seed
        assert isinstance(strict, str) == bad, (seed, strict)
        if not name.endswith(".gz") and kind != "ratings":
            lines = reviews.removeprefix(b"\xef\xbb\xbf").split(b"\n")
            assert found.card.rows.read == sum(bool(line.strip()) for line in lines), seed
        for one in ("out", "small", "strict"):
            assert not any(left.startswith(f".{one}.") for left in os.listdir(tmp_path))
    assert prepared > 30
    assert rejected > 10
