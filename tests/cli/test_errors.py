"""Bad input: one clear line that names file and line or field, exit code 2, and nothing left that looks finished."""

import json
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from userllm.cli import parse
from userllm.data.sources import releases
from userllm.language_models.tiny import tiny_language_model


@pytest.fixture
def raw(finished, tmp_path):
    """The raw files, to be damaged."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for file in (finished / "raw").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def replace_line(path, number, line):
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = line
    path.write_bytes(b"\n".join(lines))


DAMAGE = {
    "a field is missing": (
        lambda raw: replace_line(raw / "ratings.dat", 3, b"1::364::978300060"),
        "ratings.dat line 3: ",
    ),
    "a field is empty": (
        lambda raw: replace_line(raw / "ratings.dat", 9, b"2::::4::978300000"),
        "ratings.dat line 9: item is missing",
    ),
    "a field is no number": (
        lambda raw: replace_line(raw / "ratings.dat", 2, b"1::34::five::978300060"),
        "ratings.dat line 2: rating is 'five', not a number",
    ),
    "an item is not in the catalogue": (
        lambda raw: replace_line(raw / "ratings.dat", 4, b"1::9999::3::978300060"),
        "ratings.dat line 4: item 9999 is not in the catalogue",
    ),
    "the catalogue is empty": (lambda raw: cut(raw / "movies.dat", 0), "movies.dat: the catalogue is empty"),
    "there are no events": (lambda raw: cut(raw / "ratings.dat", 0), "ratings.dat: holds no events"),
    "a movie has no genres field": (
        lambda raw: replace_line(raw / "movies.dat", 2, b"2::Jumanji (1995)"),
        "movies.dat line 2: 2 fields, expected 3",
    ),
    "the catalogue is not there": (lambda raw: (raw / "movies.dat").unlink(), "movies.dat is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_raw_files(damage, userllm, raw, tmp_path):
    do, expected = DAMAGE[damage]
    do(raw)
    said = userllm("data", "prepare", "movielens", "--path", raw, "--out", tmp_path / "tiny", cwd=tmp_path)
    assert expected in said.error
    assert str(raw) in said.error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


def test_a_truncated_zip(userllm, raw, tmp_path):
    archive = tmp_path / "ml.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("movies.dat", "ratings.dat"):
            file.write(raw / name, f"ml-1m/{name}")
    cut(archive, archive.stat().st_size - 200)
    said = userllm(
        "data", "prepare", "movielens", "--path", archive, "--out", tmp_path / "tiny", cwd=tmp_path
    )
    assert f"{archive}: truncated or damaged zip" in said.error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ml.zip", "raw"]


def test_a_wrong_checksum(userllm, tmp_path, monkeypatch):
    served = tmp_path / "published" / "ml-1m.zip"
    served.parent.mkdir()
    served.write_bytes(b"not what was pinned")
    release = replace(releases.RELEASES["movielens-1m"], url=served.as_uri())
    monkeypatch.setitem(releases.RELEASES, "movielens-1m", release)
    said = userllm("data", "prepare", "movielens-1m", "--out", tmp_path / "tiny", cwd=tmp_path)
    assert f"{served.as_uri()}: wrong checksum, sha256 is " in said.error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["published"]


def test_a_release_that_is_not_found_by_itself(userllm, tmp_path):
    said = userllm("data", "prepare", "movielens", cwd=tmp_path)
    assert "give your copy of the release with --path" in said.error
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_events(userllm, finished, tmp_path):
    prepared = tmp_path / "tiny"
    shutil.copytree(finished / "runs/demo/dataset", prepared)
    card = json.loads((prepared / "card.json").read_text())
    files = prepared / card["files"]
    users = pl.read_parquet(files / "users.parquet")
    ghost = pl.DataFrame({"user": [12], "id": ["ghost"]}, schema=users.schema)
    pl.concat([users, ghost]).write_parquet(files / "users.parquet")
    offsets = np.load(files / "offsets.npy")
    np.save(files / "offsets.npy", np.append(offsets, offsets[-1]))
    (prepared / "card.json").write_text(json.dumps(card | {"users": 13}))
    said = userllm("data", "inspect", prepared, cwd=tmp_path)
    assert f"{files / 'users.parquet'}: user ghost has no events" in said.error


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("evaluation.usres=3", "usres"),
        ("evalation.users=3", "evalation"),
        ("tasks.next_item.promt=Next", "promt"),
        ("evaluation.users=many", "evaluation.users"),
        ("evaluation=3", "evaluation is a group of settings"),
        ("pretrain.batch=3", "pretrain.batch is a group of settings"),
        ("split.kind=random", "split.kind"),
        ("encoder.heads=3", "encoder.width 16 is not a multiple of encoder.heads 3"),
        ("pretrain.batch.events=3", "pretrain.batch.events 3"),
        ("tasks={}", "tasks: give at least one task"),
        ("name=../demo", "name is '../demo'"),
        ("tasks={a/b: {}}", "tasks: 'a/b' is a task's name; give a plain one"),
        ("data.release=null", "data: give release"),
        ("pretrain.epcohs=3", "'pretrain' does not accept option 'epcohs'"),
        ("pretrain.epochs=many", "\"pretrain.epochs\": Expected a <class 'float'>. Got value: many"),
        ("fusion.perceiver.latent=3", "'fusion.perceiver' does not accept option 'latent'"),
        (
            "data.table=mine",
            "data.table is a group of settings, not 'mine'; set one of them (data.table.x=...), or null",
        ),
        ("data.table.fields=[rating]", "data.table: field 'rating': give COLUMN:KIND"),
        ("data.table.memory=foo", "data.table: memory is 'foo'; give a size like"),
        ("data.table.after=tomorrow", "data.table: after is 'tomorrow'; give a date like"),
        ("data.table.items.titel=x", "does not accept option 'items.titel'"),
        ("evaluation.users", "not of the form a.b=c"),
        ("evaluation.users=[", "not YAML"),
    ],
)
def test_a_wrong_setting(override, expected, userllm, finished, tmp_path):
    said = userllm("run", finished / "config.yaml", override, cwd=tmp_path)
    assert expected in said.error
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_in_the_file(userllm, tmp_path):
    (tmp_path / "c.yaml").write_text("name: demo\nencoder: {layer: 2}\n")
    said = userllm("run", "c.yaml", cwd=tmp_path)
    assert said.error.startswith("error: c.yaml: ")
    assert "layer" in said.error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "expected"), [("a: [", "not YAML"), ("- 1\n", "is a list"), (None, "no such")]
)
def test_a_file_that_is_no_configuration(content, expected, userllm, tmp_path):
    if content is not None:
        (tmp_path / "c.yaml").write_text(content)
    assert expected in userllm("run", "c.yaml", cwd=tmp_path).error


def test_a_language_model_without_tokenizer(userllm, finished, tmp_path):
    model, _ = tiny_language_model("llama")
    model.save_pretrained(tmp_path / "lm")
    said = userllm(
        "run", finished / "config.yaml", f"data.path={finished / 'raw'}", "pretrain=null", f"lm.name={tmp_path / 'lm'}",
        cwd=tmp_path,
    )  # fmt: skip
    assert f"{tmp_path / 'lm'}: tokenizer.json (the tokenizer) is missing" in said.error
    run = tmp_path / "runs/demo"
    assert not (run / "contextualize/model").exists()
    assert not (run / "metrics.json").exists()


WITH_ITEMS = [
    "data", "prepare", "table", "--path", "a.csv", "--user", "u", "--item", "i", "--time", "t", "--items",
]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["run"], "CONFIG (see userllm run --help)"),
        (["data", "prepare", "netflix"], "invalid choice: 'netflix'"),
        (["data", "inspect", "nowhere"], "nowhere: not a prepared dataset"),
        (["data", "inspect", "runs/demo/dataset", "--user", "99"], "no user '99'"),
        (["report", "nowhere"], "nowhere"),
        (["run", "config.yaml", "name=.."], "name is '..'; give the plain name of a folder"),
        (
            ["run", "config.yaml", "--runs", "config.yaml"],
            "config.yaml/demo: Not a directory; choose another place",
        ),
        (
            ["embed", "runs/demo", "--out", "config.yaml"],
            "config.yaml: Not a directory; choose another place",
        ),
        (
            [*WITH_ITEMS, "b.csv"],
            "items.key: say which column",
        ),
        (["recommend", "runs/demo"], "one of the arguments --user --history is required"),
        (["recommend", "nowhere", "--user", "1"], "nowhere: neither a run folder nor a saved model"),
        (["recommend", "runs/demo", "--user", "99"], "no user '99'"),
        (["recommend", "runs/demo/contextualize/model", "--user", "1"], "--user needs --data DIR"),
        (["recommend", "runs/demo", "--history", "nowhere.json"], "nowhere.json: no such history file"),
        (["recommend", "runs/demo", "--history", "config.yaml", "--data", "raw"], "--data goes with --user"),
        (["recommend", "runs/demo", "--history", "config.yaml"], "config.yaml line 1: not JSON"),
        (["recommend", "runs/demo", "--user", "1", "-k", "0"], "k is 0"),
        (["recommend", "runs/demo", "--user", "1", "-k", "few"], "argument -k: invalid int value: 'few'"),
        (["recommend", "runs/demo", "--user", "1", "--task", "review"], "it knows next_item, favorite_genre"),
        (["generate", "runs/demo", "--user", "1"], "--prompt"),
        (
            ["generate", "runs/demo", "--user", "1", "--prompt", "Hi", "--max-new-tokens", "0"],
            "--max-new-tokens is 0",
        ),
        (["generate", "runs/demo", "--user", "1", "--prompt", "Hi", "--chat"], "no chat template"),
    ],
)
def test_a_wrong_command_line(argv, expected, userllm):
    assert expected in userllm(*argv).error


def test_settings_may_follow_an_option(tmp_path):
    before = parse(["run", "c.yaml", "threads=1", "seed=2", "--runs", str(tmp_path)])
    after = parse(["run", "c.yaml", "threads=1", "--runs", str(tmp_path), "seed=2"])
    assert before == after and after.overrides == ["threads=1", "seed=2"]


@pytest.mark.parametrize("word", ["--seed=2", "seed"])
def test_what_is_no_setting_is_refused(userllm, word):
    assert (
        f"unrecognized arguments: {word}" in userllm("run", "c.yaml", "threads=1", "--runs", "r", word).error
    )


@pytest.mark.parametrize(
    ("record", "content", "problem"),
    [
        ("stages.json", "{", "stages.json, line 1: not JSON"),
        ("stages.json", "[]", "stages.json: a JSON object is expected, not a list; remove it"),
        ("dataset.json", "\n{]", "dataset.json, line 2: not JSON"),
        ("dataset.json", "{}", "dataset.json: 'folder' is missing; remove it"),
        ("contextualize/trainable.json", '{"lm":', "trainable.json, line 1: not JSON"),
    ],
)
def test_a_damaged_record_of_a_run(record, content, problem, userllm, finished, tmp_path):
    shutil.copytree(finished / "runs/demo", tmp_path / "runs/demo")
    (tmp_path / "runs/demo" / record).write_text(content)
    (tmp_path / "runs/demo/metrics.json").unlink()  # so that there is something to do
    (tmp_path / "raw").symlink_to(finished / "raw")
    said = userllm("run", finished / "config.yaml", cwd=tmp_path)
    assert problem in said.error


def test_an_export_is_called_what_it_is(userllm):
    said = userllm("embed", "runs/demo", "--out", "s", "--export", "users.csv")
    assert "--export users.csv: the file is Parquet; call it users.parquet" in said.error
