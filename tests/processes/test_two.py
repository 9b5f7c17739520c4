"""Two processes do what one does: the same loss curve, the same numbers of an evaluation, one set of files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from userllm import processes
from userllm.cli.configuration import load_config
from userllm.data.batches import BatchConfig
from userllm.errors import UserError
from userllm.pipeline import Run
from userllm.training.contextualize import ContextualizeConfig, contextualize
from userllm.training.examples import ExampleBatches
from userllm.training.pretrain import PretrainBatches, PretrainConfig


@pytest.fixture(scope="module")
def two(work: Path, together) -> tuple[Path, list[tuple[str, str]]]:
    """A whole run by two processes, and what they said."""
    said = together(2, "-m", "userllm", "run", "config.yaml", "name=two")
    return work / "runs" / "two", said


def test_two_processes_train_as_one_does(two, alone, same_curve, weights):
    folder, _ = two
    one = alone("contextualize", "name=one")
    same_curve(one, folder)
    first, second = weights(one), weights(folder)
    assert first.keys() == second.keys()
    # Adam makes a step of full size out of a gradient that is nothing but rounding
    assert all(torch.allclose(first[name], second[name], atol=2e-3) for name in first)


def test_two_processes_measure_exactly_what_one_does(work, two, alone):
    """The same model, evaluated once more by this process alone."""
    folder, _ = two
    shutil.copytree(folder, work / "runs" / "again")
    (work / "runs/again/metrics.json").unlink()
    again = alone("evaluate", "name=again")
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (folder, again)]
    assert metrics[0]["tasks"]["next_item"]["n"] == 50
    assert metrics[0]["tasks"] == metrics[1]["tasks"]
    assert metrics[0]["knowledge"] == metrics[1]["knowledge"]
    assert metrics[0]["hardware"] == metrics[1]["hardware"] + ", 2 processes"
    tables = [pl.read_parquet(run / "per_user.parquet") for run in (folder, again)]
    assert tables[0].equals(tables[1])
    asked = tables[0].filter(pl.col("task") == "next_item", pl.col("system") == "user_llm")
    assert asked["user"].n_unique() == len(asked) == 50


def test_one_process_writes_and_speaks(two):
    folder, [(out, _), (other_out, other_err)] = two
    assert "report:" in out and "next_item: 50 of" in out
    assert other_out == ""
    assert "language model" not in other_err
    assert (folder / "report.html").is_file()
    kept = {file.name for file in (folder / "contextualize" / "checkpoint-8").iterdir()}
    assert {"complete", "rng_state_0.pth", "rng_state_1.pth", "trainable.safetensors"} <= kept
    assert not list(folder.rglob("*.partial"))


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """From now on this is process ``number`` of ``count``, for whatever needs no word from the others."""

    def be(number: int, count: int) -> None:
        monkeypatch.setattr(processes, "number", lambda: number)
        monkeypatch.setattr(processes, "count", lambda: count)

    return be


def shares_make_the_whole(known, step, count, as_process) -> list:
    """What one process knows of a step, which is also what so many know together."""
    as_process(0, 1)
    whole = known(step)
    shares = []
    for number in range(count):
        as_process(number, count)
        shares += known(step)
    assert sorted(shares) == sorted(whole)
    return whole


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_shares_of_a_batch_are_the_batch(count, as_process, stored, split, make_user_llm, dataset):
    """Every example once, in one of the shares, also where there are more processes than users."""
    config = ContextualizeConfig(steps=5, histories=5, examples_per_history=3)
    batches = ExampleBatches(make_user_llm(), dataset, split, stored, config, seed=3)

    def known(step: int) -> list[tuple]:
        examples = batches.batch(step)["examples"]
        items = examples.histories.fields["item"]
        seen = [items[row, :end].tolist() for row, end in zip(examples.rows, examples.ends, strict=True)]
        return list(zip(map(tuple, seen), examples.task.tolist(), examples.answers.tolist(), strict=True))

    for step in range(5):
        shares_make_the_whole(known, step, count, as_process)


@pytest.mark.parametrize("count", [2, 5])
def test_the_shares_of_a_pretraining_batch_are_the_batch(count, as_process, stored, split):
    batches = PretrainBatches(stored, split, 12, PretrainConfig(batch=BatchConfig(events=30)), seed=3)

    def known(step: int) -> list[list[int]]:
        batch = batches.batch(step)
        assert batch["inputs"].mask.shape[0] > 0
        pairs = zip(batch["targets"].fields["item"], batch["targets"].mask, strict=True)
        return [items[mask].tolist() for items, mask in pairs if mask.any()]

    smallest = 99
    for step in range(2 * batches.per_epoch):
        whole = shares_make_the_whole(known, step, count, as_process)
        smallest = min(smallest, len(whole))
    assert smallest < 5  # so that some process of five had none


def test_every_task_gets_a_stand_in(stored, split, make_user_llm, dataset):
    config = ContextualizeConfig(steps=1, histories=1, examples_per_history=1)
    batches = ExampleBatches(make_user_llm(), dataset, split, stored, config, seed=3)
    examples = batches.batch(0)["examples"]
    assert len(examples.task) == 1
    more = examples.with_stand_ins()
    assert sorted(more.task.tolist()) == [0, 1]
    assert more.stand_ins == 1 and more.task[0] == examples.task[0]
    assert len(more.rows) == len(more.ends) == len(more.answers) == len(more.texts) == 2
    assert more.with_stand_ins().stand_ins == 0


def test_one_process_alone():
    assert (processes.count(), processes.number(), processes.is_main()) == (1, 0, True)
    assert processes.spread([3, 4, 5], lambda n: n * n) == [9, 16, 25]
    assert processes.told(lambda: "said") == "said"
    assert processes.total(2.5) == 2.5
    with processes.one_batch():
        assert (processes.share(7), processes.share(0), processes.shares()) == (7, 1, 1)
    with processes.main_first():
        processes.wait()
    assert list(np.arange(5)[processes.own_places(5)]) == [0, 1, 2, 3, 4]


def test_sharding_needs_several_processes(work, monkeypatch):
    monkeypatch.setenv("USERLLM_CACHE", str(work / "cache"))
    config, plain = load_config(work / "config.yaml", ["name=lonely"])
    with pytest.raises(UserError, match="torchrun"):
        Run(config, plain, work / "runs", fsdp=True).through("pretrain")


def test_a_prompt_read_ahead_is_refused_where_the_lm_learns(run_sharded):
    with pytest.raises(UserError, match=r"fusion\.attend"):
        run_sharded("lora", attend="answer")


@pytest.fixture
def run_sharded(make_user_llm, dataset, split, stored, tmp_path):
    def run(strategy: str, **fusion: str) -> None:
        model = make_user_llm(strategy, **fusion)
        contextualize(model, dataset, split, stored, ContextualizeConfig(steps=1), tmp_path, 0, fsdp=True)

    return run


def test_the_first_version_of_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="--fsdp_version 2"):
        processes.fsdp_asked()
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert processes.fsdp_asked() is False


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (
            "2",
            "WORLD_SIZE is 2, and RANK, MASTER_ADDR, MASTER_PORT not set: several processes are started by torchrun",
        ),
        ("two", "the environment's WORLD_SIZE is 'two'; a launcher sets it to a number, or unset it"),
    ],
)
def test_half_a_launchers_environment_is_refused(size, said, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=said):
        processes.start()
