"""What a run folder holds, read and checked: the one place that knows the shapes of its JSON files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from userllm.errors import UserError
from userllm.evaluation.metrics import Estimate
from userllm.json_file import read_json

STAGES = ("pretrain", "contextualize")

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
SHOWN_TEXTS = 10
"""Texts on show of a task that is answered in free text: those of its first users."""

_NOT_METRICS = ("gain_nats", "gain", "whole", "decoding", "labels")
"""Keys of a task in metrics.json whose value is a table and yet no system."""


def printable(text: str) -> str:
    """A text without characters that no page can show; a model may write any."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


@dataclass(frozen=True)
class Written:
    """What was asked about one user, what the user wrote, and every system's text."""

    user: str
    prompt: str
    target: str
    texts: dict[str, str]


@dataclass(frozen=True)
class Task:
    """The results of one task: estimates by system and metric, and paired gains (nats) by comparison.

    Of a task that is answered in free text besides: gains by comparison and metric, numbers of all texts together by
    system, the decoding's settings, and the first texts.
    """

    name: str
    systems: dict[str, dict[str, Estimate]]
    gains: dict[str, Estimate]
    users: int | None
    """n: users measured"""
    users_in_all: int | None
    """N: users there are in that part of the split"""
    part: str
    """the part of the split: test or validation"""
    invalid_items: int | None
    text_gains: dict[str, dict[str, Estimate]]
    whole: dict[str, dict[str, float]]
    decoding: dict[str, dict[str, Any]]
    written: list[Written]
    tie_rule: str | None = None
    """which answer is right where several are as good"""

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics any system has, in order of first appearance."""
        return list(dict.fromkeys(name for table in self.systems.values() for name in table))

    @property
    def recalls(self) -> list[str]:
        """Names of the recall metrics."""
        return [name for name in self.metrics if name.startswith("recall@")]

    @property
    def rouges(self) -> list[str]:
        """Names of the ROUGE metrics."""
        return [name for name in self.metrics if name.startswith("rouge")]


@dataclass(frozen=True)
class PastEvent:
    """An event of a user's history; ``attention``: the share of the LM's attention it got, where measured."""

    title: str
    rating: str
    time: str
    attention: float | None


@dataclass(frozen=True)
class Answer:
    """An answer of the LM and its log-likelihood in nats."""

    text: str
    log_likelihood: float | None


@dataclass(frozen=True)
class Answers:
    """What the LM answered about one user, best first, with and without that user, and what was true."""

    task: str
    truth: str | None
    """None where this user has no true answer to the task"""
    with_user: list[Answer]
    without_user: list[Answer]


@dataclass(frozen=True)
class Example:
    """A user shown in the report. ``history``: oldest first."""

    user: str
    history: list[PastEvent]
    target: str | None
    answers: list[Answers]

    @property
    def attended(self) -> bool:
        """Whether it is known which events the LM attended to."""
        return any(event.attention is not None for event in self.history)

    def most_attended(self, k: int) -> list[tuple[int, PastEvent]]:
        """(how many events ago, event) of the k most attended events, most attended first."""
        ago = zip(range(len(self.history), 0, -1), self.history, strict=True)
        weighed = [(event.attention, n, event) for n, event in ago if event.attention is not None]
        return [(n, event) for _, n, event in sorted(weighed, key=lambda one: (-one[0], one[1]))[:k]]


@dataclass(frozen=True)
class Knowledge:
    """How a general English text was read: perplexity by reader, over ``tokens`` tokens."""

    perplexity: dict[str, float]
    """of base, without_user and with_users"""
    tokens: int
    users: int
    """users it was read with"""
    sha256: str
    """of the text"""


@dataclass(frozen=True)
class RunRecord:
    """A run folder as read. Optional parts that the folder lacks are empty."""

    name: str
    metrics: dict[str, Any]
    """metrics.json as it is"""
    tasks: list[Task]
    gates: list[tuple[int, float]]
    """(LM layer, gate) in order of layers"""
    knowledge: Knowledge | None
    examples: list[Example]
    history: dict[str, list[dict[str, Any]]]
    """log_history by stage"""
    config: str | None
    """config.yaml as it is"""


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Only metrics.json is needed; config.yaml, examples.json and logs are optional.

    Raises UserError naming the file and field where a file is missing, no JSON, or of another shape.
    """
    where = folder / "metrics.json"
    metrics = _json(where)
    if metrics is None:
        raise UserError(f"{where}: not found; run `userllm evaluate` before the report")
    part = str(_mapping(metrics.get("split") or {}, f"{where}: split").get("part", "test"))
    tables = _mapping(_get(metrics, "tasks", str(where)), f"{where}: tasks")
    tasks = []
    for name, table in tables.items():
        inside = f"{where}: tasks.{name}"
        written = _written(folder / "texts" / f"{name}.jsonl")
        tasks.append(_task(name, _mapping(table, inside), part, inside, written))
    if not tasks:
        raise UserError(f"{where}: tasks is empty; run `userllm evaluate` before the report")
    examples = _list(_json(folder / "examples.json"), str(folder / "examples.json"))
    config = folder / "config.yaml"
    return RunRecord(
        name=folder.resolve().name,
        metrics=metrics,
        tasks=tasks,
        gates=sorted(
            _gate(gate, f"{where}: gates[{i}]")
            for i, gate in enumerate(_list(metrics.get("gates"), f"{where}: gates"))
        ),
        knowledge=_knowledge(metrics.get("knowledge"), f"{where}: knowledge"),
        examples=[
            _example(example, f"{folder / 'examples.json'}: [{i}]") for i, example in enumerate(examples)
        ],
        history={
            stage: _list(_json(path := folder / stage / "log_history.json"), str(path)) for stage in STAGES
        },
        config=config.read_text(encoding="utf-8") if config.exists() else None,
    )


def _json(path: Path) -> Any:
    """The content of a JSON file, None where there is no such file."""
    if not path.exists():
        return None
    return read_json(path, "remake it by running that stage again")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a table, got {type(value).__name__}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list, got {type(value).__name__}")
    return value


def _get(mapping: Any, key: str, where: str) -> Any:
    mapping = _mapping(mapping, where)
    if key not in mapping:
        raise UserError(f"{where}: {key} is missing")
    return mapping[key]


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where}: expected a number, got {value!r}")
    return float(value)


def _estimate(value: Any, where: str) -> Estimate:
    return Estimate(*(_number(_get(value, key, where), f"{where}.{key}") for key in ("value", "low", "high")))


def _written(path: Path) -> list[Written]:
    """The first texts of a task; none where it has no such file."""
    if not path.exists():
        return []
    found = []
    with open(path, encoding="utf-8") as lines:  # a text may hold what str.splitlines takes for a line's end
        first = list(islice(filter(str.strip, lines), SHOWN_TEXTS))
    for number, line in enumerate(first, 1):
        where = f"{path}, line {number}"
        try:
            record = _mapping(json.loads(line), where)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg}); remake it by `userllm evaluate`") from error
        shown = {key: printable(str(text)) for key, text in record.items()}
        user, prompt, target = (_get(shown, key, where) for key in ("user", "prompt", "target"))
        texts = {key: text for key, text in shown.items() if key not in ("user", "prompt", "target")}
        found.append(Written(user, prompt, target, texts))
    return found


def _task(name: str, task: Mapping[str, Any], part: str, where: str, written: list[Written]) -> Task:
    systems = {
        system: {metric: _estimate(value, f"{where}.{system}.{metric}") for metric, value in table.items()}
        for system, table in task.items()
        if system not in _NOT_METRICS and isinstance(table, Mapping)
    }
    gains = _mapping(task.get("gain_nats") or {}, f"{where}.gain_nats")
    return Task(
        name=name,
        systems=systems,
        gains={against: _estimate(value, f"{where}.gain_nats.{against}") for against, value in gains.items()},
        users=task.get("n"),
        users_in_all=task.get("N"),
        part=part,
        tie_rule=task.get("tie_rule"),
        invalid_items=task.get("invalid_items"),
        text_gains={
            against: {
                metric: _estimate(value, f"{where}.gain.{against}.{metric}")
                for metric, value in _mapping(table, f"{where}.gain.{against}").items()
            }
            for against, table in _mapping(task.get("gain") or {}, f"{where}.gain").items()
        },
        whole={
            system: {
                metric: _number(value, f"{where}.whole.{system}.{metric}")
                for metric, value in _mapping(table, f"{where}.whole.{system}").items()
            }
            for system, table in _mapping(task.get("whole") or {}, f"{where}.whole").items()
        },
        decoding={
            name: dict(_mapping(settings, f"{where}.decoding.{name}"))
            for name, settings in _mapping(task.get("decoding") or {}, f"{where}.decoding").items()
        },
        written=written,
    )


def _gate(gate: Any, where: str) -> tuple[int, float]:
    return int(_number(_get(gate, "layer", where), f"{where}.layer")), _number(
        _get(gate, "value", where), f"{where}.value"
    )


def _knowledge(knowledge: Any, where: str) -> Knowledge | None:
    if knowledge is None:
        return None
    readers = {name: _get(knowledge, name, where) for name in ("base", "without_user", "with_users")}
    return Knowledge(
        perplexity={
            name: _number(_get(reader, "perplexity", f"{where}.{name}"), f"{where}.{name}.perplexity")
            for name, reader in readers.items()
        },
        tokens=int(_number(_get(knowledge, "tokens", where), f"{where}.tokens")),
        users=int(_number(_get(knowledge, "users", where), f"{where}.users")),
        sha256=str(_get(knowledge, "sha256", where)),
    )


def _example(example: Any, where: str) -> Example:
    history = _list(_get(example, "history", where), f"{where}.history")
    tasks = _mapping(_get(example, "tasks", where), f"{where}.tasks")
    return Example(
        user=str(_get(example, "user", where)),
        history=[_past_event(event, f"{where}.history[{i}]") for i, event in enumerate(history)],
        target=example.get("target"),
        answers=[_answers(name, task, f"{where}.tasks.{name}") for name, task in tasks.items()],
    )


def _past_event(event: Any, where: str) -> PastEvent:
    time, rating = _get(event, "time", where), event.get("rating")
    if isinstance(time, int | float):
        time = datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d")
    return PastEvent(
        title=str(_get(event, "title", where)),
        rating="" if rating is None else f"{rating:g}" if isinstance(rating, int | float) else str(rating),
        time="" if time is None else str(time),
        attention=event.get("attention"),
    )


def _answers(name: str, task: Any, where: str) -> Answers:
    def listed(key: str) -> list[Answer]:
        answers = _list(_get(task, key, where), f"{where}.{key}")
        return [
            Answer(str(_get(a, "text", f"{where}.{key}[{i}]")), a.get("log_likelihood"))
            for i, a in enumerate(answers)
        ]

    truth = _get(task, "truth", where)
    return Answers(name, None if truth is None else str(truth), listed("with_user"), listed("without_user"))
