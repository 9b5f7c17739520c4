"""Stage 2: the language model learns to use the user embeddings (User-LLM sections 3.2, 3.3).

One encoder pass over a user's history serves several examples of that user, at different points in time, where the
encoder is causal; any other reads each example's history by itself. With a frozen LM the layers below the first fused
one are replayed from a store. With ``teacher`` > 0 a task also learns from the pretrained encoder's own distribution
over the catalogue (ours): one example then says something about every item, not only about the one that came next.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from userllm import processes
from userllm.data.collation import StoredHistories
from userllm.data.splits import Split
from userllm.data.store import Dataset
from userllm.events import HistoryBatch
from userllm.fusion.attach import UserContext
from userllm.model import UserLLM
from userllm.training.alignment import AlignmentConfig, align
from userllm.training.budget import MAX_STEPS, Budget
from userllm.training.examples import ExampleBatches, Examples
from userllm.training.strategy import StrategyConfig
from userllm.training.trainer import OptimizationConfig, StageTrainer, training_arguments


@dataclass
class ContextualizeConfig:
    """Stage 2."""

    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    """What is trained."""
    steps: int = 1000
    """Optimiser steps."""
    seconds: float | None = None
    """Train for so long instead of ``steps`` (ours): CPU seconds, all threads together, or wall-clock seconds on an
    accelerator. Alignment and stored states of the LM count. The learning rate follows the time."""
    histories: int = 16
    """Users in a batch."""
    examples_per_history: int = 4
    """Examples drawn from one pass over a user's history (ours; 1 with the papers' windows)."""
    every: int = 1
    """Points in time at which examples are drawn: so many events of a history apart, counted from its start; the first
    event that can be a target is one, too. 1: all (ours; with summaries each point needs one of its own)."""
    optimization: OptimizationConfig = field(default_factory=lambda: OptimizationConfig(learning_rate=3e-3))
    """Optimiser and schedule."""
    encoder_rate: float = 0.1
    """Factor on the encoder's learning rate (ours: it starts trained, the projection does not)."""
    lm_rate: float = 0.02
    """Factor on the learning rate of the LM or its adapter (ours)."""
    alignment: AlignmentConfig | None = None
    """First step: bring user embeddings into the LM's space (ours); none by default, as in the papers."""
    gate_rate: float = 10.0
    """Factor on the learning rate of the gates and of the catalogue's weights (ours: a single scalar at 0 holds
    everything behind it back)."""


class ContextualizedLosses(nn.Module):
    """The model as the Trainer sees it: examples in, losses out.

    ``loss`` is the mean over the batch's examples of the answer's negative log-likelihood in nats, mixed with the teacher's
    cross-entropy where a task asks for one; of a text in nats per token, the mean over the batch's tokens (ours: a long
    text would outweigh a title fifty times). ``<task>_nll`` is the plain negative log-likelihood, likewise.
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
        some = next(weight for weight in self.model.parameters() if weight.requires_grad)
        total, parts = 0 * some.sum(), {}  # no example of a batch may have a right answer
        counts = torch.bincount(examples.task, minlength=len(examples.tasks)).tolist()
        of_batch, *of_task = processes.batch_totals([len(examples.task), *counts])
        for number, name in enumerate(examples.tasks):
            mine = torch.nonzero(examples.task == number)[:, 0].to(device)
            if of_task[number] == 0:
                continue
            if name in self.model.open_tasks:
                shares = 1
                loss = nll = self._text_loss(name, examples, mine, users).expand(of_task[number])
            else:
                shares = processes.shares()
                answers, mix = examples.answers.to(device)[mine], self.model.tasks[name].config.teacher
                teacher = self._teach(histories, examples, mine) if mix > 0 else None
                nll, taught = self.model.answer_losses(name, answers, users.select(mine), teacher)
                loss = nll if taught is None else (1 - mix) * nll + mix * taught
            parts[f"{name}_nll"] = nll.detach().sum() * shares / of_task[number]
            total = total + loss.sum() * shares / of_batch
        return {"loss": total, **parts}

    def _text_loss(self, name: str, examples: Examples, mine: Tensor, users: UserContext) -> Tensor:
        """Nats per token of the texts ``mine`` [n]; of several processes' texts, what their mean is to be made of."""
        asked = [text for place in mine.tolist() if (text := examples.texts[place]) is not None]
        prompts, targets = [text.prompt for text in asked], [text.target for text in asked]
        most = self.model.tasks[name].config.target_tokens
        nll, tokens = torch.zeros(1, device=mine.device), torch.zeros(1, dtype=torch.long)
        if asked:
            nll, tokens = self.model.text_losses(prompts, targets, users.select(mine), most)
        return nll.sum() / processes.share(int(tokens.sum()))

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
    """Train ``model`` in place, its strategy applied before; resumes from ``folder``. Returns the log history.

    The teacher is the encoder as it comes in, before any alignment. ``folder``/training.json tells steps and examples.
    """
    steps = config.steps if config.seconds is None else MAX_STEPS
    arguments = training_arguments(folder, config.optimization, steps, seed, eval_every)
    budget = None
    if config.seconds is not None:
        budget = Budget(config.seconds, config.optimization.warmup, arguments.device)
    losses = ContextualizedLosses(model)
    if config.alignment is not None:
        align(model, dataset, split, stored, config.alignment, folder / "alignment", seed)
    trainer = StageTrainer(
        losses,
        arguments,
        ExampleBatches(model, dataset, split, stored, config, seed, steps, config.every),
        evaluator,
        rates={
            ".user_block.gate": config.gate_rate,
            "model.catalogue.": config.gate_rate,
            ".user_block.": 1.0,
            "model.encoder.": config.encoder_rate,
            "model.lm.": config.lm_rate,
        },
        budget=budget,
    )
    if model.lm_is_frozen:  # after the Trainer has put the model on its device
        model.store_lower_states()
    history = trainer.run()
    done = trainer.state.global_step
    examples = done * config.histories * config.examples_per_history
    facts = {"steps": done, "examples": examples, "seconds": None if budget is None else budget.used}
    if processes.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "training.json").write_text(json.dumps(facts) + "\n")
    return history
