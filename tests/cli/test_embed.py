"""``userllm embed``, and the commands that answer from its store."""

import json
import shutil

import polars as pl
import pytest


@pytest.fixture
def store(userllm, tmp_path):
    folder = tmp_path / "store"
    said = userllm("embed", "runs/demo", "--out", folder, "--keys-values", "--state")
    assert said.code == 0, said.err
    assert "12 of 12 users" in said.out and f"{folder}: 12 users" in said.out
    return folder


def test_answers_from_the_store(userllm, store):
    for command in (
        ["recommend", "-k", "5", "--json"],
        ["score", "--items", "1", "Heat (1995)", "--json"],
        ["generate", "--prompt", "Tonight", "--max-new-tokens", "4"],
    ):
        name, *options = command
        plain = userllm(name, "runs/demo", "--user", "6", *options)
        stored = userllm(name, "runs/demo", "--user", "6", "--store", store, *options)
        assert stored.code == 0, stored.err
        if name == "generate":
            assert stored.out == plain.out
            continue
        ours, theirs = json.loads(stored.out), json.loads(plain.out)
        assert ours["events"] == theirs["events"] == 10
        for side in ("with_user", "without_user") if name == "recommend" else ("answers",):
            assert [a["item"] for a in ours[side]] == [a["item"] for a in theirs[side]]
            assert [a["log_likelihood"] for a in ours[side]] == pytest.approx(
                [a["log_likelihood"] for a in theirs[side]], abs=1e-4
            )


def test_a_second_run_does_what_is_missing(userllm, store, tmp_path):
    (tmp_path / "some.txt").write_text("3\n\n5\n")
    said = userllm("embed", "runs/demo", "--out", tmp_path / "other", "--users", tmp_path / "some.txt")
    assert "2 users: 0 were there already, 2 new" in said.out
    said = userllm("embed", "runs/demo", "--out", tmp_path / "other", "--export", tmp_path / "users.parquet")
    assert "12 users: 2 were there already, 10 new" in said.out
    assert "12 rows, the last user embedding of each user" in said.out
    assert len(pl.read_parquet(tmp_path / "users.parquet")) == 12


def test_a_store_that_does_not_fit(userllm, store, finished, tmp_path):
    ask = ("recommend", "runs/demo", "--store", store)
    assert "no user '99'; users look like" in userllm(*ask, "--user", "99").error
    assert "no store of users; `userllm embed" in userllm(*ask[:3], tmp_path, "--user", "6").error
    dataset = json.loads((finished / "runs/demo/dataset.json").read_text())["folder"]
    assert "a dataset, no store of users" in userllm(*ask[:3], dataset, "--user", "6").error
    (tmp_path / "history.json").write_text("[]")
    assert "--store goes with --user" in userllm(*ask, "--history", tmp_path / "history.json").error
    assert (
        "this store's keys_values is True, not False" in userllm("embed", "runs/demo", "--out", store).error
    )
    assert (
        "--every-event says what --export writes"
        in userllm("embed", "runs/demo", "--out", store, "--every-event").error
    )
    assert "--users" in userllm("embed", "runs/demo", "--out", store, "--users", tmp_path / "none.txt").error
    model = tmp_path / "model"
    shutil.copytree(finished / "runs/demo/contextualize/model", model)
    said = userllm("recommend", model, "--user", "6", "--store", store)
    assert said.code == 0 and "was not checked" in said.err
    assert "embed needs --data DIR" in userllm("embed", model, "--out", store).error
    card = json.loads((store / "card.json").read_text())
    card["model"]["fusion"] = "0" * 64
    (store / "card.json").write_text(json.dumps(card))
    said = userllm(*ask, "--user", "6")
    assert "another model computed these users: its fusion has sha256 000000000000" in said.error


def test_users_who_left_the_dataset_are_told_of_and_removed(userllm, store, finished, tmp_path):
    """Somebody asked to be forgotten: the dataset is prepared without them, under the same name."""
    raw = tmp_path / "raw"
    shutil.copytree(finished / "raw", raw)
    lines = (raw / "ratings.dat").read_bytes().splitlines(keepends=True)
    (raw / "ratings.dat").write_bytes(b"".join(line for line in lines if not line.startswith(b"6::")))
    data = tmp_path / "data"
    said = userllm("data", "prepare", "movielens", "--path", raw, "--out", data)
    assert said.code == 0, said.err
    again = ["embed", "runs/demo", "--data", data, "--out", store, "--keys-values", "--state"]
    said = userllm(*again)
    assert said.code == 0, said.err
    assert f"in the store but not in {data}: 6; --prune removes them" in said.out
    said = userllm(*again, "--prune", "--export", tmp_path / "users.parquet")
    assert said.code == 0, said.err
    assert ": 6; removed" in said.out and f"{store}: 11 users" in said.out
    assert "6" not in pl.read_parquet(tmp_path / "users.parquet")["user"].to_list()
    assert "but not in" not in userllm(*again).out
