"""What stages.json knows of a stage that did not come to its end."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from userllm.pipeline.stages import Stages


def record(folder):
    return json.loads((folder / "stages.json").read_text())["pretrain"]


def test_seconds_before_an_error_count(tmp_path):
    stages = Stages(tmp_path, {"seed": 1})

    def interrupted() -> None:
        with stages.stage("pretrain", ["seed"], lambda: False) as todo:
            assert todo
            time.sleep(0.3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    first = record(tmp_path)
    assert not first["done"] and first["seconds"] >= 0.3
    with stages.stage("pretrain", ["seed"], lambda: False) as todo:
        assert todo
        time.sleep(0.3)
    second = record(tmp_path)
    assert second["done"] and second["seconds"] >= first["seconds"] + 0.3
    with stages.stage("pretrain", ["seed"], lambda: True) as todo:
        assert not todo


def test_other_settings_begin_at_nought(tmp_path):
    for seed in (1, 2):
        with Stages(tmp_path, {"seed": seed}).stage("pretrain", ["seed"], lambda: True) as todo:
            assert todo
            time.sleep(0.2)
    assert record(tmp_path)["seconds"] < 0.4


def test_what_a_wrong_setting_put_aside_comes_back(tmp_path):
    """A finished training; then a setting that turns out to be wrong once its stage has begun."""
    made = tmp_path / "contextualize" / "model"

    def stage(steps):
        return Stages(tmp_path, {"steps": steps}).stage("contextualize", ["steps"], made.exists)

    def fails():
        with stage(-1) as todo:
            assert todo and not made.exists()
            raise ValueError("a wrong setting")

    with stage(10):
        made.mkdir(parents=True)
    before = json.loads((tmp_path / "stages.json").read_text())
    for _ in range(2):
        with pytest.raises(ValueError, match="a wrong setting"):
            fails()
    with stage(10) as todo:
        assert not todo and made.exists()
    assert json.loads((tmp_path / "stages.json").read_text()) == before
    with stage(20) as todo:
        assert todo and not made.exists()
        made.mkdir(parents=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["contextualize", "stages.json"]
    assert [path.name for path in (tmp_path / "contextualize").iterdir()] == ["model"]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from userllm.pipeline import stages
stages.TOLD_EVERY = 0.05
with stages.Stages(Path(sys.argv[1]), {"seed": 1}).stage("pretrain", ["seed"], lambda: False):
    end = time.process_time() + 0.6
    while time.process_time() < end:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow  # a process that loads torch
def test_seconds_before_kill_9_count(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert not record(tmp_path)["done"]
    assert record(tmp_path)["seconds"] >= 0.3 and record(tmp_path)["cpu_seconds"] >= 0.3
