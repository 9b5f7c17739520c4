"""Rent the Runway in the publisher's form and in the package's, with awkward rows."""

import csv
import gzip
import json

import numpy as np
import pytest

from userllm.cli import main
from userllm.data.sources.rent_the_runway import COLUMNS, prepare_rent_the_runway
from userllm.data.store import Dataset
from userllm.errors import UserError

BODY = {
    "weight": "137lbs",
    "height": "5' 8\"",
    "bust size": "34d",
    "age": "28",
    "body type": "athletic",
    "size": 14,
}
ROWS = [
    ("u1", "i1", "romper", "10", "April 20, 2016", "So many compliments!", " I loved it,\n all of it. "),
    ("u2", "i1", "romper", "8", "April 2, 2014", None, 'It says "L", it is "S".'),
    ("u1", "i2", "gown", None, "May 1, 2016", "unrated", "never mind"),
    ("u1", "i3", "gown", "4", "June 18, 2013", "", "Too long; señora"),
    ("u1", "i1", "jumpsuit", "6", "April 20, 2016", "again", None),
    ("u2", "i1", "romper", "2", "January 8, 2018", "no", "no"),
]  # fmt: skip


def records():
    return [
        {name: value for name, value in zip(COLUMNS, row, strict=True) if value is not None}
        | {"fit": "fit", "rented for": "party"}
        | BODY
        for row in ROWS
    ]


def write(folder, form):
    lines = "".join(json.dumps(row) + "\n" for row in records())
    file = folder / f"renttherunway_final_data.{form}"
    if form == "json":
        file.write_text(lines + "\n", encoding="utf-8")
    elif form == "json.gz":
        file.write_bytes(gzip.compress(lines.encode()))
    else:
        with open(file, "w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, ["", *records()[0], "review_summary"], restval="")
            writer.writeheader()
            for number, row in enumerate(records()):
                writer.writerow({"": number} | row)
    return file


@pytest.mark.parametrize("form", ["json", "json.gz", "csv"])
def test_every_form_gives_the_same_dataset(tmp_path, form):
    dataset = prepare_rent_the_runway(write(tmp_path, form), tmp_path / "out")
    assert dataset.user_ids == ["u1", "u2"]
    assert dataset.items.select("id", "title", "category").rows() == [
        ("i1", "romper i1", "romper"),
        ("i3", "gown i3", "gown"),
    ]
    assert dataset.offsets.tolist() == [0, 3, 5]
    assert dataset.events["item"].tolist() == [1, 0, 0, 0, 0]
    assert dataset.events["rating"].tolist() == [4, 10, 6, 8, 2]
    assert dataset.event_texts("text", range(5)) == [
        "Too long; señora", "I loved it,\n all of it.", "", 'It says "L", it is "S".', "no"
    ]  # fmt: skip
    assert dataset.event_texts("summary", [0, 1, 3]) == ["", "So many compliments!", ""]
    assert dataset.events["length"].tolist() == [3, 6, 0, 6, 1]
    assert np.diff(dataset.events["time"][:3]).tolist() == [1037 * 86400, 0]
    assert (dataset.card.rows.read, dataset.card.rows.filtered) == (6, {"reviews without a rating": 1})
    told = (tmp_path / "out" / "card.json").read_text() + "".join(dataset.items.columns)
    assert not any(name in told for name in BODY)
    everything = b"".join(file.read_bytes() for file in dataset.files.rglob("*") if file.is_file())
    assert b"137lbs" not in everything and b"athletic" not in everything
    assert Dataset.open(tmp_path / "out").card.fingerprint == dataset.card.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rating": "ten"}, "row 2: rating is 'ten', not a number"),
        ({"item_id": None}, "row 2: item_id is missing"),
        ({"review_date": "2014-04-02"}, "review_date '2014-04-02' is not like"),
        ({"review_text": "half \ud83d"}, "line 2: half of a surrogate pair"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    rows = records()
    rows[1] |= change
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        prepare_rent_the_runway(file, tmp_path / "out")


@pytest.mark.parametrize("rating", [float("nan"), float("inf"), "NaN"])
def test_a_rating_that_is_no_finite_number_is_none(tmp_path, rating):
    rows = records()
    rows[1] |= {"rating": rating}
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = prepare_rent_the_runway(file, tmp_path / "out")
    assert dataset.card.rows.filtered == {"reviews without a rating": 2}
    assert np.isfinite(dataset.events["rating"]).all()


def test_a_damaged_copy_is_named(tmp_path):
    whole = write(tmp_path, "json.gz").read_bytes()
    for name, content, message in (
        ("cut.json.gz", whole[: len(whole) // 2], "damaged or truncated"),
        ("word.json", b"nothing\n", "line 1: not a JSON object"),
        ("list.json", b"[1]\n", "line 1: not a JSON object"),
        ("empty.json", b"", "holds no reviews"),
        ("other.csv", b"a,b\n1,2\n", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            prepare_rent_the_runway(tmp_path / name, tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        prepare_rent_the_runway(tmp_path / "absent.json", tmp_path / "out")


def test_from_the_command_line(tmp_path, capsys):
    file = write(tmp_path, "csv")
    assert (
        main(["data", "prepare", "rent-the-runway", "--path", str(file), "--out", str(tmp_path / "d")]) == 0
    )
    assert main(["data", "inspect", str(tmp_path / "d"), "--user", "u1"]) == 0
    said = capsys.readouterr().out
    assert "2 users, 2 items (2 with events), 5 events" in said
    assert "6 read = 5 kept + 0 rejected + 1 filtered (1 by reviews without a rating)" in said
    assert "2016-04-20  rating 10  length 6  romper i1  [romper]" in said
