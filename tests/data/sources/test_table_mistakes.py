"""What people get wrong with a table of their own: it is said, with what to do, and nothing is taken in silence."""

import json
from datetime import time, timedelta

import polars as pl
import pytest

from userllm.data import Dataset
from userllm.data.sources.table import append_table, prepare_table
from userllm.data.sources.table_config import ItemsConfig, TableConfig
from userllm.errors import UserError


@pytest.fixture
def shop(tmp_path):
    """A config of one CSV file that is there."""

    def table(*rows: str, name: str = "log.csv", **settings) -> TableConfig:
        file = tmp_path / name
        file.write_text("\n".join(["user,item,time", *rows]) + "\n")
        return TableConfig(path=[str(file)], user="user", item="item", time="time", **settings)

    return table


def test_a_key_of_json_that_no_row_has(tmp_path):
    log, items = tmp_path / "log.jsonl", tmp_path / "items.jsonl"
    log.write_text('{"u": "a", "i": "x", "t": 1, "review": "good"}\n{"u": "b", "i": "y", "t": 2}\n')
    items.write_text('{"id": "x", "name": "Ex"}\n{"id": "y", "name": "Why"}\n')
    known = {"path": [str(log)], "user": "u", "item": "i", "time": "t"}
    with pytest.raises(UserError, match=r"log\.jsonl: no row has reveiw; check how it is spelt"):
        prepare_table(TableConfig(**known, text=["reveiw"]), tmp_path / "out")
    for wrong in ({"title": "nme"}, {"title": "name", "category": "kind"}):
        about = ItemsConfig(path=[str(items)], key="id", **wrong)
        with pytest.raises(UserError, match=r"items\.jsonl: no row has (nme|kind)"):
            prepare_table(TableConfig(**known, items=about), tmp_path / "out")
    whole = TableConfig(
        **known, text=["review"], items=ItemsConfig(path=[str(items)], key="id", title="name")
    )
    assert prepare_table(whole, tmp_path / "out").items["title"].to_list() == ["Ex", "Why"]
    log.write_text('{"u": "b", "i": "y", "t": 9}\n')  # a few new rows may lack what others have
    assert append_table(tmp_path / "out", [str(log)]).num_events == 3


def test_items_that_no_row_describes_are_counted(shop, tmp_path):
    items = tmp_path / "items.csv"
    items.write_text("id,name\nx,Ex\nz,Zed\n")
    about = ItemsConfig(path=[str(items)], key="id", title="name")
    card = prepare_table(shop("a,x,1", "a,y,2", "b,w,3", items=about), tmp_path / "out").card
    assert "2 of 4 items are known by their id alone" in card.notes
    assert not any("id alone" in note for note in prepare_table(shop("a,x,1"), tmp_path / "plain").card.notes)


def test_new_times_of_another_unit(shop, tmp_path):
    prepare_table(shop("a,x,1700000000000", "b,y,1700000001000"), tmp_path / "out")
    new = shop("a,x,1700000002", name="new.csv").path
    with pytest.raises(
        UserError, match=r"new\.csv: as milliseconds .* of 1970, and the dataset begins in 2023"
    ):
        append_table(tmp_path / "out", new)
    assert Dataset.open(tmp_path / "out").num_events == 2
    assert append_table(tmp_path / "out", shop("a,x,1700000002000", name="new.csv").path).num_events == 3


def test_dates_in_digits(shop, tmp_path):
    with pytest.raises(UserError, match=r'times like 20240131 may be dates or seconds; .*"%Y%m%d"'):
        prepare_table(shop("a,x,20240131", "b,y,20231201"), tmp_path / "out")
    told = prepare_table(shop("a,x,20240131", time_unit="%Y%m%d"), tmp_path / "out")
    assert told.events["time"].tolist() == [1706659200]
    assert prepare_table(shop("a,x,20240131", time_unit="s"), tmp_path / "out").events["time"][0] == 20240131


def test_a_zone_of_hours_alone(shop, tmp_path):
    dataset = prepare_table(
        shop("a,x,2024-01-01 00:00:00+02", "a,x,2024-01-01T00:00-05", "a,x,2024-01-01"), tmp_path / "out"
    )
    assert sorted(dataset.events["time"].tolist()) == [1704060000, 1704067200, 1704085200]


@pytest.mark.parametrize("value", [time(3, 4), timedelta(seconds=5)])
def test_a_column_of_parquet_that_is_no_point_in_time(value, tmp_path):
    file = tmp_path / "log.parquet"
    pl.DataFrame({"u": ["a"], "i": ["x"], "t": [value]}).write_parquet(file)
    config = TableConfig(path=[str(file)], user="u", item="i", time="t")
    with pytest.raises(UserError, match="column t: cannot tell how times like"):
        prepare_table(config, tmp_path / "out")


def test_categories_as_a_list(shop, tmp_path):
    items = tmp_path / "items.jsonl"
    rows = [
        {"id": "x", "kind": ["a", None, "b"]}, {"id": "y", "kind": "['a', 'c d']"}, {"id": "z", "kind": "[odd"},
        {"id": "w", "kind": "[3]"},
    ]  # fmt: skip
    items.write_text("\n".join(map(json.dumps, rows)))
    about = ItemsConfig(path=[str(items)], key="id", category="kind")
    found = prepare_table(shop("a,x,1", items=about), tmp_path / "out").items["category"].to_list()
    assert found == [["a", "b"], ["a", "c d"], ["[odd"], ["3"]]


def test_where_no_row_can_be_read_the_first_is_named(shop, tmp_path):
    config = shop("a,x,soon", "b,y,later", time_unit="s", on_bad_rows="skip")
    with pytest.raises(
        UserError, match=r"no row can be read; of .*log\.csv line 2: time is 'soon', not seconds"
    ):
        prepare_table(config, tmp_path / "out")


def test_a_file_is_appended_once(shop, tmp_path):
    prepare_table(shop("a,x,1"), tmp_path / "out")
    new, newer = shop("a,y,2", name="new.csv").path, shop("a,z,3", name="newer.csv").path
    append_table(tmp_path / "out", new)
    with pytest.raises(UserError, match=r"in the dataset already, 1 of 2 files; give new ones alone"):
        append_table(tmp_path / "out", [*new, *newer])
    with pytest.raises(UserError, match="in the dataset already"):
        append_table(tmp_path / "out", [str(tmp_path / "log.csv")])
    assert append_table(tmp_path / "out", newer).num_events == 3


def test_items_for_a_dataset_without(shop, tmp_path):
    prepare_table(shop("a,x,1"), tmp_path / "out")
    with pytest.raises(UserError, match=r"prepared without items.*; prepare it again with --items"):
        append_table(tmp_path / "out", shop("a,y,2", name="new.csv").path, ["items.csv"])


def test_the_items_file_is_read_in_its_own_way(tmp_path):
    log, items = tmp_path / "log.txt", tmp_path / "items.csv"
    log.write_text("a;x;1\na;y;2\n")
    items.write_text("id;name\nx;Ex\ny;Why\n")
    known = {
        "path": [str(log)], "user": "u", "item": "i", "time": "t", "format": "csv", "separator": ";",
        "header": ["u", "i", "t"],
    }  # fmt: skip
    about = ItemsConfig(path=[str(items)], key="id", title="name")
    assert prepare_table(TableConfig(**known, items=about), tmp_path / "out").items["title"].to_list() == [
        "Ex",
        "Why",
    ]
    items.write_text("x,Ex\ny,Why\n")
    about = ItemsConfig(
        path=[str(items)], key="id", title="name", column_separator=",", header=["id", "name"]
    )
    assert prepare_table(TableConfig(**known, items=about), tmp_path / "out").items["title"][1] == "Why"
    with pytest.raises(UserError, match=r"items\.column_separator is '::'; give one plain character"):
        TableConfig(**known, items=ItemsConfig(column_separator="::"))
