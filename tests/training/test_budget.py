"""Training by time: the rate follows the seconds, a resumed training keeps those it had used."""

import json

import pytest
import torch

from userllm.training.alignment import AlignmentConfig
from userllm.training.budget import Budget


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told."""

    class Clock:
        now = 100.0

    monkeypatch.setattr("userllm.clock.time.process_time", lambda: Clock.now)
    return Clock


def test_the_rate_rises_and_falls_with_the_seconds(clock):
    budget = Budget(10.0, 0.1, torch.device("cpu"))
    budget.on_train_begin(None, None, None)
    rates = []
    for clock.now in (100, 100.5, 101, 105.5, 110, 120):
        rates.append(budget.rate())
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0, 0])
    assert budget.share == 1


def test_what_comes_before_the_first_step_takes_nothing_from_the_warm_up(clock, tmp_path):
    """The LM's states of titles, or an alignment: paid for by the budget, but no part of the schedule."""
    budget = Budget(10.0, 0.1, torch.device("cpu"))
    clock.now = 102.0
    budget.on_train_begin(None, None, None)
    rates = []
    for clock.now in (102, 102.4, 102.8, 106.4, 110):
        rates.append(budget.rate())
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])
    clock.now = 102.4
    budget.save(tmp_path)
    second = Budget(10.0, 0.1, torch.device("cpu"))
    second.resume(tmp_path)
    second.on_train_begin(None, None, None)
    assert second.rate() == pytest.approx(0.5)


def test_an_interrupted_training_has_used_what_it_had(clock, tmp_path):
    budget = Budget(10.0, 0.1, torch.device("cpu"))
    clock.now = 104.0
    budget.save(tmp_path)
    clock.now = 500.0
    second = Budget(10.0, 0.1, torch.device("cpu"))
    second.resume(tmp_path)
    clock.now = 501.0
    assert second.used == pytest.approx(5.0)


def test_what_was_found_done_counts(clock, tmp_path):
    found = [3.0]  # before the training: not its business
    budget = Budget(10.0, 0.1, torch.device("cpu"), lambda: found[0])
    clock.now, found[0] = 101.0, 7.0
    assert budget.used == pytest.approx(5.0)
    budget.save(tmp_path)
    second = Budget(10.0, 0.1, torch.device("cpu"), lambda: found[0])
    second.resume(tmp_path)
    assert second.used == pytest.approx(5.0)


def test_training_ends_with_its_time(run_contextualize, tmp_path):
    _, _, history = run_contextualize(tmp_path / "contextualize", steps=10**6, seconds=0.3)
    facts = json.loads((tmp_path / "contextualize" / "training.json").read_text())
    assert 0.3 <= facts["seconds"] < 3
    assert facts["examples"] == 8 * facts["steps"]
    logged = [entry for entry in history if "learning_rate" in entry]
    assert logged[-1]["epoch"] == 1


def test_steps_are_counted_without_a_budget(run_contextualize, tmp_path):
    run_contextualize(tmp_path / "contextualize", steps=3)
    facts = json.loads((tmp_path / "contextualize" / "training.json").read_text())
    assert facts.pop("took") > 0
    assert facts == {"steps": 3, "examples": 24, "seconds": None}


def test_a_resumed_training_by_time(run_contextualize, interrupted, tmp_path):
    with interrupted(step=4):
        run_contextualize(tmp_path / "contextualize", seconds=1.0)
    used = json.loads((tmp_path / "contextualize" / "checkpoint-4" / "seconds.json").read_text())["used"]
    assert used > 0
    run_contextualize(tmp_path / "contextualize", seconds=used + 0.05)
    facts = json.loads((tmp_path / "contextualize" / "training.json").read_text())
    assert facts["steps"] > 4 and facts["seconds"] >= used + 0.05


def test_what_an_alignment_took_is_charged_once_more_after_an_interruption(
    run_contextualize, interrupted, tmp_path
):
    """Killed before stage 2's first checkpoint, the alignment behind it: it is not done again, and not free."""
    folder = tmp_path / "contextualize"
    told = {"alignment": AlignmentConfig(steps=2, histories=4), "seconds": 30.0}
    with interrupted(step=4, complete=False):
        run_contextualize(folder, **told)
    took = folder / "alignment" / "seconds.json"
    assert json.loads(took.read_text())["used"] > 0
    took.write_text(json.dumps({"used": 30.0}))
    run_contextualize(folder, **told)
    facts = json.loads((folder / "training.json").read_text())
    assert facts["steps"] == 1 and facts["seconds"] >= 30


def test_pretraining_ends_with_its_time_after_a_validation(run_pretrain, tmp_path):
    _, history = run_pretrain(tmp_path / "pretrain", epochs=1000, seconds=0.3)
    assert "eval_recall@10" in [entry for entry in history if "train_runtime" not in entry][-1]
