"""Every way to train, measure and answer keeps its tensors in one place: whole runs on a pretended accelerator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration

from userllm.cli import main

FILE = Path(__file__).with_name("pretend.py")
CONFIG = """\
name: demo
threads: 1
data: {release: synthetic}
encoder: {layers: 1, width: 16, heads: 2, feed_forward: 32, item_width: 16, field_width: 4, max_length: 12}
pretrain: {epochs: 1, recent: 8, batch: {events: 2000}}
lm: {name: tiny-random-llama}
fusion: {layers: "last:2", events: 6, cross_attention: {heads: 2, head_width: 8}}
tasks:
  next_item: {prompt: The next movie this user will watch is}
  favorite_genre: {kind: favorite_category, prompt: This user's favorite movie genre is}
contextualize: {steps: 2, histories: 4, examples_per_history: 2}
evaluation: {users: 8, list_length: 5, beams: 5, batch: 8, knowledge_tokens: 64}
"""

PYTHON_BACKENDS = hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend")
pytestmark = pytest.mark.skipif(
    not PYTHON_BACKENDS, reason="this torch takes no accelerator written in Python"
)

VARIANTS = {
    "soft prompt": ["fusion.kind=soft_prompt", "fusion.soft_prompt={task_tokens: 2}"],
    "full": ["contextualize.strategy.name=full", "contextualize.optimization.optimizer=adafactor"],
    "lora": ["contextualize.strategy.name=lora"],
    "Perceiver": ["fusion.perceiver={latents: 4, layers: 1, heads: 2}"],
    "catalogue and teacher": ["fusion.catalogue={}", "tasks.next_item.teacher=0.5"],
    "Text Prompt": ["fusion.kind=none", "fusion.text.events=4", "contextualize.strategy.name=lora"],
    "text beside embeddings": ["fusion.text.events=3"],
    "Text Summarization": [
        "fusion.kind=none", "fusion.text={events: 4, summary: {new_tokens: 4}}", "contextualize.strategy.name=lora",
    ],
    "Dual Encoder": ["encoder={kind: dual, heads: 2, feed_forward: 32, max_length: 12}"],
    "Bert4Rec": ["encoder={kind: bert4rec, layers: 1, width: 16, heads: 2, feed_forward: 32, max_length: 12}"],
    "UEM": [
        "encoder={kind: text, layers: 1, width: 16, heads: 2, feed_forward: 32, max_length: 12, "
        "sentences: tiny-random-t5, sentence_width: 32, parts: [title, rating]}",
        "lm.name=tiny-random-t5", "fusion.kind=soft_prompt",
    ],
    "encoder-decoder, cross-attention": ["lm.name=tiny-random-t5"],
    "own text": [
        "fusion.kind=soft_prompt", "contextualize.alignment={steps: 2, to: own_text}",
    ],
    "only the answer attends": ["fusion.attend=answer"],
    "CPU seconds": ["contextualize.seconds=1", "contextualize.steps=null"],
    "bfloat16": ["lm.dtype=bfloat16"],
    "free text": [
        "tasks={liked: {kind: genre_preference, prompt: Which genres, target_tokens: 8}}",
        "evaluation.text={users: 6, greedy: {max_new_tokens: 4}}",
    ],
}  # fmt: skip


def there(folder: Path, *commands: str) -> str:
    """What userllm's commands print on the pretended accelerator. None of them may fail."""
    done = subprocess.run([sys.executable, str(FILE), *commands], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = int(done.stdout.splitlines()[-1].split(": ")[1])
    assert kernels > 5000, "it ran somewhere else"
    return done.stdout


@pytest.mark.slow  # three commands there, two here
def test_train_and_answer(tmp_path, monkeypatch, capsys):
    (tmp_path / "demo.yaml").write_text(CONFIG)
    printed = there(
        tmp_path,
        "run demo.yaml 'contextualize.alignment={steps: 2}'",
        "embed runs/demo --out store --state --keys-values",
        "recommend runs/demo --user 7 --store store --json",
    )
    answered = json.loads(printed[printed.index("{\n") : printed.rindex("}") + 1])
    monkeypatch.chdir(tmp_path)
    for store in ([], ["--store", "store"]):  # the CPU takes model and store as they are
        capsys.readouterr()
        main(["recommend", "runs/demo", "--user", "7", "--json", *store])
        here = capsys.readouterr().out
        expected = json.loads(here[here.index("{\n") :])
        for side in ("with_user", "without_user"):
            assert [one["item"] for one in answered[side]] == [one["item"] for one in expected[side]]
            assert [one["log_likelihood"] for one in answered[side]] == pytest.approx(
                [one["log_likelihood"] for one in expected[side]], abs=1e-4
            )


@pytest.mark.slow  # half a minute each: every operation goes through Python
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way(tmp_path, variant):
    (tmp_path / "demo.yaml").write_text(CONFIG)
    settings = " ".join(f"'{setting}'" for setting in VARIANTS[variant])
    assert "report.html" in there(tmp_path, f"run demo.yaml {settings}")
