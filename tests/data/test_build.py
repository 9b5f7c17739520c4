"""Streaming preparation: blocks and ranges of any size give one result; numbers by first appearance; sizes."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from userllm.data import columns, count_filters, sorting
from userllm.data.build import DatasetBuilder, EventBatch, bytes_of
from userllm.data.card import FieldSpec, RowCounts, Source
from userllm.data.count_filters import CountFilters
from userllm.data.numbering import Numbering
from userllm.data.sources import table
from userllm.data.sources.table import append_table, prepare_table
from userllm.data.sources.table_config import TableConfig
from userllm.data.store import Dataset
from userllm.errors import UserError

FIELDS = (FieldSpec("rating", "event", "single"), FieldSpec("note", "event", "text"))
SOURCE = Source("made", "a test", "none", "0" * 64, "path")


def build(folder, events: pl.DataFrame, batch: int, asked: CountFilters, memory: int = 2**31) -> Dataset:
    with DatasetBuilder(folder, FIELDS, memory=memory) as builder:
        for start in range(0, len(events), batch):
            part = events[start : start + batch]
            builder.add(EventBatch(part, RowCounts(len(part), len(part))))
        builder.finish(name="made", source=SOURCE, time="ticks", ticks_per_second=10, count_filters=asked)
    return Dataset.open(folder)


@pytest.mark.parametrize("asked", [CountFilters(), CountFilters("first", 3, 4), CountFilters("last")])
def test_blocks_and_ranges_change_nothing(asked, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    events = pl.DataFrame(
        {
            "user": [f"u{n}" for n in random.integers(0, 40, 300)],
            "item": [f"i{n}" for n in random.geometric(0.05, 300)],
            "time": random.integers(-500, 500, 300),
            "rating": random.integers(1, 6, 300).astype(np.float32),
            "note": [f"note {n}" * (n % 3) for n in range(300)],
        }
    )
    whole = build(tmp_path / "whole", events, 300, asked)
    assert whole.card.time_span == (int(whole.events["time"].min()), int(whole.events["time"].max()))
    assert whole.distinct_values("rating").tolist() == sorted(set(whole.events["rating"].tolist()))
    monkeypatch.setattr(sorting, "BLOCK", 7)
    monkeypatch.setattr(count_filters, "BLOCK", 11)
    monkeypatch.setattr(columns, "BLOCK", 13)
    monkeypatch.setattr(sorting, "FEW_ROWS", 20)
    monkeypatch.setattr(sorting, "IN_CACHE", 15)
    for memory in (2**31, 1000):
        parts = build(tmp_path / "parts", events, 9, asked, memory)
        assert parts.card.fingerprint == whole.card.fingerprint
        assert parts.card.rows == whole.card.rows
        assert parts.card.time_span == whole.card.time_span
        assert parts.user_ids == whole.user_ids
        assert parts.items.equals(whole.items)
        rows = range(whole.num_events)
        assert parts.event_texts("note", rows) == whole.event_texts("note", rows)


@pytest.mark.parametrize("far", [1, 2**40, 2**58])
def test_a_log_in_order_of_users_is_sorted_in_parts(far, tmp_path, monkeypatch):
    """Users come one after the other, their times by chance and with ties; one later user breaks the order."""
    monkeypatch.setattr(sorting, "IN_CACHE", 15)
    random = np.random.default_rng(0)
    user = np.sort(random.integers(0, 30, 300))
    frame = pl.DataFrame(
        {
            "user": [f"u{n}" for n in user], "item": [f"i{n}" for n in range(300)],
            "time": random.integers(-3, 4, 300) * far, "rating": np.ones(300, np.float32), "note": [""] * 300,
        }
    )  # fmt: skip
    late = frame.tail(1).with_columns(user=pl.lit("u0"), item=pl.lit("late"))
    for events in (frame, pl.concat([frame, late])):
        dataset = build(tmp_path / "out", events, 50, CountFilters())
        wanted = events.with_row_index("row").sort(
            pl.col("user").replace_strict(dataset.user_ids, range(dataset.num_users)), "time", "row"
        )
        assert [dataset.item_ids[n] for n in dataset.events["item"]] == wanted["item"].to_list()


def test_times_that_leave_no_room_for_users_in_one_number(tmp_path):
    far = 2**62
    events = pl.DataFrame(
        {"user": ["b", "a", "b", "a"], "item": list("wxyz"), "time": [far, 5, -far, -far], "rating": [1.0] * 4,
         "note": [None] * 4},
    )  # fmt: skip
    dataset = build(tmp_path / "out", events, 4, CountFilters())
    assert [dataset.item_ids[n] for n in dataset.events["item"]] == ["y", "w", "z", "x"]


def test_numbers_by_first_appearance():
    random = np.random.default_rng(0)
    for ids in (random.integers(0, 50, 9000), np.sort(random.integers(0, 50, 9000)), np.arange(9000)):
        numbering, known = Numbering(["x", "7"]), {"x": 0, "7": 1}
        for part in np.split(ids, [3, 4000, 4000]):
            wanted = [known.setdefault(str(one), len(known)) for one in part.tolist()]
            assert numbering.numbers(pl.Series(part)).tolist() == wanted
        assert numbering.ids.to_list() == list(known)
        assert numbering.size == len(known)


def test_rows_have_to_add_up(tmp_path):
    with pytest.raises(ValueError, match="rows do not add up"):
        RowCounts(3, 1, 1, {"a rule": 2})
    total = RowCounts(5, 2, 1, {"a": 2}) + RowCounts(4, 1, 0, {"b": 1, "a": 2})
    assert total == RowCounts(9, 3, 1, {"a": 4, "b": 1})
    assert str(total) == "9 read = 3 kept + 1 rejected + 5 filtered (4 by a, 1 by b)"
    frame = pl.DataFrame({"user": ["a"], "item": ["b"], "time": [1], "rating": [1.0], "note": [""]})
    with DatasetBuilder(tmp_path / "out", FIELDS) as builder, pytest.raises(ValueError, match="1 events"):
        builder.add(EventBatch(frame, RowCounts(2, 2)))
    assert list(tmp_path.iterdir()) == []


def again(log):
    """The rows of a file in another one: a file itself is appended once."""
    other = log.with_suffix(".jsonl")
    header, *rows = log.read_text().splitlines()
    other.write_text(
        "\n".join(json.dumps(dict(zip(header.split(","), row.split(","), strict=True))) for row in rows)
    )
    return str(other)


def test_append_counts_repeated_pairs_once_more(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("u,i,t\na,x,1\na,x,2\na,y,3\n")
    config = TableConfig(path=[str(log)], user="u", item="i", time="t", repeated="first")
    prepare_table(config, tmp_path / "out")
    grown = append_table(tmp_path / "out", [again(log)])
    assert grown.card.rows == RowCounts(6, 2, 0, {"repeated pairs of user and item, all but the first": 4})
    whole = prepare_table(replace(config, path=[str(log), str(tmp_path / "*.csv")]), tmp_path / "whole")
    assert whole.num_events == 2


def test_somebody_else_replaced_the_dataset_meanwhile(tmp_path, monkeypatch):
    log = tmp_path / "log.csv"
    log.write_text("u,i,t\na,x,1\n")
    config = TableConfig(path=[str(log)], user="u", item="i", time="t")
    prepare_table(config, tmp_path / "out")

    def late(*given, **settings):
        monkeypatch.undo()
        prepare_table(config, tmp_path / "out")
        return DatasetBuilder(*given, **settings)

    monkeypatch.setattr(table, "DatasetBuilder", late)
    with pytest.raises(UserError, match="was changed meanwhile by another command"):
        append_table(tmp_path / "out", [again(log)])
    assert Dataset.open(tmp_path / "out").num_events == 1


def test_one_command_at_a_time_writes_a_dataset(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("u,i,t\na,x,1\n")
    config = TableConfig(path=[str(log)], user="u", item="i", time="t")
    for _ in range(2):  # of a new dataset, and of one that is there
        with DatasetBuilder(tmp_path / "out", FIELDS):
            with pytest.raises(UserError, match=r"out: another command is writing it"):
                prepare_table(config, tmp_path / "out")
            prepare_table(config, tmp_path / "out.2")
        prepare_table(config, tmp_path / "out")
    with (
        DatasetBuilder(tmp_path / "out", FIELDS),
        pytest.raises(UserError, match="another command is writing"),
    ):
        append_table(tmp_path / "out", [again(log)])
    assert append_table(tmp_path / "out", [again(log)]).num_events == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "log.jsonl", "out", "out.2"]


def test_what_a_killed_command_left_is_removed(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("u,i,t\na,x,1\n")
    for name in (".out.unfinished-abc", ".out.2.unfinished-abc", ".out.mine"):
        (tmp_path / name / "files").mkdir(parents=True)
    (tmp_path / ".out.lock").touch()
    prepare_table(TableConfig(path=[str(log)], user="u", item="i", time="t"), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".out.2.unfinished-abc",
        ".out.mine",
        "log.csv",
        "out",
    ]


def test_sizes():
    assert [bytes_of(text) for text in ("100", "2kB", "1.5 MiB", "2GiB", "1t")] == [
        100, 2048, 3 << 19, 2**31, 2**40
    ]  # fmt: skip
    for text in ("", "much", "-1GB", "0", "1XB"):
        with pytest.raises(UserError, match="give a size like"):
            bytes_of(text)
