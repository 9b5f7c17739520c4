"""``userllm run`` finishes on MovieLens-100K with every value of every setting that has a few, and with each of the
others changed once. The defaults are run together, first. Takes about ten minutes:

    pytest tests/cli/test_every_setting.py -m slow
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from userllm.cli import main
from userllm.config import RunConfig
from userllm.tasks import TaskConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMOKE = Path(__file__).parents[2] / "configs" / "movielens-100k-smoke.yaml"
SHORT = [
    "threads=1", "pretrain.epochs=0.1", "pretrain.validation_users=20", "contextualize.steps=2",
    "contextualize.histories=4", "evaluation.users=10", "evaluation.knowledge_tokens=32", "encoder.max_length=50",
]  # fmt: skip
SMALL = "layers: 1, width: 16, heads: 2, feed_forward: 16, max_length: 50"
NEEDS = {  # what a value needs beside it, to mean anything
    "encoder.kind=dual": [f"encoder={{kind: dual, item_width: 16, {SMALL}}}"],
    "encoder.kind=bert4rec": [f"encoder={{kind: bert4rec, item_width: 16, {SMALL}}}"],
    "encoder.kind=text": [
        f"encoder={{kind: text, {SMALL}, parts: [title, rating], sentences: all-minilm-l6-v2, sentence_width: 384}}"
    ],
    "contextualize.alignment.to=own_text": [
        "fusion.kind=soft_prompt",
        "contextualize.alignment={steps: 2, histories: 4}",
    ],
    "encoder.causal=false": ["pretrain=null"],
    "encoder.item_text": ["encoder.item_start=text"],
    "encoder.proposal": ["encoder.item_loss=sampled"],
    "fusion.kind=none": ["fusion.text.events=5", "contextualize.strategy.name=lora"],
    "fusion.projection=mlp": ["fusion.kind=soft_prompt"],
    "lm.dtype=bfloat16": ["contextualize.strategy.name=proj"],
    "split.kind=paper": ["encoder.max_length=50"],
    "tasks.next_item.kind=genre_preference": [
        "tasks.next_item.prompt=Which genres?",
        "evaluation.text.users=5",
    ],
}
OTHERS = [  # settings that are no choice among a few
    *(NEEDS[f"encoder.kind={kind}"] for kind in ("dual", "bert4rec", "text")),
    ["pretrain=null"],
    ["pretrain.seconds=2"],
    ["contextualize.seconds=2"],
    ["data.fields=[item, rating, genres, time_gap]"],
    ["encoder.item_std=0.02"],
    ["encoder.field_weights={item: 5, genres: 0}"],
    ["fusion.layers=all"],
    ["fusion.layers=every:2"],
    ["fusion.perceiver={latents: 4, layers: 1, heads: 2}"],
    ["fusion.catalogue={}"],
    ["fusion.soft_prompt.task_tokens=0", "fusion.kind=soft_prompt"],
    ["fusion.text.events=3"],
    ["fusion.text.events=3", "fusion.kind=none", "contextualize.strategy.name=full"],
    [
        "fusion.text.events=10", "fusion.kind=none", "contextualize.strategy.name=lora",
        "fusion.text.summary={new_tokens: 4}", "contextualize.every=50",
    ],
    ["contextualize.alignment={steps: 2, histories: 4, examples_per_history: 2}"],
    ["tasks.next_item.teacher=0.5"],
    ["tasks.next_item.weight=3"],
    ["evaluation.list_length=5"],
    ["evaluation.beams=20"],
    ["lm.name=tiny-random-gpt2"],
    ["lm.name=tiny-random-gemma3"],
    ["lm.name=tiny-random-t5"],
    ["lm.name=tiny-random-t5", "fusion.kind=soft_prompt", "contextualize.strategy.name=full"],
    ["lm.dropout=0.2"],
    ["seed=1"],
]  # fmt: skip
ELSEWHERE = ("data.", "tasks.next_item.kind=review", "evaluation.text.")
"""Of tables and of reviews: MovieLens-100K has none; their own tests run them."""


def choices(group: Any, prefix: str = "") -> Iterator[str]:
    """``a.b=value`` for every value but the default of every setting that is a choice or a switch."""
    for name, hint in get_type_hints(group).items():
        where, default = f"{prefix}{name}", getattr(group, name, None)  # a factory makes groups only
        for part in _parts(hint):
            if get_origin(part) is Literal:
                yield from (f"{where}={value}" for value in get_args(part) if value != default)
            elif part is bool:
                yield f"{where}={str(not default).lower()}"
            elif is_dataclass(part):
                for inner in choices(part, f"{where}."):
                    yield f"{inner} of {part.__name__}" if _kinds(hint) > 1 else inner
            elif get_origin(part) is dict and get_args(part)[1] is TaskConfig:
                yield from choices(TaskConfig, f"{where}.next_item.")


def _parts(hint: Any) -> list[Any]:
    return (
        [p for h in get_args(hint) for p in _parts(h)]
        if get_origin(hint) in (Union, types.UnionType)
        else [hint]
    )


def _kinds(hint: Any) -> int:
    return sum(is_dataclass(part) for part in _parts(hint))


def settings(choice: str) -> list[str]:
    """The overrides that make up a choice, what it needs first."""
    plain, _, owner = choice.partition(" of ")
    kind = {"DualConfig": "dual", "Bert4RecConfig": "bert4rec", "TextConfig": "text"}.get(owner)
    own = NEEDS[f"encoder.kind={kind}"] if kind else []
    need = NEEDS.get(plain, NEEDS.get(plain.partition("=")[0], []))
    return [*dict.fromkeys([*own, *need]), *([] if plain.startswith("encoder.kind=") else [plain])]


EVERY = [c for c in choices(RunConfig) if not c.startswith(ELSEWHERE)]


def test_the_choices_are_found():
    assert {"encoder.positions=rotary of AutoregressiveConfig", "contextualize.strategy.name=proj"} <= set(
        EVERY
    )
    assert {"fusion.cross_attention.gate=none", "evaluation.exclude_seen=false", "split.kind=paper"} <= set(
        EVERY
    )


@pytest.mark.parametrize(
    "overrides", [[], *(settings(c) for c in EVERY), *OTHERS], ids=lambda given: " ".join(given)[:120]
)
def test_a_run_finishes(overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(SMOKE), *SHORT, *overrides]) == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "runs" / "smoke" / "metrics.json").read_text())
    assert metrics["tasks"]
    assert (tmp_path / "runs" / "smoke" / "report.html").is_file()
