"""``data prepare table`` and ``data append`` from the command line, from YAML and within a run."""

import json
from pathlib import Path

import pytest
import yaml

from userllm.cli.configuration import load_config
from userllm.data import Dataset
from userllm.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs" / "own-table.yaml"
SPEC = {
    "path": ["log*.csv"], "user": "who", "item": "what", "time": "when", "fields": ["stars:number"],
    "text": ["words"], "items": {"path": ["items.jsonl"], "key": "id", "title": "name", "category": "kind"},
}  # fmt: skip
FLAGS = [
    "--path",
    "log*.csv",
    "--user",
    "who",
    "--item",
    "what",
    "--time",
    "when",
    "--field",
    "stars:number",
    "--text",
    "words",
    "--items",
    "items.jsonl",
    "--item-key",
    "id",
    "--title",
    "name",
    "--category",
    "kind",
]


@pytest.fixture
def folder(tmp_path):
    for number in range(2):
        rows = [f'u{n % 3},i{n % 4},{n + number * 20},{n % 5},"some, words"' for n in range(12)]
        (tmp_path / f"log{number}.csv").write_text("\n".join(["who,what,when,stars,words", *rows]))
    items = [{"id": f"i{n}", "name": f"Item {n}", "kind": "a|b" if n else "b"} for n in range(4)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    return tmp_path


def test_flags_and_yaml_say_the_same(userllm, folder):
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    said = userllm("data", "prepare", "table", *FLAGS, "--out", "flags", cwd=folder)
    assert said.code == 0, said.err
    assert "24 read = 24 kept + 0 rejected + 0 filtered" in said.out
    assert "seconds since 1970 (found out)" in said.out
    assert userllm("data", "prepare", "table", "--spec", "spec.yaml", "--out", "yaml", cwd=folder).code == 0
    flags, from_yaml = Dataset.open(folder / "flags"), Dataset.open(folder / "yaml")
    assert flags.card.fingerprint == from_yaml.card.fingerprint
    assert flags.card.recipe == from_yaml.card.recipe
    said = userllm("data", "inspect", "yaml", cwd=folder)
    assert "Item 1  [a, b]" in said.out


def test_a_date_in_yaml_is_text(userllm, folder):
    spec = yaml.safe_dump(SPEC) + "after: 1970-01-01\nbefore: 1970-01-01T00:00:24\n"
    (folder / "spec.yaml").write_text(spec)
    said = userllm("data", "prepare", "table", "--spec", "spec.yaml", cwd=folder)
    assert said.code == 0, said.err
    assert "24 read = 16 kept + 0 rejected + 8 filtered" in said.out


def test_append(userllm, folder):
    assert (
        userllm("data", "prepare", "table", *FLAGS[2:], "--path", "log0.csv", "--out", "d", cwd=folder).code
        == 0
    )
    (folder / "log1.csv").write_text((folder / "log1.csv").read_text() + "\nu1,i0,soon,1,x")
    said = userllm("data", "append", "d", "log1.csv", cwd=folder)
    assert said.code == 2
    assert "log1.csv line 14: when is 'soon', not seconds since 1970" in said.error
    assert Dataset.open(folder / "d").num_events == 12
    said = userllm("data", "append", "d", "log1.csv", "--on-bad-rows", "skip", "--memory", "1MB", cwd=folder)
    assert "25 read = 24 kept + 1 rejected + 0 filtered" in said.out
    assert Dataset.open(folder / "d").num_events == 24
    # what was appended is not in the first file: the person is told before it is gone
    again = userllm("data", "prepare", "table", *FLAGS[2:], "--path", "log0.csv", "--out", "d", cwd=folder)
    assert again.code == 0 and "d holds d, 24 events, fingerprint " in again.err
    assert "it is replaced once the new one is whole" in again.err
    assert Dataset.open(folder / "d").num_events == 12
    (folder / "d" / "card.json").write_text("{")
    again = userllm("data", "prepare", "table", *FLAGS[2:], "--path", "log0.csv", "--out", "d", cwd=folder)
    assert again.code == 0 and "d holds a dataset that cannot be read" in again.err


def test_an_item_may_be_described_after_its_first_event(userllm, tmp_path):
    flags = ["--user", "u", "--item", "i", "--time", "t"]
    items = ["--item-key", "id", "--title", "name", "--category", "kind"]
    (tmp_path / "a.csv").write_text("u,i,t\nx,p1,1\n")
    (tmp_path / "items.csv").write_text("id,name,kind\np1,One,a\n")
    told = ["--items", "items.csv", *items]
    said = userllm("data", "prepare", "table", "--path", "a.csv", *flags, *told, "--out", "d", cwd=tmp_path)
    assert said.code == 0, said.err
    (tmp_path / "b.csv").write_text("u,i,t\nx,p2,2\n")
    assert userllm("data", "append", "d", "b.csv", cwd=tmp_path).code == 0
    assert Dataset.open(tmp_path / "d").items["title"].to_list() == ["One", "p2"]
    (tmp_path / "c.csv").write_text("u,i,t\nx,p3,3\n")
    (tmp_path / "more.csv").write_text("id,name,kind\np3,Three,c\np2,Two,b\np1,Another,a\n")
    said = userllm("data", "append", "d", "c.csv", "--items", "more.csv", cwd=tmp_path)
    assert said.code == 0, said.err
    assert (
        "1 items are described otherwise than before and stay as they were, the first of them 'p1'"
        in said.err
    )
    grown = Dataset.open(tmp_path / "d").items
    assert grown["title"].to_list() == ["One", "Two", "Three"]
    assert grown["category"].to_list() == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--user", "who"], "table: give its files with --path, or path in --spec"),
        (["--path", "log0.csv", "--user", "who"], "table: item: say which column it is"),
        (["--spec", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--spec", "odd.yaml"], "odd.yaml: "),
        (["--path", "log0.csv", "--memory", "much"], "memory is 'much'; give a size like 500MB or 2GiB"),
    ],
)
def test_what_is_missing_is_said(userllm, folder, flags, message):
    (folder / "odd.yaml").write_text("path: [log0.csv]\nuser: who\nitem: what\ntime: when\nusr: x\n")
    said = userllm("data", "prepare", "table", *flags, cwd=folder)
    assert said.code == 2
    assert message in said.error


def test_a_run_prepares_a_table(userllm, folder, finished):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    config["data"] = {"release": None, "table": SPEC, "fields": ["item", "stars", "category"]}
    config["split"] = {"min_events": 3}
    config["tasks"]["favorite_genre"]["field"] = "category"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    loaded, _ = load_config(folder / "config.yaml")
    assert loaded.data.table is not None
    said = userllm("pretrain", "config.yaml", cwd=folder)
    assert said.code == 0, said.err
    assert "24 events" in said.out
    with pytest.raises(UserError, match="give the files of your table"):
        load_config(folder / "config.yaml", ["data.table.path=[]"])


SMALL = [
    "encoder={layers: 1, width: 16, heads: 2, feed_forward: 32, item_width: 16, field_width: 4, max_length: 12}",
    "pretrain.epochs=1", "lm.name=tiny-random-llama", "fusion.layers=last:1",
    "fusion.cross_attention={heads: 2, head_width: 8}", "contextualize.steps=2", "contextualize.histories=2",
    "evaluation.beams=4", "evaluation.list_length=4", "evaluation.knowledge_tokens=32",
]  # fmt: skip


def test_the_shipped_configuration_for_a_table_of_ones_own(userllm, tmp_path):
    """As it is shipped, but for the model's size: two plain files with the columns it names."""
    rows = [f"u{n % 5},i{(n * n + n // 5) % 9},{n}" for n in range(60)]
    (tmp_path / "events.csv").write_text("\n".join(["user,item,time", *rows]))
    items = [f"i{n},Thing {n},{'tools' if n % 2 else 'toys'}" for n in range(9)]
    (tmp_path / "items.csv").write_text("\n".join(["item,title,category", *items]))
    said = userllm("run", CONFIG, *SMALL, cwd=tmp_path)
    assert said.code == 0, said.err
    metrics = json.loads((tmp_path / "runs" / "own-table" / "metrics.json").read_text())
    assert metrics["dataset"]["users"] == 5 and set(metrics["tasks"]) == {"next_item", "favorite_category"}
    asked = userllm("recommend", "runs/own-table", "--user", "u1", cwd=tmp_path)
    assert asked.code == 0 and "Thing " in asked.out


def test_a_catalogue_in_another_order_and_one_that_grew(userllm, tmp_path):
    """Trained rows belong to the items of one order; items that were known by their id alone may be described."""
    rows = [f"u{n % 5},i{(n * n + n // 5) % 9},{n}" for n in range(60)]
    (tmp_path / "events.csv").write_text("\n".join(["user,item,time", *rows]))
    known = [f"i{n},Thing {n},{'tools' if n % 2 else 'toys'}" for n in range(8)]  # i8 is not described
    table = ["table", "--path", "events.csv", "--user", "user", "--item", "item", "--time", "time"]
    table += ["--items", "items.csv", "--item-key", "item", "--title", "title", "--category", "category"]

    def prepare(items):
        (tmp_path / "items.csv").write_text("\n".join(["item,title,category", *items]))
        said = userllm("data", "prepare", *table, "--out", "d", cwd=tmp_path)
        assert said.code == 0, said.err

    prepare(known)
    here = [CONFIG, *SMALL, "encoder.item_start=text", "data={folder: d, fields: [item, category]}"]
    said = userllm("contextualize", *here, cwd=tmp_path)
    assert said.code == 0, said.err
    prepare(known[::-1])
    said = userllm("run", *here, "evaluation.batch=7", cwd=tmp_path)
    assert "d: has changed since this run began; start a run of another name" in said.error
    prepare(known)
    (tmp_path / "items.csv").write_text("item,title,category\ni8,Thing 8,toys\ni9,Thing 9,tools\n")
    (tmp_path / "more.csv").write_text("user,item,time\nu1,i9,99\n")
    assert userllm("data", "append", "d", "more.csv", "--items", "items.csv", cwd=tmp_path).code == 0
    said = userllm("grow", "runs/own-table", "--data", "d", "--out", "grown", cwd=tmp_path)
    assert said.code == 0, said.err
    assert "1 new items: 1 known through their titles, 0 read as unknown" in said.out
    assert "1 described by now keep the ids that the model knows them by" in said.out
    prepare(known)
    for file in ("d/card.json", "runs/own-table/dataset.json"):  # as an older userllm wrote them
        told = json.loads((tmp_path / file).read_text())
        assert told.pop("catalogue")
        (tmp_path / file).write_text(json.dumps(told))
    assert Dataset.open(tmp_path / "d").card.catalogue is None
    said = userllm("pretrain", *here, cwd=tmp_path)
    assert said.code == 0 and said.out.count("skipped") == 2


def test_the_shipped_configuration_without_its_files(userllm, tmp_path):
    assert "events.csv" in userllm("run", CONFIG, *SMALL, cwd=tmp_path).error


@pytest.mark.slow  # a whole run, one of three
def test_the_shipped_configuration_without_items(userllm, tmp_path):
    """What its comments say is to be left out."""
    rows = [f"u{n % 5},i{(n * n + n // 5) % 9},{n}" for n in range(60)]
    (tmp_path / "events.csv").write_text("\n".join(["user,item,time", *rows]))
    plain = yaml.safe_load(CONFIG.read_text())
    del plain["data"]["table"]["items"], plain["tasks"]["favorite_category"]
    plain["data"]["fields"] = ["item"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(plain))
    said = userllm("run", "mine.yaml", *SMALL, cwd=tmp_path)
    assert said.code == 0, said.err
