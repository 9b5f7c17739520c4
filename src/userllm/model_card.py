"""The README.md of a saved model, in the form of a model card of the Hugging Face hub: what it is, from what, how good.

Everything in it comes from the model's config.json, so that it can be written anew whenever more is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from userllm.json_file import read_object
from userllm.language_models.pretrained import PACKAGED
from userllm.whole_file import write_text

STRATEGIES = {
    "full": "language model, encoder and projection were trained",
    "lora": "a LoRA adapter, the encoder and the projection were trained",
    "enc": "encoder and projection were trained, the language model is frozen",
    "proj": "the projection was trained, language model and encoder are frozen",
}
_STRATEGIES_OF_TEXT = {"full": "the language model was trained", "lora": "a LoRA adapter was trained"}
"""Where no user embedding reaches the language model."""
_SHOWN = ("recall@1", "recall@5", "recall@10", "ndcg@10")
_SHOWN_OF_TEXTS = ("rouge1", "rouge2", "rougeLsum")


def write_description(folder: Path, description: Mapping[str, Any], name: str) -> None:
    """Write config.json and README.md, each whole or not at all. name: the model's, or its id on the hub."""
    for file, text in (
        ("config.json", json.dumps(description, indent=2) + "\n"),
        ("README.md", model_card(description, name)),
    ):
        write_text(folder / file, text)


def add_to_description(folder: Path, run: Mapping[str, Any], name: str) -> None:
    """Add what has become known of its run to a saved model: to config.json's "run", and so to the card."""
    description = read_object(folder / "config.json", "save the model again")
    known = description.get("run", {})  # folders written by userllm 0.1.0 have none
    write_description(folder, description | {"run": known | run}, name)


def model_card(description: Mapping[str, Any], name: str) -> str:
    """The card as Markdown with its YAML header."""
    lm, run = description["lm"], description["run"]
    hub_id = PACKAGED[lm["name"]].hub_id if lm["name"] in PACKAGED else lm["name"]
    embeds = _embeds(description)
    header: dict[str, Any] = {
        "library_name": "userllm",
        "tags": ["userllm", "recommendation", *(["user-embeddings"] if embeds else [])],
    }
    if "/" in hub_id and not Path(hub_id).is_absolute():
        header["base_model"] = hub_id
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {name}",
        f"A language model that {'attends to user embeddings' if embeds else 'reads latest events as text'}: given "
        "somebody's history of events, it ranks a catalogue's items for that user, answers closed questions about "
        "them, and writes text with them in mind.",
        "**Unofficial.** Made with userllm, an independent implementation of "
        "[User-LLM](https://arxiv.org/abs/2402.13598) (Ning et al. 2024), not by its authors.",
        "## What it is made of",
        _table(("", ""), _facts(description)),
        "## How to load it",
        _loading(name, lm["name"], description["strategy"] == "full"),
        "## Results",
        *_results(run),
        "## Licence",
        "The weights here were trained on the dataset and for the base model named above; the terms of both apply to "
        "them. `items.parquet` holds the dataset's catalogue: look at the dataset's terms before you pass it on. The "
        "code of userllm is under Apache-2.0.",
    ]
    return "\n\n".join(parts) + "\n"


def _embeds(description: Mapping[str, Any]) -> bool:
    """Whether user embeddings reach the language model."""
    return bool(description["fusion"].get("kind") != "none")


def _facts(description: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    lm, run, fusion = description["lm"], description["run"], description["fusion"]
    revision = f", revision {lm['revision']}" if lm.get("revision") else ""
    yield "Base model", f"{lm['name']}{revision}, weights' sha256 {lm['sha256'][:12]}"
    if dataset := run.get("dataset"):
        counts = ", ".join(f"{dataset[key]:,} {key}" for key in ("users", "items", "events"))
        yield "Dataset", f"{dataset['name']} ({counts}), fingerprint {dataset['fingerprint']}"
    if split := run.get("split"):
        yield "Split", f"{split['kind']}, fingerprint {split['fingerprint']}"
    trained = STRATEGIES if _embeds(description) else _STRATEGIES_OF_TEXT
    yield "Strategy", f"{description['strategy']}: {trained[description['strategy']]}"
    yield "Fusion", ", ".join(f"{key}: {_plain(value)}" for key, value in fusion.items())
    for name, task in description["tasks"].items():
        answers = f"scores over the {task['normalization']}"
        if task["kind"] == "review":
            answers = f"writes the {task['target']}"
        yield f"Task {name}", f'{task["kind"]}, "{task["prompt"].strip()} ...", {answers}'
    yield "Made by", description["created_by"]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key} {_plain(part)}" for key, part in value.items()) + ")"
    return "none" if value is None else str(value)


def _loading(name: str, lm: str, whole: bool) -> str:
    place = name if "/" in name else "the folder of this file"
    code = f"""```python
from userllm import Event, UserHistory, UserLLM

model = UserLLM.from_pretrained("{place}")
history = UserHistory([Event("an id or a title of the catalogue")])
print(model.recommend(history, k=10))
```"""
    if whole:
        return f"{code}\n\nThe language model's weights are part of this model."
    note = "is fetched when the model is loaded, if it is not there already"
    if Path(lm).is_absolute():
        note = 'was a local folder where this model was made: say where you have it, `from_pretrained(..., lm="...")`'
    return f"{code}\n\nThe language model's weights are not part of this model; {lm} {note}."


def _results(run: Mapping[str, Any]) -> Iterable[str]:
    if "tasks" not in run:
        yield "Not measured yet."
        return
    for name, task in run["tasks"].items():
        shown = _SHOWN if "recall@1" in task["user_llm"] else _SHOWN_OF_TEXTS
        systems = {s: row for s, row in task.items() if isinstance(row, Mapping) and shown[0] in row}
        yield f"{name.replace('_', ' ').capitalize()}, n = {task['n']:,} of {task['N']:,} users of the held-out part:"
        rows = [
            (s.replace("_", " "), *(_interval(row[metric]) for metric in shown)) for s, row in systems.items()
        ]
        yield _table(("system", *shown), rows)
        gains = [f"{_interval(gain)} nats {key.replace('_', ' ')}" for key, gain in task["gain_nats"].items()]
        yield f"Log-likelihood of the true answer: {'; '.join(gains)}."
    if (kept := run["knowledge"]) is not None:  # an encoder-decoder LM has no such perplexity
        readers = ", ".join(
            f"{kept[reader]['perplexity']:.2f} {words}"
            for reader, words in (
                ("base", "base LM"),
                ("without_user", "without a user"),
                ("with_users", "with a user"),
            )
        )
        yield f"Perplexity on a general English text: {readers}."
    yield f"95 % bootstrap intervals over users. Commit {run['commit'][:12]}, {run['date']}, {run['hardware']}."


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    cells = [" | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) for line in lines]
    return "\n".join(f"| {line} |" for line in [cells[0], " | ".join("---" for _ in lines[0]), *cells[1:]])
