"""What a run's metrics.json tells of how its numbers came about."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from userllm.config import RunConfig
from userllm.data.splits import Split
from userllm.data.store import Dataset
from userllm.evaluation.closed import ClosedEvaluator
from userllm.evaluation.users import EvaluationConfig
from userllm.json_file import AGAIN, read_json
from userllm.model import UserLLM
from userllm.pipeline.machine import commit, hardware, peaks_mb, software


def run_facts(folder: Path, config: RunConfig, evaluator: ClosedEvaluator) -> dict[str, Any]:
    """What metrics.json tells besides the tasks; the stages' seconds are filled in when the last has ended."""
    model = evaluator.model
    frozen = config.contextualize.strategy.name in ("enc", "proj")
    trained = folder / "contextualize" / "training.json"  # older versions wrote none
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "software": software(),
        **data_facts(config, evaluator.dataset, evaluator.split),
        "lm": {
            "name": model.reference.name,
            "source": model.reference.source,
            "sha256": model.reference.sha256,
            "parameters": _lm_parameters(model),
            "frozen": frozen,
        },
        "summaries": None if model.summarizer is None else model.summarizer.described(),
        "trainable": read_json(folder / "contextualize" / "trainable.json", AGAIN),
        "gates": [{"layer": layer, "value": value} for layer, value in model.gates.items()],
        "training": read_json(trained, AGAIN) if trained.exists() else None,
        "catalogue_weights": [] if model.catalogue is None else model.catalogue.weights(),
        "timings_s": {},
        "cpu_s": {},
        **peaks_mb(),
        "notes": _notes(config.evaluation, evaluator),
    }


def data_facts(config: RunConfig, dataset: Dataset, split: Split) -> dict[str, Any]:
    """Which data, and how they were split."""
    card = dataset.card
    return {
        "dataset": {
            "name": card.name,
            "fingerprint": card.fingerprint,
            "users": card.users,
            "items": card.items,
            "events": card.events,
            "source": asdict(card.source),
        },
        "split": {
            "kind": config.split.kind,
            "fingerprint": split.fingerprint,
            "tie_rule": card.tie_rule,
            "part": config.evaluation.part,
        },
    }


def _notes(config: EvaluationConfig, evaluator: ClosedEvaluator) -> list[str]:
    model = evaluator.model
    notes = [f"{evaluator.available} users can be evaluated; each task says n of N"]
    if model.closed_tasks:
        notes += [
            "next items already in the history are excluded for every system"
            if config.exclude_seen
            else "items already in the history may be recommended again",
            f"beam search with {config.beams} beams over the catalogue's trie; a target outside "
            f"the list of {config.list_length} counts as a miss",
            "among equal scores the item that comes first in the catalogue wins",
            *_catalogue_note(model),
        ]
    if model.open_tasks:
        notes += [
            "texts: every system gets the same prompt; no user is the base LM, which was not trained on such "
            "texts; another user's history is the trained model with the wrong user",
            "ROUGE: F-measure against the whole text the user wrote, rouge-score without stemming; gains compare "
            "greedy texts pair by pair",
            "log-likelihoods are of a text's first tokens, as many as the task's target_tokens",
        ]
    return notes


def _catalogue_note(model: UserLLM) -> list[str]:
    if model.catalogue is None:
        return []
    said = ", ".join(f"{weight:.2f}" for weight in model.catalogue.weights())
    return [
        "where a title is written, the encoder's log-probability is added to the LM's logit with weight "
        f"{said} (first token, second, ...; fusion.catalogue)"
    ]


def _lm_parameters(model: UserLLM) -> int:
    with model.attachment.detached():
        return sum(p.numel() for n, p in model.lm.named_parameters() if "lora_" not in n)
