"""Two cells of the family and two of the reviews at smoke scale, done in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from userllm.cli import main
from userllm.experiments.definition import load_experiment
from userllm.experiments.runner import Runner

QUICK = ["pretrain.seconds=0.1", "contextualize.seconds=0.2", "evaluation.users=12", "threads=1"]


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """The folder of the cells, and every call of userllm that it took."""
    out, calls = tmp_path_factory.mktemp("experiments"), []

    def launch(arguments: list[str]) -> int:
        calls.append(arguments)
        return main(arguments)

    runner = Runner(out, launch)
    failed = runner.run([load_experiment("family")], "smoke", only=["reference", "proj"], extra=QUICK)
    assert failed == []
    return out, calls


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two cells whose models write texts."""
    out = tmp_path_factory.mktemp("reviews")
    runner = Runner(out, main)
    failed = runner.run([load_experiment("reviews")], "smoke", only=["reference", "full"], extra=QUICK)
    assert failed == []
    return out
