"""Evaluation of closed tasks: User-LLM against the same model with the wrong user, with no user, and plain baselines.

Every system answers the same examples. Next items already in a user's history are excluded for every system alike,
by the *true* user's history also where the model is given another one. Ranks come from a list of ``list_length``
answers for the language model (a target outside the list counts as a miss) and from the full ranking elsewhere; the
metrics look at the first ten places only, so that MRR means the same everywhere.

What the language model and the encoder say is asked batch by batch, of whoever there is (``questions``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from userllm import processes
from userllm.baselines.own_history import own_most_frequent
from userllm.baselines.popularity import answer_counts, item_counts
from userllm.data.collation import StoredHistories
from userllm.data.splits import Split
from userllm.data.store import Dataset
from userllm.encoders import DualEncoder, UserEncoder
from userllm.errors import UserError
from userllm.evaluation.metrics import paired_gain, ranking_metrics
from userllm.evaluation.questions import Answers, Ask, Question, joined
from userllm.evaluation.ranking import (
    by_length,
    encoder_answers,
    fixed_ranks,
    label_ranks,
    rank_of,
    seen_items,
)
from userllm.evaluation.users import EvaluatedUsers, EvaluationConfig
from userllm.events import HistoryBatch
from userllm.freed_memory import hand_back_if_scarce
from userllm.model import UserLLM
from userllm.tasks import ClosedTask, NextItem

ENCODER_BATCH = 64
"""Users the encoder ranks the catalogue for at once."""


@dataclass
class Answered:
    """What a system said: rank of the truth [n] (0: not in its list) and log-likelihood of the truth in nats [n]."""

    ranks: np.ndarray
    log_likelihood: np.ndarray | None = None
    invalid: int = 0
    prompt_tokens: np.ndarray | None = None
    """Tokens the language model reads before its answer, soft prompts included [n]."""


class ClosedEvaluator:
    """Evaluates the closed tasks of a model on one part of a split.

    encoder: the encoder as stage 1 left it, whose own full-catalogue ranking, if it can do that, is a baseline (stage 2
    trains the model's copy for the language model, without its output heads). So is a dual encoder's ranking of the
    labels it was trained on.
    """

    def __init__(
        self,
        model: UserLLM,
        encoder: UserEncoder,
        dataset: Dataset,
        split: Split,
        stored: StoredHistories,
        config: EvaluationConfig,
        seed: int,
        progress: Callable[[str], None] = print,
        ask: Ask = processes.spread,
    ):
        self.model, self.dataset, self.split, self.stored = model, dataset, split, stored
        self.encoder, self.config, self.progress, self.ask = encoder, config, progress, ask
        self._known = cache(self._asked)
        self._ordered = cache(lambda name: by_length(self._known(name)[0], ENCODER_BATCH))
        self.users = EvaluatedUsers.draw(split, config, model.encoder.max_length, seed)
        self.rows, self.available, self.other = self.users.rows, self.users.available, self.users.other
        self.answered: dict[str, tuple[np.ndarray, dict[str, Answered]]] = {}
        """By task evaluated so far: the users' numbers [n], and what each system said about them."""
        self.without_user: dict[str, Tensor] = {}
        """By task evaluated so far: log-likelihoods of all answers [N] when the model knows nobody."""

    def evaluate(self, name: str) -> dict[str, Any]:
        """The entry of one task in metrics.json: each metric as an ``Estimate``, n, and the gains in nats."""
        task = self.model.closed_tasks[name]
        window = self.split.visible(self.model.window)
        rows, targets, _ = self._known(name)
        systems: dict[str, Answered] = {}
        self.progress(f"{name}: {len(rows)} of {self.available} users")
        systems["user_llm"] = self._language_model(name, "user_llm")
        if self.config.other_user:
            self.progress(f"{name}: with another user's history")
            systems["user_llm_shuffled"] = self._language_model(name, "user_llm_shuffled")
        self.progress(f"{name}: without a user, and baselines")
        base = self.without_user[name] = self.model.score_answers(name, None)[0].cpu()
        systems["no_user"] = self._fixed(task, base, rows, targets, base)
        if isinstance(task, NextItem):
            if self._encoder_ranks(task):
                systems["encoder"] = self._encoder(name)
            counts = item_counts(self.dataset, self.split)
            systems["popularity"] = self._fixed(task, counts, rows, targets, _smoothed(counts))
            systems["own_most_frequent"] = self._own_most_frequent(rows, targets, counts)
        else:
            counts = answer_counts(task, self.dataset, self.split, window)
            systems["majority"] = self._fixed(task, counts, rows, targets, _smoothed(counts))
            if isinstance(self.encoder, DualEncoder) and self.encoder.config.label == task.config.field:
                systems["encoder"] = Answered(*label_ranks(self.encoder, self.stored, rows, targets))
            if task.config.field in self.stored.collator.vocabulary:
                systems["exact"] = Answered(self._count_exactly(task, rows, targets, window))
        self.answered[name] = rows[:, 0], systems
        rule = {} if task.tie_rule is None else {"tie_rule": task.tie_rule}
        return self._entry(len(rows), systems) | rule

    def per_user(self) -> pl.DataFrame:
        """What every system said about every user so far: task, user (raw id), system, rank, log_likelihood.

        rank: of the true answer in the system's list, 0 where it is not among the first ``list_length``.
        """
        schema = {
            "task": pl.String,
            "user": pl.String,
            "system": pl.String,
            "rank": pl.Int32,
            "log_likelihood": pl.Float64,
        }
        ids = np.array(self.dataset.user_ids)
        parts = [
            pl.DataFrame(
                {
                    "task": [task] * len(users),
                    "user": ids[users].tolist(),
                    "system": [system] * len(users),
                    "rank": self._within(said),
                    "log_likelihood": np.full(len(users), np.nan)
                    if said.log_likelihood is None
                    else said.log_likelihood,
                },
                schema=schema,
            )
            for task, (users, systems) in self.answered.items()
            for system, said in systems.items()
        ]
        return pl.concat([pl.DataFrame(schema=schema), *parts])

    def _within(self, said: Answered) -> np.ndarray:
        return np.where(said.ranks <= self.config.list_length, said.ranks, 0)

    def _entry(self, n: int, systems: dict[str, Answered]) -> dict[str, Any]:
        entry: dict[str, Any] = {"n": n, "N": self.available}
        entry["invalid_items"] = sum(said.invalid for said in systems.values())
        for system, said in systems.items():
            entry[system] = {key: e.as_dict() for key, e in ranking_metrics(self._within(said)).items()}
            if said.log_likelihood is not None:
                zeros = np.zeros(n)
                entry[system]["log_likelihood"] = paired_gain(said.log_likelihood, zeros).as_dict()
            if said.prompt_tokens is not None:
                entry[system]["prompt_tokens"] = paired_gain(said.prompt_tokens, np.zeros(n)).as_dict()
        own = systems["user_llm"].log_likelihood
        assert own is not None
        entry["gain_nats"] = {
            f"over_{name}": paired_gain(own, against).as_dict()
            for name, system in (("shuffled", "user_llm_shuffled"), ("no_user", "no_user"))
            if system in systems and (against := systems[system].log_likelihood) is not None
        }
        return entry

    def _asked(self, name: str) -> tuple[np.ndarray, Tensor, np.ndarray]:
        """Who is asked in a task: user rows [n, 3], the right answers [n], and the rows of somebody else for each."""
        targets = self.model.closed_tasks[name].targets(
            self.dataset, self.rows[:, 0], self.rows[:, 2], self.split.visible(self.model.window)
        )
        kept = targets >= 0
        if not kept.any():
            raise UserError(
                f"evaluation of {name}: no user in the {self.config.part} part has a right answer"
            )
        return self.rows[kept], torch.from_numpy(targets[kept]), self.rows[self.other[kept]]

    def questions(self) -> list[Question]:
        """All that will be asked of the language model and of an encoder that ranks the catalogue."""
        systems = ["user_llm", *(["user_llm_shuffled"] if self.config.other_user else [])]
        return [
            question
            for name, task in self.model.closed_tasks.items()
            for system in [*systems, *(["encoder"] if self._encoder_ranks(task) else [])]
            for question in self._of(name, system)
        ]

    def _of(self, name: str, system: str) -> list[Question]:
        batch = ENCODER_BATCH if system == "encoder" else self.config.batch
        return [Question(name, system, start) for start in range(0, len(self._known(name)[0]), batch)]

    def _encoder_ranks(self, task: ClosedTask) -> bool:
        return isinstance(task, NextItem) and self.encoder.ranks_items

    def _language_model(self, name: str, system: str) -> Answered:
        """The fused LM's answers, with the users' own histories or with those of others."""
        said = joined(self.ask(self._of(name, system), self.answer))
        invalid = int(said["invalid"].sum())
        return Answered(said["ranks"], said["log_likelihood"], invalid, said["prompt_tokens"])

    def _encoder(self, name: str) -> Answered:
        said = joined(self.ask(self._of(name, "encoder"), self.answer))
        back = np.argsort(np.concatenate(self._ordered(name)))
        return Answered(said["ranks"][back], said["log_likelihood"][back])

    @torch.no_grad()
    def answer(self, question: Question) -> Answers:
        """What "user_llm", "user_llm_shuffled" or "encoder" says about one batch of users.

        The encoder's batches are of users by the length of their histories.
        """
        hand_back_if_scarce()
        rows, targets, other = self._known(question.task)
        if question.system == "encoder":
            part = self._ordered(question.task)[question.start // ENCODER_BATCH]
            self.encoder.eval()
            ranks, logliks = encoder_answers(
                self.encoder, self.stored, self.dataset, rows[part], self.config.exclude_seen
            )
            return {"ranks": ranks, "log_likelihood": logliks.astype(np.float64)}
        self.model.eval()
        histories = other if question.system == "user_llm_shuffled" else rows
        batch = slice(question.start, question.start + self.config.batch)
        return self._answers(question.task, rows[batch], histories[batch], targets[batch])

    def _answers(self, name: str, rows: np.ndarray, histories: np.ndarray, targets: Tensor) -> Answers:
        """The fused LM's answers for users ``rows``, conditioned on ``histories`` (rows of the same shape)."""
        task, device = self.model.closed_tasks[name], self.model.lm.device
        length = min(self.config.list_length, len(task.answers))
        users = self.model.context(self.stored.batch(histories).to(device))
        read = np.full(len(rows), len(self.model.question(name)))
        if users.prefix is not None:  # the prefix begins with the prompt's own opening tokens
            read += (users.prefix.mask.sum(1) - len(self.model.opening)).cpu().numpy()
        target = targets.to(device)
        excluded = self.excluded(name, rows, targets)
        possible = torch.full((len(target),), length)
        if excluded is not None:
            excluded = excluded.to(device)
            possible = (~excluded).sum(1).clamp_max(length)
        found = self.model.rank_answers(name, users, length, self.config.beams, excluded)
        hit = found.answers == target[:, None]
        invalid = [
            count_invalid(own, len(task.answers), most)
            for own, most in zip(found.answers.split(1), possible.split(1), strict=True)
        ]
        return {
            "ranks": torch.where(hit.any(1), hit.int().argmax(1) + 1, 0).cpu().numpy(),
            "log_likelihood": self.model.answer_log_likelihood(name, target, users).double().cpu().numpy(),
            "invalid": np.array(invalid),
            "prompt_tokens": read,
        }

    def excluded(self, name: str, rows: np.ndarray, targets: Tensor) -> Tensor | None:
        """[B, N] bool: answers that no system may give users ``rows``, whose right answers are ``targets`` [B]; None
        where every answer may be given."""
        if not (isinstance(self.model.closed_tasks[name], NextItem) and self.config.exclude_seen):
            return None
        # a repeated item still has to be found, as in rank_of
        return seen_items(self.dataset, rows).scatter_(1, targets[:, None], False)

    def _fixed(
        self, task: ClosedTask, scores: Tensor, rows: np.ndarray, targets: Tensor, log_p: Tensor
    ) -> Answered:
        if isinstance(task, NextItem):
            ranks = fixed_ranks(scores, self.dataset, rows, self.config.exclude_seen)
        else:
            ranks = rank_of(scores[None].expand(len(rows), -1), targets).numpy()
        return Answered(ranks, log_p[targets].double().numpy())

    def _own_most_frequent(self, rows: np.ndarray, targets: Tensor, popularity: Tensor) -> Answered:
        """What the user had most often. With seen items excluded nothing of one's own is left: popularity remains."""
        if self.config.exclude_seen:
            return Answered(fixed_ranks(popularity, self.dataset, rows, exclude_seen=True))
        ranks = np.zeros(len(rows), dtype=np.int64)
        for start in range(0, len(rows), 512):
            part = slice(start, start + 512)
            scores = own_most_frequent(self.dataset, rows[part], popularity)
            ranks[part] = rank_of(scores, targets[part]).numpy()
        return Answered(ranks)

    def _count_exactly(self, task: ClosedTask, rows: np.ndarray, targets: Tensor, window: int) -> np.ndarray:
        """Ranks by counting the field's values in the very batch the encoder gets: the upper bound."""
        ranks = np.zeros(len(rows), dtype=np.int64)
        for start in range(0, len(rows), 512):
            part = slice(start, start + 512)
            batch = self.stored.batch(rows[part])
            ranks[part] = rank_of(
                _value_counts(batch, task.config.field, len(task.answers), window), targets[part]
            )
        return ranks


def count_invalid(answers: Tensor, size: int, possible: Tensor) -> int:
    """Answers [B, k] that are no catalogue item, or repeat within a user's list, or are missing from it.

    possible [B]: how many answers a user's list can hold.
    """
    invalid = 0
    for row, wanted in zip(answers.tolist(), possible.tolist(), strict=True):
        real = [a for a in row if 0 <= a < size]
        invalid += wanted - len(set(real))
    return invalid


def _smoothed(counts: Tensor) -> Tensor:
    return torch.log((counts + 1) / (counts + 1).sum())


def _value_counts(batch: HistoryBatch, field: str, values: int, window: int) -> Tensor:
    ids = batch.fields[field]
    recent = torch.arange(ids.shape[1])[None] >= (batch.lengths - window)[:, None]
    ids = (ids if ids.ndim == 3 else ids[..., None]) * (recent & batch.mask)[..., None]
    flat = ids.flatten(1)
    counts = torch.zeros(len(batch), values + 2).scatter_add_(
        1, flat, torch.ones_like(flat, dtype=torch.float)
    )
    return counts[:, 2:]
