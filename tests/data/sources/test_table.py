"""Anyone's table: every format gives the same dataset, filters and bad rows are counted, append equals all at once."""

import csv
import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from userllm.data import Dataset
from userllm.data.sources.table import append_table, prepare_table
from userllm.data.sources.table_config import ItemsConfig, TableConfig
from userllm.errors import UserError

NAMES = ["who", "what", "when", "stars", "words"]
CONFIG = TableConfig(
    path=["?"], user="who", item="what", time="when", time_unit="s", fields=["stars:number"], text=["words"]
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=6)
IDS = st.one_of(st.integers(0, 12).map(str), TEXTS.filter(bool))
ROWS = st.lists(
    st.tuples(IDS, IDS, st.integers(-50, 50), st.sampled_from([0.5, 1, 2, 4, 5]), TEXTS),
    min_size=1,
    max_size=25,
)
OFTEN = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_csv(file: Path, rows, separator: str = ",") -> Path:
    with open(file, "w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, delimiter=separator)
        writer.writerow(NAMES)
        writer.writerows(rows)
    return file


def write_jsonl(file: Path, rows) -> Path:
    lines = [json.dumps(dict(zip(NAMES, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), encoding="utf-8", newline="")
    return file


def write_parquet(file: Path, rows) -> Path:
    pl.DataFrame(list(rows), schema=NAMES, orient="row").write_parquet(file)
    return file


def expected(rows) -> list[tuple]:
    """Events in the order a dataset has to have, in twenty lines of plain Python."""
    users = list(dict.fromkeys(row[0] for row in rows))
    ordered = sorted(range(len(rows)), key=lambda n: (users.index(rows[n][0]), rows[n][2], n))
    return [(*rows[n][:3], float(rows[n][3]), rows[n][4]) for n in ordered]


def events_of(dataset: Dataset) -> list[tuple]:
    texts = dataset.event_texts("words", range(dataset.num_events))
    user = np.repeat(np.arange(dataset.num_users), dataset.lengths)
    return [
        (dataset.user_ids[user[n]], dataset.item_ids[dataset.events["item"][n]], int(dataset.events["time"][n]),
         float(dataset.events["stars"][n]), texts[n])
        for n in range(dataset.num_events)
    ]  # fmt: skip


@settings(OFTEN, max_examples=8)
@given(ROWS)
def test_every_format_gives_the_same_dataset(tmp_path, rows):
    plain = write_csv(tmp_path / "log.csv", rows)
    first = prepare_table(replace(CONFIG, path=[str(plain)]), tmp_path / "out")
    assert events_of(first) == expected(rows)
    assert first.items["title"].to_list() == first.item_ids
    packed = tmp_path / "log.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    zst = tmp_path / "log.csv.zst"
    half = len(plain.read_bytes()) // 2
    frames = [plain.read_bytes()[:half], plain.read_bytes()[half:]]
    zst.write_bytes(b"".join(zstandard.compress(part) for part in frames))
    others = [
        packed,
        zst,
        write_jsonl(tmp_path / "log.jsonl", rows),
        write_parquet(tmp_path / "log.parquet", rows),
    ]
    if not any(set('\t\n"') & set(text) for row in rows for text in (row[0], row[1], row[4])):
        others.append(write_csv(tmp_path / "log.tsv", rows, "\t"))
    for file in others:
        dataset = prepare_table(replace(CONFIG, path=[str(file)]), tmp_path / "out")
        assert dataset.card.fingerprint == first.card.fingerprint, file
        assert dataset.user_ids == first.user_ids
        assert dataset.item_ids == first.item_ids
        assert dataset.card.rows.read == dataset.card.rows.kept == len(rows)


@OFTEN
@given(ROWS, st.sampled_from(["1kB", "4kB", "100kB"]))
def test_memory_changes_nothing(tmp_path, rows, memory):
    """Blocks of a few bytes, and users sorted a few at a time."""
    file = write_csv(tmp_path / "log.csv", rows)
    dataset = prepare_table(replace(CONFIG, path=[str(file)], memory=memory), tmp_path / "out")
    assert events_of(dataset) == expected(rows)


@OFTEN
@given(ROWS, ROWS)
def test_appending_is_preparing_all_at_once(tmp_path, rows, more):
    # one is CSV and one JSON, so that they differ where the rows are the same: a file is appended once
    one, two = write_csv(tmp_path / "1.csv", rows), write_jsonl(tmp_path / "2.jsonl", more)
    dataset = prepare_table(replace(CONFIG, path=[str(one)]), tmp_path / "grown")
    old_items, old_users = dataset.item_ids, dataset.user_ids
    grown = append_table(tmp_path / "grown", [str(two)])
    whole = prepare_table(replace(CONFIG, path=[str(one), str(two)]), tmp_path / "whole")
    assert grown.card.fingerprint == whole.card.fingerprint
    assert events_of(grown) == expected(rows + more)
    assert grown.item_ids[: len(old_items)] == old_items
    assert grown.user_ids[: len(old_users)] == old_users
    assert grown.card.rows == whole.card.rows


def enough(rows, items: int, users: int) -> list[tuple]:
    while True:
        by_item, by_user = Counter(r[1] for r in rows), Counter(r[0] for r in rows)
        kept = [r for r in rows if by_item[r[1]] >= items and by_user[r[0]] >= users]
        if len(kept) == len(rows):
            return kept
        rows = kept


@OFTEN
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("vwxyz"), st.integers(0, 9),
                       st.integers(1, 5), st.just("")), min_size=1, max_size=40),
    st.sampled_from(["all", "first", "last"]), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5),
)  # fmt: skip
def test_filters(tmp_path, rows, repeated, items, users, stars):
    """Against plain loops; every row is accounted for, and the order of users and items stays."""
    file = write_csv(tmp_path / "log.csv", rows)
    asked = replace(
        CONFIG, path=[str(file)], repeated=repeated, min_item_events=items, min_user_events=users,
        at_least=[f"stars:{stars}"], after="1970-01-01T00:00:02", before="1970-01-01T00:00:08", memory="20kB",
    )  # fmt: skip
    good = [row for row in rows if row[3] >= stars and 2 <= row[2] < 8]
    wanted = expected(good)
    if repeated != "all":
        once: dict[tuple, tuple] = {}
        for row in wanted if repeated == "last" else reversed(wanted):
            once.pop(row[:2], None)
            once[row[:2]] = row
        wanted = list(once.values()) if repeated == "last" else list(once.values())[::-1]
        users_in_order = list(dict.fromkeys(row[0] for row in good))
        wanted.sort(key=lambda row: users_in_order.index(row[0]))
    wanted = enough(wanted, items, users)
    if not wanted:
        with pytest.raises(UserError, match="no events are left"):
            prepare_table(asked, tmp_path / "out")
        return
    dataset = prepare_table(asked, tmp_path / "out")
    assert events_of(dataset) == wanted
    assert (dataset.lengths > 0).all()
    if items > 1:
        assert set(dataset.item_ids) == {row[1] for row in wanted}
    counts = dataset.card.rows
    assert counts.read == len(rows)
    assert counts.kept == dataset.num_events
    assert counts.filtered[f"stars below {stars}"] + counts.filtered["time before 1970-01-01T00:00:02"] + (
        counts.filtered["time from 1970-01-01T00:00:08 on"]
    ) == len(rows) - len(good)


BAD = [  # line of the file, what it says, what is wrong with it
    (3, "b,x,,4,t", "when is missing"),
    (3, "b,,7,4,t", "what is missing"),
    (4, "b,x,7,good,t", "stars is 'good', not a number"),
    (4, "b,x,7,nan,t", "stars is 'nan', not a number"),
    (2, "b,x,soon,4,t", "when is 'soon', not seconds since 1970 in the years 1 to 9999"),
    (2, "b,x,253402300800,4,t", "when is '253402300800', not seconds since 1970"),
    (3, "b,x,7,4", "4 fields, expected 5"),
    (3, "b,x,7,4,t,t", "6 fields, expected 5"),
    (3, 'b,x,7,4,"t" t', "not CSV ("),
    (4, 'b,x,7,4,"never', "a quote that is opened is never closed"),
    (3, "b,x,7,4,\0", "holds a NUL"),
    (3, b"b,x,7,4,\xff", "not UTF-8"),
]


@pytest.mark.parametrize(("line", "text", "problem"), BAD)
@pytest.mark.parametrize("memory", ["2GiB", "1kB"])
def test_a_bad_row_is_named_or_left_out(line, text, problem, memory, tmp_path):
    good = [b"a,x,1,5,one", b'a,"y, z",2,4,"two\n""lines"""', b"b,x,3,3,three"]
    raw = text if isinstance(text, bytes) else text.encode()
    lines = [",".join(NAMES).encode(), *good]
    place = {2: 1, 3: 2, 4: 3}[line]  # the third line of text is the second event's second line
    lines.insert(place, raw)
    line += place == 3
    file = tmp_path / "log.csv"
    file.write_bytes(b"\n".join(lines) + b"\n")
    config = replace(CONFIG, path=[str(file)], memory=memory)
    with pytest.raises(UserError) as caught:
        prepare_table(config, tmp_path / "out")
    assert str(caught.value).startswith(f"{file} line {line}: {problem}")
    assert str(caught.value).endswith("or leave such rows out with --on-bad-rows skip")
    assert list(tmp_path.iterdir()) == [file]
    dataset = prepare_table(replace(config, on_bad_rows="skip"), tmp_path / "out")
    assert dataset.event_texts("words", range(3)) == ["one", 'two\n"lines"', "three"]
    assert (dataset.card.rows.read, dataset.card.rows.kept, dataset.card.rows.rejected) == (4, 3, 1)
    with open(dataset.files / "rejects.csv", newline="") as rejects:
        [bad] = csv.DictReader(rejects)
    assert bad["file"] == str(file)
    assert bad["line"] == str(line)
    assert bad["reason"].startswith(problem)


BAD_JSON = [
    ('{"who": "a", "what": "x", "when": 1', "not JSON ("),
    ("[1]", "not a JSON object"),
    ('{"who": "a", "what": "x"}', "when is missing"),
    ('{"who": "\\ud800", "what": "x", "when": 1, "stars": 1}', "half of a surrogate pair"),
    (b'{"who": "\xff", "what": "x", "when": 1, "stars": 1}', "not UTF-8"),
]


@pytest.mark.parametrize(("text", "problem"), BAD_JSON)
def test_a_bad_line_of_json_is_named_or_left_out(text, problem, tmp_path):
    file = write_jsonl(tmp_path / "log.jsonl", [(f"u{n}", "x", n, 1, "\N{GRINNING FACE}") for n in range(5)])
    lines = file.read_bytes().splitlines()
    lines[3:3] = [b"", text if isinstance(text, bytes) else text.encode()]
    file.write_bytes(b"\n".join(lines))
    config = replace(CONFIG, path=[str(file)])
    with pytest.raises(UserError) as caught:
        prepare_table(config, tmp_path / "out")
    assert str(caught.value).startswith(f"{file} line 5: {problem}")
    dataset = prepare_table(replace(config, on_bad_rows="skip"), tmp_path / "out")
    assert dataset.user_ids == [f"u{n}" for n in range(5)]
    assert (dataset.card.rows.read, dataset.card.rows.rejected) == (6, 1)


@pytest.mark.parametrize(
    ("times", "seconds", "said"),
    [
        ([978300760, 978300761], [978300760, 978300761], "seconds since 1970 (found out)"),
        ([978300760123, 978300760001], [978300760, 978300760], "milliseconds since 1970 (found out)"),
        ([978300760000009, 5], [978300760, 0], "microseconds since 1970 (found out)"),
        ([978300760000000009, -1], [978300760, -1], "nanoseconds since 1970 (found out)"),
        (["2001-01-01T00:12:40+02:00", "1969-12-31"], [978300760, -86400], "dates and times as in ISO 8601"),
    ],
)
def test_times(times, seconds, said, tmp_path):
    rows = [(f"u{n}", "x", time, 1, "") for n, time in enumerate(times)]
    config = replace(CONFIG, path=[str(write_csv(tmp_path / "log.csv", rows))], time_unit="auto")
    dataset = prepare_table(config, tmp_path / "out")
    assert dataset.events["time"].tolist() == seconds
    assert dataset.card.time.startswith(said)


def test_events_are_sorted_by_more_than_seconds(tmp_path):
    rows = [("u", "late", 978300760900, 1, ""), ("u", "soon", 978300760100, 1, "")]
    config = replace(CONFIG, path=[str(write_csv(tmp_path / "log.csv", rows))], time_unit="auto")
    dataset = prepare_table(config, tmp_path / "out")
    assert [dataset.item_ids[n] for n in dataset.events["item"]] == ["soon", "late"]


@pytest.mark.parametrize("unit", ["auto", "s"])
def test_seconds_with_fractions_are_sorted_by_them(unit, tmp_path):
    rows = [("u", "third", 1000.9, 1, ""), ("u", "second", "1000.2", 1, ""), ("u", "first", 1000, 1, "")]
    for write in (write_csv, write_parquet):
        if write is write_parquet:
            rows = [(user, item, float(time), stars, words) for user, item, time, stars, words in rows]
        file = write(tmp_path / f"log.{write.__name__.removeprefix('write_')}", rows)
        dataset = prepare_table(replace(CONFIG, path=[str(file)], time_unit=unit), tmp_path / "out")
        assert [dataset.item_ids[n] for n in dataset.events["item"]] == ["first", "second", "third"]
        assert dataset.events["time"].tolist() == [1000] * 3


def test_times_of_parquet(tmp_path):
    rows = [("u", "x", 86400, 1, ""), ("u", "y", 0, 1, "")]
    file = write_parquet(tmp_path / "log.parquet", rows)
    frame = pl.read_parquet(file)
    for dtype in (pl.Date, pl.Datetime("ms"), pl.Datetime("ns", "Europe/Berlin"), pl.Float64):
        when = pl.from_epoch("when", "s") if dtype != pl.Float64 else pl.col("when")
        when = when.dt.replace_time_zone("UTC") if str(dtype).endswith("Berlin')") else when
        frame.with_columns(when.cast(dtype)).write_parquet(file)
        dataset = prepare_table(replace(CONFIG, path=[str(file)], time_unit="auto"), tmp_path / "out")
        assert dataset.events["time"].tolist() == [0, 86400], dtype


def test_items(tmp_path):
    log = write_csv(
        tmp_path / "log.csv", [("u", "x", 1, 1, ""), ("u", "new", 2, 1, ""), ("v", "y", 3, 1, "")]
    )
    items = tmp_path / "items.jsonl"
    about = [
        {"id": "z", "name": "Z & co", "kinds": "b|a"}, {"id": "y", "name": None, "kinds": ["c"]},
        {"id": "x", "name": "X"},
    ]  # fmt: skip
    items.write_text("\n".join(json.dumps(one) for one in about))
    known = ItemsConfig(path=[str(items)], key="id", title="name", category="kinds")
    dataset = prepare_table(replace(CONFIG, path=[str(log)], items=known), tmp_path / "out")
    assert dataset.item_ids == ["z", "y", "x", "new"]
    assert dataset.items["title"].to_list() == ["Z & co", "y", "X", "new"]
    assert dataset.items["category"].to_list() == [["b", "a"], ["c"], [], None]
    assert dataset.events["item"].tolist() == [2, 3, 1]
    items.write_text('{"id": "x", "name": "other"}\n{"id": "w", "name": "W", "kinds": "d"}\n')
    more = write_csv(tmp_path / "more.csv", [("u", "w", 9, 1, "")])
    grown = append_table(tmp_path / "out", [str(more)], [str(items)])
    assert grown.items["title"].to_list() == ["Z & co", "y", "X", "new", "W"]
    assert grown.items["category"].to_list()[-1] == ["d"]
    items.write_text('{"id": "x"}\n{"id": "x"}\n')
    with pytest.raises(UserError, match=r"items\.jsonl line 2: item x is already on line 1;"):
        prepare_table(replace(CONFIG, path=[str(log)], items=known), tmp_path / "out")
    items.write_text('{"id": "w"}\n{"id": "x"}\n')
    (tmp_path / "later.jsonl").write_text('{"id": "x"}\n')
    known = replace(known, path=[str(items), str(tmp_path / "later.jsonl")])
    with pytest.raises(UserError, match=r"later\.jsonl line 1: item x is already on line 2 of items\.jsonl;"):
        prepare_table(replace(CONFIG, path=[str(log)], items=known), tmp_path / "out")


def test_titles_are_on_one_line_and_categories_are_told_once(tmp_path):
    log = write_csv(tmp_path / "log.csv", [("u", "x", 1, 1, ""), ("u", "y", 2, 1, "")])
    items = tmp_path / "items.jsonl"
    about = [
        {"id": "x", "name": " The\n X ", "kinds": "b|a| b"},
        {"id": "y", "name": " \t", "kinds": ["c", "c"]},
    ]
    items.write_text("\n".join(map(json.dumps, about)))
    known = ItemsConfig(path=[str(items)], key="id", title="name", category="kinds")
    dataset = prepare_table(replace(CONFIG, path=[str(log)], items=known), tmp_path / "out")
    assert dataset.items["title"].to_list() == ["The X", "y"]
    assert dataset.items["category"].to_list() == [["b", "a"], ["c"]]


def test_the_card_knows_the_catalogue(tmp_path):
    """Of the fingerprint alone a catalogue in another order, or with other categories, would be the same data."""
    log = write_csv(tmp_path / "log.csv", [("u", "x", 1, 1, ""), ("u", "y", 2, 1, "")])
    items = tmp_path / "items.csv"
    known = ItemsConfig(path=[str(items)], key="id", title="name", category="kinds")
    lines = ["x,X,a", "y,Y,b", "z,Z,c"]
    cards = []
    for told in (lines, lines, lines[::-1], ["x,X,a", "y,Y,other", "z,Z,c"]):
        items.write_text("\n".join(["id,name,kinds", *told]))
        cards.append(prepare_table(replace(CONFIG, path=[str(log)], items=known), tmp_path / "out").card)
    assert len({card.fingerprint for card in cards}) == 1
    assert cards[0].catalogue == cards[1].catalogue
    assert len({card.catalogue for card in cards}) == 3


def test_what_cannot_be_is_said(tmp_path):
    file = write_csv(tmp_path / "log.csv", [("u", "x", 1, 1, "")])
    cases = [
        (
            {"user": "nobody"},
            f"{file} line 1: no column nobody; the columns are who, what, when, stars, words",
        ),
        ({"path": ["nowhere/*.csv"]}, "nowhere/*.csv: no such file"),
        ({"time_unit": "auto", "time": "words"}, "cannot tell how times like"),
        ({"time_unit": "%d.%m.%Y %H"}, "--time-unit '%d.%m.%Y %H': no format of times"),
        ({"format": "parquet"}, f"{file} after row 0: cannot be read"),
    ]
    for change, message in cases:
        text = [] if "time" in change else ["words"]
        with pytest.raises(UserError) as caught:
            prepare_table(replace(CONFIG, **{"path": [str(file)], "text": text} | change), tmp_path / "out")
        assert message in str(caught.value)
    for change in (
        {"user": ""}, {"fields": ["stars"]}, {"at_least": ["words:1"]}, {"memory": "lots"}, {"min_user_events": 0},
        {"separator": ";;"}, {"text": ["stars"]}, {"after": "monday"}, {"text": ["title"]},
    ):  # fmt: skip
        with pytest.raises(UserError):
            replace(CONFIG, **change)
    file.write_text("who,what,when,when\n1,2,3,4\n")
    with pytest.raises(UserError, match=r"line 1: column when is there 2 times"):
        prepare_table(replace(CONFIG, path=[str(file)], fields=[], text=[]), tmp_path / "out")
    file.write_text(",".join(NAMES))
    with pytest.raises(UserError, match="there are no events"):
        prepare_table(replace(CONFIG, path=[str(file)]), tmp_path / "out")
    packed = tmp_path / "log.csv.gz"
    packed.write_bytes(gzip.compress(b"x" * 10**5)[:-40])
    with pytest.raises(UserError, match=r"log\.csv\.gz after line 0: ends in the middle of its packed data"):
        prepare_table(replace(CONFIG, path=[str(packed)]), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "log.csv.gz"]


def test_a_dataset_from_elsewhere_cannot_grow(made, tmp_path):
    made([3, 4])
    with pytest.raises(UserError, match="not by `data prepare table`"):
        append_table(tmp_path / "made", ["log.csv"])
