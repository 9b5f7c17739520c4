"""The evaluation of a run: every task asked, and the files that tell of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from userllm.baselines.popularity import written_targets
from userllm.config import RunConfig
from userllm.errors import UserError
from userllm.evaluation.closed import ClosedEvaluator
from userllm.evaluation.knowledge import knowledge_kept
from userllm.evaluation.labels import NAMES, LabelScores
from userllm.evaluation.open import OpenEvaluator, TextMetric, Texts
from userllm.evaluation.rating_agreement import RatingReader
from userllm.evaluation.text_metrics import distinct, length, rouge
from userllm.events import UserHistory
from userllm.language_models.pretrained import load
from userllm.model import UserLLM
from userllm.model_card import add_to_description
from userllm.pipeline.facts import run_facts
from userllm.pipeline.stages import say, write
from userllm.tasks import GenrePreference, OpenTask, Review

SHOWN = 5
"""Answers of an example, on each side."""


class Evaluation:
    """Asks a run's trained model and writes what it answered into the run's ``folder``."""

    def __init__(self, folder: Path, config: RunConfig, closed: ClosedEvaluator, texts: OpenEvaluator):
        self.folder, self.config, self.closed, self.texts = folder, config, closed, texts
        self.model: UserLLM = closed.model
        self._notes: list[str] = []

    def ask(self) -> None:
        """Every task of every evaluated user; the answers stay in memory, texts go to texts/TASK.jsonl."""
        self._tasks = {name: self.closed.evaluate(name) for name in self.model.closed_tasks}
        entries, of_texts = self._ask_texts()
        self._tasks |= entries
        self._rows = pl.concat([self.closed.per_user(), *of_texts], how="diagonal")

    def write(self) -> None:
        """examples.json, per_user.parquet, metrics.json, and the results in the model's own description."""
        examples = [self._example(row) for row in self.closed.rows[:3]]
        write(self.folder / "examples.json", json.dumps(examples, indent=1, ensure_ascii=False))
        self._rows.write_parquet(self.folder / "per_user.parquet")
        metrics: dict[str, Any] = run_facts(self.folder, self.config, self.closed) | {"tasks": self._tasks}
        metrics["notes"] += self._notes
        metrics["knowledge"] = self._knowledge()
        write(self.folder / "metrics.json", json.dumps(metrics, indent=1))
        results = {key: metrics[key] for key in ("tasks", "knowledge", "commit", "date", "hardware")}
        add_to_description(self.folder / "contextualize" / "model", results, self.config.name)

    def _ask_texts(self) -> tuple[dict[str, Any], list[pl.DataFrame]]:
        """Entries of the tasks that are answered in free text, and each task's numbers by user; the texts themselves
        go to texts/TASK.jsonl."""
        entries, rows = {}, []
        for name, task in self.model.open_tasks.items():
            texts = self.texts.write(name)
            lines = [json.dumps(line, ensure_ascii=False) for line in self.texts.as_lines(texts)]
            write(self.folder / "texts" / f"{name}.jsonl", "\n".join(lines))
            entries[name] = self.texts.measure(texts, self._text_metrics(task, texts))
            labels = None
            if isinstance(task, GenrePreference):
                entries[name] |= self._label_entries(task, texts)
                labels = LabelScores(task).names
            rows.append(self.texts.per_user(name, texts, labels))
        return entries, rows

    def _label_entries(self, task: GenrePreference, texts: Texts) -> dict[str, Any]:
        """Answers that are the same for everyone, which join the texts, and every system's scores label by label."""
        scores = LabelScores(task)
        training = written_targets(task, self.texts.dataset, self.texts.split)
        labels = {
            system: scores.table(texts.targets, written)
            for (system, decoding), written in texts.written.items()
            if decoding == "greedy"
        }
        entries: dict[str, Any] = {"labels": labels}
        for system, text in scores.constants(training).items():
            texts.written[system, "greedy"] = [text] * len(texts.targets)
            texts.measured[system] = measured = dict(scores(texts.targets, texts.written[system, "greedy"]))
            entries[system] = {name: measured[name].as_dict() for name in NAMES}  # type: ignore[union-attr]
        return entries

    def _text_metrics(self, task: OpenTask, texts: Texts) -> list[TextMetric]:
        """What is measured of a task's texts."""
        if isinstance(task, GenrePreference):
            return [LabelScores(task)]
        metrics: list[TextMetric] = [rouge, length, distinct]
        if isinstance(task, Review) and (rating := task.config.rating) in self.texts.dataset.event_fields:
            reader = RatingReader.of_training_events(
                self.texts.dataset, self.texts.split, task.config.target, rating
            )
            if reader is None:
                self._notes.append(
                    f"{task.name}: too few training texts to tell a rating from; no rating_agreement"
                )
                return metrics
            events = self.texts.dataset.offsets[texts.rows[:, 0]] + texts.rows[:, 2]
            metrics.append(reader.agreement(self.texts.dataset.events[rating][events]))
        return metrics

    @torch.no_grad()
    def _example(self, row: np.ndarray) -> dict[str, Any]:
        """What one user is answered, with and without the user, and what was attended to."""
        model, dataset = self.model.eval(), self.closed.dataset
        user, start, stop = (int(x) for x in row)
        history: UserHistory = dataset.history(user, start, stop)
        target = dataset.history(user, stop, stop + 1).events[0]
        try:
            asked = "next_item" if "next_item" in model.closed_tasks else model.first_closed_task
            weights = {id(a.event): a.weight for a in model.explain(history, task=asked)}
        except UserError:
            weights = {}  # a Perceiver stands between, or nothing is asked: the report says that none were recorded
        window = self.closed.split.visible(model.window)
        known = model.context(self.closed.stored.batch(row[None]).to(model.lm.device))
        answers = {}
        for name, task in model.closed_tasks.items():
            truth = torch.from_numpy(task.targets(dataset, row[None, 0], row[None, 2], window))
            # both sides choose among the same answers, those that the evaluation lets them give
            excluded = self.closed.excluded(name, row[None], truth)
            allowed = None if excluded is None else excluded.to(model.lm.device)
            k = min(SHOWN, len(task.answers))
            found = model.rank_answers(name, known, k, max(k, self.config.evaluation.beams), allowed)
            answers[name] = {
                "truth": task.answers[int(truth)] if truth >= 0 else None,
                "with_user": _listed(task.answers, found.answers[0], found.scores[0]),
                "without_user": _best(task.answers, self.closed.without_user[name], excluded),
            }
        return {
            "user": dataset.user_ids[user],
            "history": [
                {
                    "title": model.title(e.item),
                    "rating": e.fields.get("rating"),
                    "time": e.time,
                    "attention": weights.get(id(e)),
                }
                for e in history.events
            ],
            "target": model.title(target.item),
            "tasks": answers,
        }

    def _knowledge(self) -> dict[str, Any] | None:
        model = self.model
        if model.has_encoder:
            return None  # it does not continue texts, so there is no perplexity of one
        config = self.config.evaluation
        say("knowledge: a general English text, before and after")
        original = load(self.config.lm)[0].to(model.lm.device) if model.strategy == "full" else None  # type: ignore[arg-type]
        with torch.no_grad():
            rows = self.closed.rows[: config.knowledge_users]
            users = model.context(self.closed.stored.batch(rows).to(model.lm.device))
        return knowledge_kept(model, users, original, config.knowledge_tokens)


def _best(answers: list[str], scores: torch.Tensor, excluded: torch.Tensor | None) -> list[dict[str, Any]]:
    """The best answers by scores [N], but for those that are ``excluded`` [1, N]."""
    order = scores.argsort(descending=True, stable=True)
    if excluded is not None:
        order = order[~excluded[0, order]]
    return _listed(answers, order[:SHOWN], scores[order[:SHOWN]])


def _listed(answers: list[str], best: torch.Tensor, scores: torch.Tensor) -> list[dict[str, Any]]:
    """Answers [k], best first, with their scores; -1 is none."""
    pairs = zip(best.tolist(), scores.tolist(), strict=True)
    return [{"text": answers[n], "log_likelihood": score} for n, score in pairs if n >= 0]
