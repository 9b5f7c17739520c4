"""Google Local 2021: places without metadata, without a name, reviews without text or rating, translations."""

import json

import pytest

from userllm.cli import main
from userllm.data import Dataset
from userllm.data.card import RowCounts
from userllm.data.sources.google_local import GOOGLE_LOCAL
from userllm.data.sources.reviews import prepare_reviews
from userllm.data.sources.reviews_config import ReviewsConfig
from userllm.errors import UserError

from .published import REVIEWERS, pack, place, place_review

CAFE, SHOP, PARK = "0x80c2c1:0xbf", "0x80c2c2:0x12", "0x80c2c3:0x77"
TRANSLATED = "(Translated by Google) Very good\n\n(Original)\nMuy bueno &amp; bonito"
ROWS = [
    ("101463350189962023774", CAFE, 5, 1627750414677, TRANSLATED),
    ("101463350189962023774", SHOP, 1, 1627750414100, None),
    ("109", CAFE, None, 1627750414677, "no stars"),
    ("109", PARK, 4, 1627750414677, "Green\nand quiet"),
    ("109", PARK, 4, 1627750414677, "Green\nand quiet"),
]
PLACES = [
    place(CAFE, "Cafe & Bar", ["Coffee shop", "Bar"]), place(SHOP, None, None), place(CAFE, "Again", ["Bar"]),
    place("0x1:0x2", "Not reviewed", ["Park"]),
]  # fmt: skip


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    reviews = [json.dumps(place_review(n, *row)) for n, row in enumerate(ROWS)]
    pack(folder / "review-New_York_10.json.gz", reviews)
    pack(folder / "meta-New_York.json.gz", [json.dumps(one, ensure_ascii=False) for one in PLACES])
    return folder


def prepare(paths, out, **settings) -> Dataset:
    return prepare_reviews(GOOGLE_LOCAL, [str(path) for path in paths], out, ReviewsConfig(**settings))


def test_reviews_and_places(raw, tmp_path):
    dataset = prepare([raw], tmp_path / "out")
    assert dataset.user_ids == ["101463350189962023774", "109"]
    assert dataset.items.drop("item").rows() == [
        (CAFE, "Cafe & Bar", ["Coffee shop", "Bar"]), (SHOP, f"place {SHOP}", []), (PARK, f"place {PARK}", []),
    ]  # fmt: skip
    assert dataset.events["item"].tolist() == [1, 0, 2, 2]  # in order of ms
    assert dataset.events["time"].tolist() == [1627750414] * 4
    assert dataset.event_texts("text", range(3)) == [
        "", TRANSLATED.replace("&amp;", "&"), "Green\nand quiet"
    ]  # fmt: skip
    assert dataset.card.rows == RowCounts(5, 4, 0, {"reviews without a rating": 1})
    assert dataset.card.notes == (
        "Google Local reviews in the form of 2021",
        "1 texts were translated by Google; kept is both sides",
        "1 of 3 items of the reviews have no metadata",
        "2 items have no title and are shown by category and id",
        "1 rows of metadata repeat an item; the first counts",
        "1 events are of a user and an item that had one before, 1 of them at the same second; --repeated first or "
        "last leaves them out",
    )
    assert dataset.card.name == "google-local-new-york"
    everything = b"".join(file.read_bytes() for file in dataset.files.rglob("*") if file.is_file())
    assert b"quiet" in everything
    assert b"Thank you" not in everything
    assert not any(name.encode() in everything for name in REVIEWERS)


@pytest.mark.parametrize(("side", "text"), [("translation", "Very good"), ("original", "Muy bueno & bonito")])
def test_one_side_of_a_translation(raw, tmp_path, side, text):
    dataset = prepare([raw], tmp_path / "out", translated=side)
    assert dataset.event_texts("text", [1]) == [text]
    assert dataset.events["length"].tolist()[1] == {"translation": 2, "original": 4}[side]
    assert f"kept is the {side}" in dataset.card.notes[1]


def test_from_the_command_line(raw, tmp_path, capsys):
    files = [str(raw / "review-New_York_10.json.gz"), str(raw / "meta-*.json.gz")]
    command = ["data", "prepare", "google-local", "--path", *files, "--out", str(tmp_path / "d")]
    assert main([*command, "--translated", "original", "--repeated", "last"]) == 0
    said = capsys.readouterr().out
    assert "2 users, 3 items (3 with events), 3 events" in said
    assert "kept is the original" in said
    (tmp_path / "amazon.json").write_text('{"reviewerID": "A", "asin": "B"}')
    assert main(["data", "prepare", "google-local", "--path", str(tmp_path / "amazon.json")]) == 2
    assert (
        "neither a review nor a place of Google Local's; its keys are reviewerID, asin"
        in capsys.readouterr().err
    )


def test_metadata_alone(raw, tmp_path):
    with pytest.raises(UserError, match="holds metadata and no reviews"):
        prepare([raw / "meta-New_York.json.gz"], tmp_path / "out")
