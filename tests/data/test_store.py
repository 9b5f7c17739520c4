import json
import subprocess
import sys
import textwrap

import polars as pl
import pytest

from userllm.data import Dataset, write_dataset
from userllm.data.store import fingerprint
from userllm.errors import UserError


def test_a_dataset_survives_the_disk(made):
    written = made([3, 1, 6])
    read = Dataset.open(written.folder)
    assert read.card == written.card
    assert read.items.equals(written.items)
    assert read.user_ids == ["u0", "u1", "u2"]
    assert read.lengths.tolist() == [3, 1, 6]
    for name in ("item", "time", "rating"):
        assert (read.events[name] == written.events[name]).all()
    assert {name: str(column.dtype) for name, column in read.events.items()} == {
        "item": "int32",
        "time": "int64",
        "rating": "float32",
    }
    assert sorted(p.name for p in read.folder.iterdir()) == [
        "card.json",
        "events.parquet",
        "items.parquet",
        "users.parquet",
    ]


def test_a_history_is_the_users_events(made):
    dataset = made([3, 1, 6])
    history = dataset.history(2, 1, 3)
    assert history.user == "u2"
    rows = [dataset.offsets[2] + 1, dataset.offsets[2] + 2]
    assert [event.item for event in history.events] == [f"i{dataset.events['item'][row]}" for row in rows]
    assert [event.fields["rating"] for event in history.events] == [
        dataset.events["rating"][row] for row in rows
    ]
    assert len(dataset.history(2)) == 6
    assert dataset.user_index("u2") == 2
    with pytest.raises(UserError, match="no user number 3; users are 0 to 2"):
        dataset.history(3)
    with pytest.raises(UserError, match="no user 'x'"):
        dataset.user_index("x")


def test_the_fingerprint_depends_on_order_titles_and_values_alone():
    events = pl.DataFrame(
        {"user": [0, 0], "item": [0, 1], "time": [5, 5], "rating": [1.0, 2.0]},
        schema={"user": pl.Int32, "item": pl.Int32, "time": pl.Int64, "rating": pl.Float32},
    )
    items = pl.DataFrame({"id": ["1", "2"], "title": ["A", "B"]})
    first = fingerprint(events, items)
    assert first == fingerprint(events, items.with_columns(pl.Series("id", ["x", "y"])))
    moved = events.with_columns(pl.Series("item", [1, 0], dtype=pl.Int32))
    assert first == fingerprint(moved, items.reverse())
    assert first != fingerprint(events.reverse(), items)
    assert first != fingerprint(events, items.with_columns(pl.Series("title", ["A", "C"])))
    assert first != fingerprint(events.with_columns(pl.col("rating") + 1), items)
    assert first != fingerprint(events.with_columns(pl.col("time") + 1), items)


def rewrite(dataset: Dataset, **replaced: pl.DataFrame) -> Dataset:
    """Write a dataset once more, parts of it replaced."""
    parts = {
        name: pl.read_parquet(dataset.folder / f"{name}.parquet") for name in ("events", "items", "users")
    }
    parts |= replaced
    source, fields = dataset.card.source, dataset.card.fields
    events, items, users = parts["events"], parts["items"], parts["users"]
    return write_dataset(dataset.folder, events, items, users, name="again", source=source, fields=fields)


def test_an_earlier_dataset_is_replaced(made):
    dataset = made([3, 1, 6])
    rewrite(dataset)
    assert Dataset.open(dataset.folder).card.name == "again"
    assert [p.name for p in dataset.folder.parent.iterdir()] == ["made"]


def test_no_items_no_events_and_users_without_events(made):
    dataset = made([3, 1, 6])
    with pytest.raises(UserError, match="a test: the catalogue is empty"):
        rewrite(dataset, items=dataset.items.clear())
    with pytest.raises(UserError, match="a test: there are no events"):
        rewrite(dataset, events=pl.read_parquet(dataset.folder / "events.parquet").clear())
    with pytest.raises(UserError, match="user lonely has no events"):
        rewrite(dataset, users=pl.DataFrame({"id": ["u0", "u1", "u2", "lonely"]}))
    assert Dataset.open(dataset.folder).card.name == "made"


def test_folders_that_are_no_dataset(made, tmp_path):
    with pytest.raises(UserError, match=r"no card\.json"):
        Dataset.open(tmp_path / "nowhere")
    dataset = made([3, 1, 6])
    card = dataset.folder / "card.json"
    whole = card.read_text()
    card.write_text(whole[:50])
    with pytest.raises(UserError, match=r"card\.json: not a dataset card"):
        Dataset.open(dataset.folder)
    card.write_text(json.dumps(json.loads(whole) | {"format_version": 99}))
    with pytest.raises(UserError, match="format_version is 99, this userllm reads 1"):
        Dataset.open(dataset.folder)
    card.write_text(json.dumps(json.loads(whole) | {"events": 11}))
    with pytest.raises(UserError, match=r"events\.parquet: 10 rows, the card says 11"):
        Dataset.open(dataset.folder)
    card.write_text(whole)
    (dataset.folder / "items.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"items\.parquet: cannot be read"):
        Dataset.open(dataset.folder)


@pytest.mark.parametrize("moment", ["write_parquet", "write_text", "replace"])
def test_a_killed_writer_leaves_nothing_that_looks_finished(moment, tmp_path):
    script = textwrap.dedent(f"""
        import os, pathlib, signal, polars
        from userllm.data import FieldSpec, Source, write_dataset
        die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        if {moment!r} == "write_parquet": polars.DataFrame.write_parquet = die
        if {moment!r} == "write_text": pathlib.Path.write_text = die
        if {moment!r} == "replace": os.replace = die
        events = polars.DataFrame({{"user": [0], "item": [0], "time": [1], "rating": [1.0]}})
        items = polars.DataFrame({{"id": ["a"], "title": ["A"], "genres": [["g"]], "year": [1999]}})
        users = polars.DataFrame({{"id": ["u"]}})
        source = Source("made", "here", "none", "0", "path")
        fields = [FieldSpec("rating", "event", "single")]
        folder = pathlib.Path({str(tmp_path / "out")!r})
        write_dataset(folder, events, items, users, name="n", source=source, fields=fields)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists()
    assert all(p.name.startswith(".out.") for p in tmp_path.iterdir())
