"""Amazon's reviews in each form they were published in: one dataset, whatever the form."""

import csv
import json

import pytest

from userllm.cli import main
from userllm.data import Dataset
from userllm.data.card import RowCounts
from userllm.data.sources.amazon import AMAZON
from userllm.data.sources.by_name import prepare as prepare_by_name
from userllm.data.sources.reviews import prepare_reviews
from userllm.data.sources.reviews_config import ReviewsConfig
from userllm.errors import UserError

from .published import (
    ITEMS,
    REVIEWERS,
    REVIEWS,
    item_2014,
    pack,
    review_2018,
    write_2014,
    write_2018,
    write_2023,
)

FORMS = {"2014": write_2014, "2018": write_2018, "2023": write_2023}


def prepare(paths, out, **settings) -> Dataset:
    return prepare_reviews(AMAZON, [str(path) for path in paths], out, ReviewsConfig(**settings))


@pytest.fixture(params=FORMS)
def raw(request, tmp_path):
    """A folder with reviews and metadata in each form in turn."""
    folder = tmp_path / "raw"
    folder.mkdir()
    FORMS[request.param](folder)
    return folder


def test_every_form_gives_the_same_dataset(raw, tmp_path):
    dataset = prepare([raw], tmp_path / "out")
    assert dataset.user_ids == ["A2SUAM1J3GNN3B", "A14VAT5EAX3D9S"]
    assert dataset.items.drop("item").rows() == [
        ("0000031852", "Girls Ballet Tutu Zebra & Pink", ["Dance"]),
        ("B00004Y2UT", "Strings & Things B00004Y2UT", ["Strings & Things"]),
        ("B000068O59", "Toys and Games B000068O59", ["Toys and Games"]),
    ]
    assert dataset.offsets.tolist() == [0, 3, 5]
    assert dataset.events["item"].tolist() == [1, 0, 2, 1, 1]
    assert dataset.events["time"].tolist() == [1252713600, *[1252800000] * 4]
    assert dataset.events["rating"].tolist() == [4, 5, 3, 2, 2]
    assert dataset.events["length"].tolist() == [2, 4, 4, 0, 0]
    assert dataset.event_texts("summary", range(5)) == ["fine", "Tom & Jerry", "so so", "", ""]
    assert dataset.event_texts("text", range(3)) == [
        "AT&T, señora", 'I like it.\n\nTwice "so".', "It does what it says"
    ]  # fmt: skip
    assert dataset.card.rows == RowCounts(5, 5)
    notes = "; ".join(dataset.card.notes)
    assert (
        "1 of 3 items of the reviews have no metadata; 2 items have no title and are shown by category and id"
        in notes
    )
    assert ("1 rows of metadata repeat an item; the first counts" in notes) == (
        raw / "Toys_and_Games_5.json.gz"
    ).exists()
    assert "1 events are of a user and an item that had one before, 1 of them at the same second" in notes
    assert dataset.card.name == "amazon-toys-and-games"
    everything = b"".join(file.read_bytes() for file in dataset.files.rglob("*") if file.is_file())
    assert b"Twice" in everything
    assert not any(name.encode() in everything for name in REVIEWERS)


def test_one_fingerprint(tmp_path):
    prints = set()
    for name, write in FORMS.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        prints.add(prepare([tmp_path / name], tmp_path / "out", memory="2kB").card.fingerprint)
    assert len(prints) == 1


def test_filters_are_the_tables(raw, tmp_path):
    once = prepare([raw], tmp_path / "once", repeated="first", at_least=["rating:3"], min_user_events=2)
    assert once.card.rows.filtered == {
        "rating below 3": 2,
        "repeated pairs of user and item, all but the first": 0,
        "users with fewer than 2 events": 0,
    }
    assert once.num_events == 3
    assert "no user has an item twice" in once.card.notes
    popular = prepare([raw], tmp_path / "popular", min_item_events=2)
    assert popular.items["id"].to_list() == ["B00004Y2UT"]
    late = prepare([raw], tmp_path / "late", after="2009-09-13")
    assert late.card.rows.filtered == {"time before 2009-09-13 on".replace(" on", ""): 1}


def test_the_whole_catalogue(raw, tmp_path):
    dataset = prepare([raw], tmp_path / "out", catalogue="all")
    assert dataset.items["id"].to_list() == ["0000031852", "B00004Y2UT", "B000068O59", "B0NOREVIEW"]
    assert dataset.items["title"][3] == "Never reviewed"
    assert dataset.events["item"].max() == 2


@pytest.mark.parametrize("form", ["2014", "2018", "2023"])
def test_ratings_alone(form, tmp_path):
    """2014: user, item, rating, time. 2018: the item first. 2023: with a header, in ms."""
    columns = {"2014": "{0},{1},{2},{3}", "2018": "{1},{0},{2},{3}", "2023": "{0},{1},{2},{3}007"}[form]
    name = {
        "2014": "ratings_Toys_and_Games.csv",
        "2018": "Toys_and_Games.csv",
        "2023": "Toys_and_Games.csv.gz",
    }[form]
    header = ["user_id,parent_asin,rating,timestamp"] if form == "2023" else []
    file = pack(tmp_path / name, [*header, *(columns.format(*row) for row in REVIEWS)])
    dataset = prepare([file], tmp_path / "out")
    assert dataset.user_ids == ["A2SUAM1J3GNN3B", "A14VAT5EAX3D9S"]
    assert [spec.name for spec in dataset.card.fields] == ["item", "rating", "category", "title"]
    assert dataset.events["rating"].tolist() == [4, 5, 3, 2, 2]
    assert dataset.events["time"].tolist() == [1252713600, *[1252800000] * 4]
    assert dataset.items["title"][0] == "Toys and Games 0000031852"
    assert f"Amazon ratings in the form of {form}" in dataset.card.notes
    assert "no metadata was given: all 3 items are shown by category and id" in dataset.card.notes


def test_reviews_that_are_python_literals(tmp_path):
    """As some copies of the raw files of 2014 are. What is in them is never run."""
    rows = [review_2018(n, one) | {"reviewText": 'say "it\'s" \\d'} for n, one in enumerate(REVIEWS)]
    file = pack(tmp_path / "reviews_Toys_and_Games.json.gz", map(repr, rows))
    assert prepare([file], tmp_path / "out").event_texts("text", [0]) == ['say "it\'s" \\d']
    bad = "{'reviewerID': __import__('os').abort(), 'asin': 'B000000000'}"
    pack(file, [*map(repr, rows), bad])
    with pytest.raises(
        UserError, match=r"json\.gz line 6: neither JSON nor a Python literal \(malformed node"
    ):
        prepare([file], tmp_path / "out")


def test_several_departments(tmp_path):
    """An item that two departments have belongs to the first."""
    rows = [json.dumps(review_2018(n, one)) for n, one in enumerate(REVIEWS)]
    first, second = pack(tmp_path / "Books.json", rows[:1]), pack(tmp_path / "Video_Games_5.json.gz", rows)
    dataset = prepare([first, second], tmp_path / "out")
    assert dataset.items["category"].to_list() == [["Books"], ["Video Games"], ["Video Games"]]
    assert dataset.card.name == "amazon"
    assert dataset.num_events == 6
    everything = pack(tmp_path / "All_Amazon_Review.json.gz", rows)
    dataset = prepare([everything], tmp_path / "out")
    assert dataset.items["category"].to_list() == [[], [], []]
    assert dataset.items["title"][0] == "product 0000031852"


def test_bad_rows(tmp_path):
    lines = [json.dumps(review_2018(n, one)) for n, one in enumerate(REVIEWS)]
    rows = [json.loads(line) for line in lines]
    bad = [
        rows[0] | {"overall": "five"}, rows[0] | {"reviewerID": ""}, rows[0] | {"unixReviewTime": None},
        {name: value for name, value in rows[0].items() if name != "overall"},
    ]  # fmt: skip
    file = pack(tmp_path / "Books.json.gz", [*lines[:2], "{", *map(json.dumps, bad), "", *lines[2:]])
    with pytest.raises(UserError, match=r"Books\.json\.gz line 3: not JSON"):
        prepare([file], tmp_path / "out")
    dataset = prepare([file], tmp_path / "out", on_bad_rows="skip")
    assert dataset.card.rows == RowCounts(10, 5, 4, {"reviews without a rating": 1})
    with open(dataset.files / "rejects.csv", newline="") as rejects:
        found = [(int(row["line"]), row["reason"]) for row in csv.DictReader(rejects)]
    assert found[1:] == [
        (4, "overall is 'five', not a number"), (5, "reviewerID is missing"), (6, "unixReviewTime is missing"),
    ]  # fmt: skip
    assert found[0][0] == 3


def test_bad_metadata(tmp_path):
    reviews = pack(tmp_path / "Books.json", [json.dumps(review_2018(0, one)) for one in REVIEWS])
    items = [repr(item_2014(i, *about)) for i, about in ITEMS.items()]
    bad = [
        "{'asin': 'B00004Y2UT', 'title': open('x')}",
        '{"title": "nobody\'s"}',
        '{"asin": "B00004Y2UT", "title": "\\ud800"}',
    ]
    about = pack(tmp_path / "meta_Books.json.gz", [*bad, *items])
    with pytest.raises(UserError, match=r"meta_Books\.json\.gz line 1: neither JSON nor a Python literal"):
        prepare([reviews, about], tmp_path / "out")
    dataset = prepare([reviews, about], tmp_path / "out", on_bad_rows="skip")
    assert "3 of 6 rows of metadata are rejected" in dataset.card.notes
    assert dataset.card.rows == RowCounts(5, 5)
    assert len((dataset.files / "rejects.csv").read_text().splitlines()) == 4
    assert dataset.items["title"][1] == "Strings & Things B00004Y2UT"


def test_what_cannot_be_is_said(tmp_path):
    write_2018(tmp_path)
    reviews, about = tmp_path / "Toys_and_Games_5.json.gz", tmp_path / "meta_Toys_and_Games.json.gz"
    cases = [
        ([about], {}, "holds metadata and no reviews"),
        ([tmp_path / "nowhere"], {}, "nowhere: no such file"),
        ([reviews], {"translated": "original"}, "amazon has no translated texts"),
    ]
    for name, content, message in (
        (
            "other.json",
            '{"a": 1}',
            "other.json line 1: neither a review nor an item of Amazon's; its keys are a",
        ),
        ("words.json", "nothing", "words.json line 1: not JSON"),
        ("empty.json", "\n", "empty.json: is empty"),
        ("odd.csv", "a,b,3,4", "odd.csv: cannot tell users from items in 'a,b,3,4'"),
        ("log.txt", "x", "neither"),
    ):
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd" / name).write_text(content)
        cases.append(
            ([tmp_path / "odd" / name], {}, message if name != "log.txt" else "log.txt line 1: not JSON")
        )
    for paths, settings, message in cases:
        with pytest.raises(UserError) as caught:
            prepare(paths, tmp_path / "out", **settings)
        assert message in str(caught.value)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "README.md").write_text("hello")
    with pytest.raises(UserError, match=r"holds no \.json, \.jsonl or \.csv files"):
        prepare([tmp_path / "none"], tmp_path / "out")
    pack(tmp_path / "Toys_and_Games.json.gz", ['{"reviewerID": "A", "asin": "B"}'])
    for name in ("other.json", "words.json", "empty.json", "odd.csv"):
        (tmp_path / "odd" / name).unlink()
    (tmp_path / "odd" / "log.txt").unlink()
    with pytest.raises(
        UserError, match=r"are both reviews of Toys and Games, and one may be part of the other"
    ):
        prepare([tmp_path], tmp_path / "out")
    with pytest.raises(UserError, match="amazon is not found by itself"):
        prepare_by_name("amazon", [], tmp_path / "out")
    with pytest.raises(
        UserError, match="settings of reviews are for amazon and google-local, not for movielens"
    ):
        prepare_by_name("movielens", [], tmp_path / "out", reviews=ReviewsConfig())
    with pytest.raises(UserError, match="at_least 'length:4'"):
        ReviewsConfig(at_least=["length:4"])
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(tmp_path, capsys):
    write_2014(tmp_path)
    command = ["data", "prepare", "amazon", "--path", str(tmp_path), "--out", str(tmp_path / "d")]
    assert main([*command, "--repeated", "first", "--catalogue", "all"]) == 0
    assert main(["data", "inspect", str(tmp_path / "d"), "--user", "A2SUAM1J3GNN3B"]) == 0
    said = capsys.readouterr().out
    assert "2 users, 4 items (3 with events), 4 events" in said
    assert "5 read = 4 kept + 0 rejected + 1 filtered (1 by repeated pairs" in said
    assert "notes:       Amazon reviews in the form of 2014 and 2018; " in said
    assert "2009-09-13  rating 5  length 4  Girls Ballet Tutu Zebra & Pink  [Dance]" in said
    assert main([*command, "--user", "reviewerID"]) == 2
    assert "--user means nothing to amazon" in capsys.readouterr().err
    assert main(["data", "prepare", "movielens", "--path", str(tmp_path), "--after", "2010-01-01"]) == 2
    assert "--after means nothing to movielens" in capsys.readouterr().err
