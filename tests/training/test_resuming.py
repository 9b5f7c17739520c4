"""A training that was cut off goes on to the very weights of one that was not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from userllm.data.batches import BatchConfig
from userllm.errors import UserError
from userllm.training import trainer as trainer_module
from userllm.training.trainer import COMPLETE, TRAIN_CPU, last_checkpoint


def without_times(history):
    """The log without the seconds it tells."""
    kept = [entry for entry in history if "train_runtime" not in entry]
    return [{name: value for name, value in entry.items() if name != TRAIN_CPU} for entry in kept]


def test_cpu_seconds_of_training_add_up_over_a_break(run_pretrain, interrupted, tmp_path):
    with interrupted(step=8):
        run_pretrain(tmp_path / "pretrain")
    _, history = run_pretrain(tmp_path / "pretrain")
    seconds = [entry[TRAIN_CPU] for entry in history if TRAIN_CPU in entry]
    assert len(seconds) > 2 and seconds[0] > 0 and seconds == sorted(seconds)


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_pretraining(run_pretrain, interrupted, same_weights, tmp_path):
    whole, history = run_pretrain(tmp_path / "whole" / "pretrain")
    assert len(history) > 5
    with interrupted(step=4):
        run_pretrain(tmp_path / "cut" / "pretrain")
    assert checkpoints(tmp_path / "cut" / "pretrain") == ["checkpoint-4"]
    with interrupted(step=8, complete=False):
        run_pretrain(tmp_path / "cut" / "pretrain")
    resumed, second = run_pretrain(tmp_path / "cut" / "pretrain")
    same_weights(resumed, whole)
    assert without_times(second) == without_times(history)
    again, third = run_pretrain(tmp_path / "cut" / "pretrain")  # what is finished is not trained on
    same_weights(again, whole)
    assert without_times(third) == without_times(history)


@pytest.mark.parametrize(
    "encoder",
    [
        {"kind": "bert4rec"},
        {"kind": "dual", "negatives": "mixed", "drawn_negatives": 5, "embeddings": 2},
        pytest.param({"kind": "dual", "label": "genres"}, marks=pytest.mark.slow),
    ],
    ids=["bert4rec", "dual", "dual of genres"],
)
def test_pretraining_of_other_encoders(run_pretrain, interrupted, same_weights, tmp_path, encoder):
    whole, history = run_pretrain(tmp_path / "whole" / "pretrain", encoder=encoder)
    metric = "eval_recall@10" if whole.ranks_items else "eval_log_likelihood"
    assert sum(metric in entry for entry in history) > 2
    with interrupted(step=8):
        run_pretrain(tmp_path / "cut" / "pretrain", encoder=encoder)
    resumed, second = run_pretrain(tmp_path / "cut" / "pretrain", encoder=encoder)
    same_weights(resumed, whole)
    assert without_times(second) == without_times(history)


@pytest.mark.parametrize(
    ("strategy", "lm", "cuts"),
    [
        ("enc", "tiny-random-llama", [(4, True), (8, False)]),
        pytest.param("lora", "tiny-random-gpt2", [(8, False)], marks=pytest.mark.slow),  # an LM with dropout
        pytest.param("full", "tiny-random-llama", [(8, True)], marks=pytest.mark.slow),
    ],
)
def test_contextualization(run_contextualize, interrupted, same_weights, tmp_path, strategy, lm, cuts):
    whole, before, history = run_contextualize(tmp_path / "whole" / "contextualize", strategy, lm)
    changed = [name for name, weight in whole.state_dict().items() if not torch.equal(weight, before[name])]
    assert any(".user_block.gate" in name for name in changed)
    folder = tmp_path / "cut" / "contextualize"
    for step, complete in cuts:
        with interrupted(step, complete):
            run_contextualize(folder, strategy, lm)
    resumed, _, second = run_contextualize(folder, strategy, lm)
    same_weights(resumed, whole)
    assert without_times(second) == without_times(history)


def test_checkpoints_hold_trainable_weights_only(run_contextualize, tmp_path):
    model, _, _ = run_contextualize(tmp_path / "contextualize", steps=4)
    weights = load_file(tmp_path / "contextualize" / "checkpoint-4" / "trainable.safetensors")
    trainable = {f"model.{name}" for name, weight in model.named_parameters() if weight.requires_grad}
    assert set(weights) == trainable
    assert not any(".layer." in name or "embed" in name for name in weights)


def test_a_damaged_checkpoint_is_named(run_contextualize, interrupted, tmp_path):
    with interrupted(step=4):
        run_contextualize(tmp_path / "contextualize")
    file = tmp_path / "contextualize" / "checkpoint-4" / "trainable.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(
        UserError, match=r"checkpoint-4/trainable\.safetensors: damaged .*; remove .*checkpoint-4,"
    ):
        run_contextualize(tmp_path / "contextualize")


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (5, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainable.safetensors").touch()
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert checkpoints(tmp_path) == ["checkpoint-10", "checkpoint-5"]


def test_a_checkpoint_of_other_weights_is_refused(run_contextualize, interrupted, tmp_path):
    with interrupted(step=4):
        run_contextualize(tmp_path / "contextualize", "proj")
    with pytest.raises(RuntimeError, match="was the configuration changed"):
        run_contextualize(tmp_path / "contextualize", "enc")


@pytest.mark.parametrize("select", [None, "recall@10", "log_likelihood"])
def test_the_best_weights_are_kept_and_patience_ends(
    run_pretrain, same_weights, tmp_path, monkeypatch, interrupted, select
):
    """Validation peaks at the second of its evaluations; with patience 2 the fourth is the last."""
    chosen, other = (
        ("log_likelihood", "recall@10") if select == "log_likelihood" else ("recall@10", "log_likelihood")
    )
    quality = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.6, 10: 1.0}
    weights, live = {}, {}
    original = trainer_module.StageTrainer.__init__

    def with_made_up_quality(self, model, args, batches, evaluator=None, rates=None, **settings):
        def evaluate():
            weights[self.state.global_step] = {n: w.clone() for n, w in model.state_dict().items()}
            return {chosen: quality[self.state.global_step], other: self.state.global_step}

        live["trainer"] = self
        original(self, model, args, batches, evaluate, rates, **settings)

    monkeypatch.setattr(trainer_module.StageTrainer, "__init__", with_made_up_quality)
    settings = {"patience": 2, "evaluate_every": 2 / 5, "batch": BatchConfig(events=40), "select": select}
    best, history = run_pretrain(tmp_path / "whole" / "pretrain", **settings)
    assert [e["step"] for e in history if "eval_recall@10" in e] == [2, 4, 6, 8]
    assert live["trainer"].state.global_step == 8
    for name, weight in best.state_dict().items():
        assert torch.equal(weight, weights[4][f"encoder.{name}"])
    # cut off right at the end: the checkpoint is there, the decision to stop must not be lost
    settings["optimization"] = trainer_module.OptimizationConfig(
        learning_rate=1e-2, save_every=4, log_every=2
    )
    with interrupted(step=8):
        run_pretrain(tmp_path / "cut" / "pretrain", **settings)
    resumed, history = run_pretrain(tmp_path / "cut" / "pretrain", **settings)
    same_weights(resumed, best)
    assert max(e["step"] for e in history if "eval_recall@10" in e) == 8


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from userllm.cli.configuration import load_config
from userllm.pipeline import Run
from userllm.training import contextualize, pretrain

root, folder, stage, step = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
kind = {"pretrain": pretrain.PretrainBatches, "contextualize": contextualize.ExampleBatches, "": None}[stage]
if kind is not None:
    original = kind.batch
    def batch(self, number):
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, number)
    kind.batch = batch
config, plain = load_config(root / "config.yaml", [f"data.folder={folder}"])
Run(config, plain, root).through("contextualize")
"""

CONFIG = """
name: small
data: {release: null}
split: {min_events: 5}
encoder: {layers: 1, width: 16, heads: 2, feed_forward: 16, item_width: 16, dropout: 0.2, max_length: 12}
pretrain: {epochs: 3, batch: {events: 40}, optimization: {log_every: 2, save_every: 4, learning_rate: 0.01}}
lm: {name: tiny-random-llama}
fusion: {layers: "last:2", events: 6, cross_attention: {heads: 2, head_width: 8}}
contextualize: {steps: 10, histories: 4, optimization: {log_every: 2, save_every: 4, learning_rate: 0.01}}
"""


@pytest.mark.slow
def test_kill_9_in_each_stage(dataset, tmp_path):
    def run(root: Path, stage: str = "", step: int = 0) -> int:
        root.mkdir(exist_ok=True)
        (root / "config.yaml").write_text(CONFIG)
        command = [sys.executable, "-c", SCRIPT, str(root), str(dataset.folder), stage, str(step)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "cut", "pretrain", 6) == -signal.SIGKILL
    assert run(tmp_path / "cut", "contextualize", 6) == -signal.SIGKILL  # which resumes and ends stage 1
    assert run(tmp_path / "cut") == 0
    for name in ("pretrain/encoder/encoder", "contextualize/model/encoder", "contextualize/model/fusion"):
        whole, cut = (load_file(tmp_path / r / "small" / f"{name}.safetensors") for r in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[key], cut[key]) for key in whole), name
    for stage in ("pretrain", "contextualize"):
        logs = [
            without_times(json.loads((tmp_path / r / "small" / stage / "log_history.json").read_text()))
            for r in ("whole", "cut")
        ]
        assert logs[0] == logs[1]
