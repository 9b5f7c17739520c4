"""Stage 2: the language model learns to use the user embeddings (User-LLM sections 3.2, 3.3).

One encoder pass over a user's history serves several examples of that user, at different points in time, where the
encoder is causal; any other reads each example's history by itself. With a frozen LM the layers below the first fused
one are replayed from a store. With ``teacher`` > 0 a task also learns from the pretrained encoder's own distribution
over the catalogue (ours): one example then says something about every item, not only about the one that came next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from userllm.data.collation import StoredHistories
from userllm.data.splits import Split
from userllm.data.store import Dataset
from userllm.events import HistoryBatch
from userllm.model import UserLLM
from userllm.training.strategy import StrategyConfig
from userllm.training.trainer import OptimizationConfig, StageTrainer, StepBatches, training_arguments


@dataclass
class ContextualizeConfig:
    """Stage 2."""

    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    """What is trained."""
    steps: int = 1000
    """Optimiser steps."""
    histories: int = 16
    """Users in a batch."""
    examples_per_history: int = 4
    """Examples drawn from one pass over a user's history (ours; 1 with the papers' windows)."""
    optimization: OptimizationConfig = field(default_factory=lambda: OptimizationConfig(learning_rate=3e-3))
    """Optimiser and schedule."""
    encoder_rate: float = 0.1
    """Factor on the encoder's learning rate (ours: it starts trained, the projection does not)."""
    lm_rate: float = 0.02
    """Factor on the learning rate of the LM or its adapter (ours)."""
    gate_rate: float = 10.0
    """Factor on the learning rate of the gates (ours: a single scalar at 0 holds everything behind it back)."""


@dataclass
class Examples:
    """E examples over B histories: which history, how many of its events count, the task, the answer; all [E]."""

    histories: HistoryBatch
    rows: Tensor
    ends: Tensor
    tasks: list[str]
    task: Tensor
    answers: Tensor


class ExampleBatches(StepBatches):
    """Examples from the training part of a split.

    Users come in random order, every user once per pass; a user's examples are drawn from the events that the split
    gives to training, all within one stretch the encoder can see at once.
    """

    def __init__(
        self,
        model: UserLLM,
        dataset: Dataset,
        split: Split,
        stored: StoredHistories,
        config: ContextualizeConfig,
        seed: int,
    ):
        super().__init__(config.steps)
        self.model_tasks = model.tasks
        self.window = split.visible(model.window)
        self.longest = split.visible(model.encoder.max_length)
        self.dataset, self.split, self.stored, self.config, self.seed = dataset, split, stored, config, seed
        self.usable = np.flatnonzero(split.train_end > split.first_target)

    def batch(self, step: int) -> dict[str, Any]:
        """See ``StepBatches``."""
        per_batch = self.config.histories
        rng = np.random.default_rng([self.seed, step])
        wanted = np.arange(step * per_batch, (step + 1) * per_batch)
        passes, places = np.divmod(wanted, len(self.usable))
        order = {
            p: np.random.default_rng([self.seed, 7, p]).permutation(self.usable) for p in np.unique(passes)
        }
        kept = np.array([order[p][i] for p, i in zip(passes, places, strict=True)])
        names = list(self.model_tasks)
        weights = np.array([self.model_tasks[n].config.weight for n in names])
        spans, rows, ends, users, tasks = [], [], [], [], []
        for row, k in enumerate(kept):
            first, stop = int(self.split.first_target), int(self.split.train_end[k])
            latest = int(rng.integers(first, stop))  # the position of an event to be predicted
            begin = max(0, latest - self.longest)
            others = rng.integers(
                max(first, begin + 1), latest + 1, size=self.config.examples_per_history - 1
            )
            targets = np.concatenate([[latest], others])
            user = int(self.split.users[k])
            spans.append((user, begin, latest))
            rows += [row] * len(targets)
            ends += list(targets)
            users += [user] * len(targets)
            tasks += list(rng.choice(len(names), size=len(targets), p=weights / weights.sum()))
        row_of, end_of = np.array(rows), np.array(ends)
        user_of, task_of = np.array(users), np.array(tasks)
        begins = np.array([begin for _, begin, _ in spans])
        seen = np.minimum(end_of - begins[row_of], self.window)
        answers = np.full(len(row_of), -1)
        for number, name in enumerate(names):
            mine = task_of == number
            answers[mine] = self.model_tasks[name].targets(
                self.dataset, user_of[mine], end_of[mine], seen[mine]
            )
        keep = answers >= 0
        examples = Examples(
            histories=self.stored.batch(spans),
            rows=torch.from_numpy(row_of[keep]),
            ends=torch.from_numpy((end_of - begins[row_of])[keep]),
            tasks=names,
            task=torch.from_numpy(task_of[keep]),
            answers=torch.from_numpy(answers[keep]),
        )
        return {"examples": examples}


class ContextualizedLosses(nn.Module):
    """The model as the Trainer sees it: examples in, losses out.

    ``loss`` is the mean over examples of the answer's negative log-likelihood in nats, mixed with the teacher's
    cross-entropy where a task asks for one; ``<task>_nll`` is the plain negative log-likelihood.
    """

    def __init__(self, model: UserLLM):
        super().__init__()
        self.model = model
        teaches = any(task.config.teacher > 0 for task in model.tasks.values())
        # kept out of the module tree: the teacher is a constant
        self._teacher = [copy.deepcopy(model.encoder).eval().requires_grad_(False)] if teaches else []

    def forward(self, examples: Examples) -> dict[str, Tensor]:
        """See the class."""
        device = self.model.lm.device
        histories = examples.histories.to(device)
        users = self.model.context(histories, examples.rows.to(device), examples.ends.to(device))
        total, parts = 0 * users.tokens.sum(), {}  # no example of a batch may have a right answer
        for number, name in enumerate(examples.tasks):
            mine = torch.nonzero(examples.task == number)[:, 0].to(device)
            if len(mine) == 0:
                continue
            answers, mix = examples.answers.to(device)[mine], self.model.tasks[name].config.teacher
            teacher = self._teach(histories, examples, mine) if mix > 0 else None
            nll, taught = self.model.answer_losses(name, answers, users.select(mine), teacher)
            parts[f"{name}_nll"] = nll.detach().mean()
            loss = nll if taught is None else (1 - mix) * nll + mix * taught
            total = total + loss.sum() / len(examples.task)
        return {"loss": total, **parts}

    @torch.no_grad()
    def _teach(self, histories: HistoryBatch, examples: Examples, mine: Tensor) -> Tensor:
        teacher = self._teacher[0].to(histories.mask.device)
        rows, ends = examples.rows.to(mine.device)[mine], examples.ends.to(mine.device)[mine]
        return torch.softmax(teacher.next_item_scores(histories, rows, ends), dim=-1)


def contextualize(
    model: UserLLM,
    dataset: Dataset,
    split: Split,
    stored: StoredHistories,
    config: ContextualizeConfig,
    folder: Path,
    seed: int,
    evaluator: Callable[[], dict[str, float]] | None = None,
    eval_every: int | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place, its strategy applied before; resumes from ``folder``. Returns the log history."""
    trainer = StageTrainer(
        ContextualizedLosses(model),
        training_arguments(folder, config.optimization, config.steps, seed, eval_every),
        ExampleBatches(model, dataset, split, stored, config, seed),
        evaluator,
        rates={
            ".block.gate": config.gate_rate,
            ".block.": 1.0,
            "model.encoder.": config.encoder_rate,
            "model.lm.": config.lm_rate,
        },
    )
    if model.lm_is_frozen:  # after the Trainer has put the model on its device
        model.store_lower_states()
    return trainer.run()
