"""A worker that is killed takes the others down; the same command goes on to the very weights of an undisturbed run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

# starting processes takes most of the time: minutes on a busy machine
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

SCRIPT = """
import os, signal, sys
from pathlib import Path
from userllm.cli import main
from userllm.training import contextualize, pretrain

for kind, stage, process, step in (
    (pretrain.PretrainBatches, "pretrain", "1", 5), (contextualize.ExampleBatches, "contextualize", "0", 7)
):
    def batch(self, number, original=kind.batch, stage=stage, process=process, step=step):
        killed = Path(f"killed-{sys.argv[1]}-{stage}")
        if "cut" in sys.argv[1] and number == step and os.environ["RANK"] == process and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, number)
    kind.batch = batch
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp"])
def test_a_killed_worker_resumes(work: Path, environment, sharded, curve, weights):
    (work / "killed.py").write_text(SCRIPT)
    how = "fsdp" if sharded else "ddp"

    def run(name: str, restarts: int = 0) -> int:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command += ["--max-restarts", str(restarts), "killed.py", name, "contextualize", "config.yaml"]
        # with dropout, so that random numbers have to be where they were
        command += [f"name={name}", "encoder.dropout=0.2", *(["--fsdp"] if sharded else [])]
        done = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, timeout=1400
        )
        if done.returncode:
            assert "Signal 9" in done.stderr or "exitcode  : -9" in done.stderr, done.stderr
        return done.returncode

    assert run(f"whole-{how}") == 0
    assert run(f"cut-{how}") != 0
    assert (work / f"killed-cut-{how}-pretrain").exists()
    assert not (work / "runs" / f"cut-{how}" / "contextualize").exists()
    # the launcher starts all of them again when one is killed in stage 2
    assert run(f"cut-{how}", restarts=1) == 0
    assert (work / f"killed-cut-{how}-contextualize").exists()
    whole, cut = work / "runs" / f"whole-{how}", work / "runs" / f"cut-{how}"
    for stage in ("pretrain", "contextualize"):
        assert curve(whole, stage) == curve(cut, stage)
    first, second = weights(whole), weights(cut)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
