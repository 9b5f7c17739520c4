"""Runs by several processes of this machine, and what they are compared by."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from userllm.cli.configuration import load_config
from userllm.pipeline import Run

TOLERANCE = 1e-5
"""Relative difference allowed between a loss of two processes and of one. Sums in another order make about 1e-7."""

CONFIG = """\
name: run
threads: 1
data: {release: synthetic}
encoder: {layers: 1, width: 16, heads: 2, feed_forward: 32, item_width: 16, max_length: 30, dropout: 0.0}
pretrain: {epochs: 0.5, batch: {events: 300}, evaluate_every: 0.25, optimization: {log_every: 1, save_every: 3}}
lm: {name: tiny-random-llama}
fusion: {layers: "last:2", events: 8, cross_attention: {heads: 2, head_width: 8}}
contextualize: {steps: 8, histories: 5, examples_per_history: 2, optimization: {log_every: 1, save_every: 3}}
evaluation: {users: 50, list_length: 10, beams: 10, batch: 16, knowledge_tokens: 64}
"""
CLOSED = """\
tasks:
  next_item: {prompt: The next movie this user will watch is, teacher: 0.5}
  favorite_genre: {kind: favorite_category, prompt: This user's favorite movie genre is}
"""
OPEN = """\
tasks:
  next_item: {prompt: The next movie this user will watch is}
  genres: {kind: genre_preference, prompt: "This user's favorite genres are", target_tokens: 12}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two configurations; what is run there has a cache of its own."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "config.yaml").write_text(CONFIG + CLOSED)
    (folder / "texts.yaml").write_text(CONFIG + OPEN)
    return folder


@pytest.fixture(scope="module")
def environment(work: Path) -> dict[str, str]:
    return os.environ | {"USERLLM_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def together(work: Path, environment: dict[str, str]) -> Callable[..., list[tuple[str, str]]]:
    """The same Python command in ``count`` processes, as a launcher would start them; what each wrote, out and err."""

    def run(count: int, *command: str, timeout: float = 280) -> list[tuple[str, str]]:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [
            subprocess.Popen(
                [sys.executable, *command],
                cwd=work,
                env=environment | group | {"RANK": str(number), "LOCAL_RANK": str(number)},
                **pipes,
            )
            for number in range(count)
        ]
        try:
            said = [process.communicate(timeout=timeout) for process in started]
        finally:
            for process in started:  # when one has failed, the others wait for it
                process.kill()
        assert [process.returncode for process in started] == [0] * count, said
        return said

    return run


@pytest.fixture
def alone(work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A run in this process, up to a stage; returns its folder."""

    def run(last: str, *overrides: str, file: str = "config.yaml") -> Path:
        monkeypatch.setenv("USERLLM_CACHE", str(work / "cache"))
        config, plain = load_config(work / file, overrides)
        return Run(config, plain, work / "runs").through(last)

    return run


@pytest.fixture(scope="session")
def curve() -> Callable[[Path, str], list[dict[str, float]]]:
    """The log of a stage of a run, without the seconds it tells, and the mean over what a resumed training did."""

    def read(folder: Path, stage: str) -> list[dict[str, float]]:
        log = json.loads((folder / stage / "log_history.json").read_text())
        timed = ("runtime", "per_second", "cpu_s", "train_loss")
        return [{n: value for n, value in entry.items() if not n.endswith(timed)} for entry in log]

    return read


@pytest.fixture(scope="session")
def same_curve(curve) -> Callable[[Path, Path], None]:
    """Two runs logged the same in both stages, up to ``TOLERANCE``."""

    def check(one: Path, other: Path, stages: Sequence[str] = ("pretrain", "contextualize")) -> None:
        for stage in stages:
            first, second = curve(one, stage), curve(other, stage)
            assert [entry.keys() for entry in first] == [entry.keys() for entry in second]
            assert sum("loss" in entry for entry in first) > 5
            for a, b in zip(first, second, strict=True):
                for name in a:
                    # a gradient's norm sums up what has nearly cancelled out
                    allowed = 20 * TOLERANCE if name == "grad_norm" else TOLERANCE
                    assert math.isclose(a[name], b[name], rel_tol=allowed, abs_tol=1e-7), (stage, name, a, b)

    return check


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Everything a run has learned."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        files = [
            folder / "pretrain/encoder/encoder.safetensors",
            *folder.glob("contextualize/model/**/*.safetensors"),
        ]
        assert len(files) > 2
        return {f"{file.name}/{name}": w for file in files for name, w in load_file(file).items()}

    return read
