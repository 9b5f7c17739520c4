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
from userllm.clock import clock_of
from userllm.data.collation import StoredHistories
from userllm.data.splits import Split
from userllm.data.store import Dataset
from userllm.errors import UserError
from userllm.events import HistoryBatch
from userllm.fusion.attach import UserContext
from userllm.model import UserLLM
from userllm.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from userllm.training.alignment import AlignmentConfig, align
from userllm.training.budget import MAX_STEPS, Budget
from userllm.training.examples import ExampleBatches, Examples
from userllm.training.sharding import units_of
from userllm.training.strategy import StrategyConfig
from userllm.training.trainer import (
    OptimizationConfig,
    StageTrainer,
    load_trainable,
    save_trainable,
    training_arguments,
)
from userllm.whole_file import write_text

_TRAINED = "trained.safetensors"


@dataclass
class ContextualizeConfig:
    """Stage 2."""

    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    """What is trained."""
    steps: PositiveInt = 1000
    """Optimiser steps."""
    seconds: PositiveFloat | None = None
    """Train for so long instead of ``steps`` (ours): CPU seconds, all threads together, or wall-clock seconds on an
    accelerator. Alignment and stored states of the LM count. The learning rate follows the time."""
    histories: PositiveInt = 16
    """Users in a batch."""
    examples_per_history: PositiveInt = 4
    """Examples drawn from one pass over a user's history (ours; 1 with the papers' windows)."""
    every: PositiveInt = 1
    """Points in time at which examples are drawn: so many events of a history apart, counted from its start; the first
    event that can be a target is one, too. 1: all (ours; with summaries each point needs one of its own)."""
    optimization: OptimizationConfig = field(default_factory=lambda: OptimizationConfig(learning_rate=3e-3))
    """Optimiser and schedule."""
    encoder_rate: NonNegativeFloat = 0.1
    """Factor on the encoder's learning rate (ours: it starts trained, the projection does not)."""
    lm_rate: NonNegativeFloat = 0.02
    """Factor on the learning rate of the LM or its adapter (ours)."""
    alignment: AlignmentConfig | None = None
    """First step: bring user embeddings into the LM's space (ours); none by default, as in the papers."""
    perceiver_rate: NonNegativeFloat = 0.3
    """Factor on the learning rate of the Perceiver (ours: several layers deep, it suffers first from a high rate)."""
    gate_rate: NonNegativeFloat = 10.0
    """Factor on the learning rate of the gates and of the catalogue's weights (ours: a single scalar at 0 holds
    everything behind it back)."""

    @property
    def rates(self) -> dict[str, float]:
        """Factor on the learning rate by a part of a weight's name; the first match counts."""
        return {
            ".user_tokens.perceiver.": self.perceiver_rate,
            ".user_block.gate": self.gate_rate,
            "model.catalogue.": self.gate_rate,
            ".user_block.": 1.0,
            "model.encoder.": self.encoder_rate,
            "model.lm.": self.lm_rate,
        }


class ContextualizedLosses(nn.Module):
    """The model as the Trainer sees it: examples in, losses out.

    ``loss`` is the mean over the batch's examples of the answer's negative log-likelihood in nats, mixed with the
    teacher's cross-entropy where a task asks for one; of a text in nats per token, the mean over the batch's tokens
    (ours: a long text would outweigh a title fifty times). ``<task>_nll`` is the plain negative log-likelihood,
    likewise. sharded: the weights are spread over processes, which then have to call the LM equally often: once per
    task, be there an example of it or not.
    """

    def __init__(self, model: UserLLM, sharded: bool = False):
        super().__init__()
        self.model = model
        self.sharded = sharded
        teaches = any(task.config.teacher > 0 for task in model.tasks.values())
        # kept out of the module tree: the teacher is a constant
        self._teacher = [copy.deepcopy(model.encoder).eval().requires_grad_(False)] if teaches else []

    def forward(self, examples: Examples) -> dict[str, Tensor]:
        """See the class."""
        device = self.model.lm.device
        if self.sharded:
            examples = examples.with_stand_ins()
            if self.model.lm_is_frozen:  # here its weights can be had
                self.model.store_lower_states()
        histories = examples.histories.to(device)
        users = self.model.context(histories, examples.rows.to(device), examples.ends.to(device))
        total, parts = self._zero(), {}  # no example of a batch may have a right answer
        real = len(examples.task) - examples.stand_ins
        counts = torch.bincount(examples.task[:real], minlength=len(examples.tasks)).tolist()
        of_batch, *of_task = processes.batch_totals([real, *counts])
        for number, name in enumerate(examples.tasks):
            mine = torch.nonzero(examples.task == number)[:, 0].to(device)
            if of_task[number] == 0 and not self.sharded:
                continue
            counted = float(counts[number] > 0)  # what follows may be of a stand-in
            if name in self.model.open_tasks:
                nats, tokens = self._text_losses(name, examples, mine, users)
                mean = counted * nats.sum() / processes.share(int(counted * tokens.sum()))
                loss, shares = mean.expand(of_task[number]), 1
                nll = loss
            else:
                answers, mix = examples.answers.to(device)[mine], self.model.tasks[name].config.teacher
                teacher = self._teach(histories, examples, mine) if mix > 0 else None
                nll, taught = self.model.answer_losses(
                    name, answers, users.select(mine), teacher, together=self.sharded
                )
                loss = nll if taught is None else (1 - mix) * nll + mix * taught
                nll, loss, shares = counted * nll, counted * loss, processes.shares()
            if of_task[number] > 0:
                parts[f"{name}_nll"] = nll.detach().sum() * shares / of_task[number]
            total = total + loss.sum() * shares / max(of_batch, 1)
        return {"loss": total, **parts}

    def _zero(self) -> Tensor:
        """A loss of nothing, with a gradient."""
        if self.sharded:  # a weight would have to be gathered first
            return torch.zeros((), device=self.model.lm.device, requires_grad=True)
        return 0 * next(weight for weight in self.model.parameters() if weight.requires_grad).sum()

    def _text_losses(
        self, name: str, examples: Examples, mine: Tensor, users: UserContext
    ) -> tuple[Tensor, Tensor]:
        """Nats and tokens [n] of the texts ``mine`` [n]."""
        asked = [text for place in mine.tolist() if (text := examples.texts[place]) is not None]
        if not asked:
            return torch.zeros(1, device=mine.device), torch.zeros(1, dtype=torch.long)
        prompts, targets = [text.prompt for text in asked], [text.target for text in asked]
        most = self.model.tasks[name].config.target_tokens
        return self.model.text_losses(prompts, targets, users.select(mine), most)

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
    fsdp: bool = False,
) -> list[dict[str, float]]:
    """Train ``model`` in place, its strategy applied before; resumes from ``folder``. Returns the log history.

    fsdp: train sharded over the processes; the model's weights are then shares, and ``load_trained`` puts what was
    trained into another one. The alignment is not sharded, nor is an evaluation possible. Raises UserError for
    ``attend="answer"`` where the LM learns.
    The teacher is the encoder as it comes in, before any alignment. ``folder``/training.json tells steps, examples,
    the seconds used of a budget, and those that this process took, by the budget's clock.
    """
    if fsdp and model.reads_ahead and not model.lm_is_frozen:
        raise UserError(
            'FSDP does not see the gradient of a prompt that is read ahead: train the LM with fusion.attend "text"'
        )
    steps = config.steps if config.seconds is None else MAX_STEPS
    arguments = training_arguments(folder, config.optimization, steps, seed, eval_every)
    clock, summaries = clock_of(arguments.device), model.summarizer

    def spared() -> float:
        return 0.0 if summaries is None else summaries.spared

    budget, began = None, clock() + spared()
    if config.seconds is not None:
        budget = Budget(config.seconds, config.optimization.warmup, arguments.device, spared)
    losses = ContextualizedLosses(model, sharded=fsdp)
    if config.alignment is not None:
        align(model, dataset, split, stored, config.alignment, folder / "alignment", seed, budget)
    trainer = StageTrainer(
        losses,
        arguments,
        ExampleBatches(model, dataset, split, stored, config, seed, steps, config.every),
        evaluator,
        rates=config.rates,
        budget=budget,
        units=units_of(model) if fsdp else None,
    )
    if fsdp:  # shares of the weights went to their devices, one by one
        model.follow_lm()
    elif model.lm_is_frozen:  # after the Trainer has put the model on its device
        model.store_lower_states()
    history = trainer.run()
    if fsdp:
        save_trainable(losses, folder / _TRAINED)
    done = trainer.state.global_step
    examples = done * config.histories * config.examples_per_history
    facts = {
        "steps": done,
        "examples": examples,
        "seconds": None if budget is None else budget.used,
        "took": clock() + spared() - began,
    }
    if processes.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "training.json", json.dumps(facts) + "\n")
    return history


def load_trained(model: UserLLM, folder: Path) -> None:
    """Put what a sharded training in ``folder`` ended with into a model as that training began with."""
    load_trainable(ContextualizedLosses(model), folder / _TRAINED)
