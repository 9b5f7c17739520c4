"""An optional first step of stage 2: user embeddings are brought into the language model's own space (ours).

No pass through the language model. The papers start stage 2 from a random projection; theirs is the default. Two kinds:

``next_title``: contrastive, between what the fusion makes of a user's latest token and the language model's embeddings
of the title that came next, a softmax over the whole catalogue.

    soft prompt       the projected user token          against the mean *input* embedding of a title's tokens
    cross-attention   the topmost block's value -> out  against the mean *output* embedding of a title's tokens

``own_text``, for soft prompts: each event's soft prompt against the mean input embedding of that event's own text. The
LM then begins with a history it can read: its words, one place per event.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from userllm import processes
from userllm.data.collation import StoredHistories
from userllm.data.splits import Split
from userllm.data.store import Dataset
from userllm.errors import UserError
from userllm.fusion.history_text import HistoryText, HistoryTextConfig
from userllm.model import UserLLM, event_texts
from userllm.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from userllm.training.budget import Budget
from userllm.training.examples import ExampleBatches, Examples
from userllm.training.trainer import (
    OptimizationConfig,
    StageTrainer,
    load_trainable,
    save_trainable,
    training_arguments,
)


@dataclass
class AlignmentConfig:
    """The alignment step."""

    to: Literal["next_title", "own_text"] = "next_title"
    """What user tokens are aligned to: the title that came next, or (soft prompts only) their own event's text."""
    event: str = " {title};"
    """Of own_text: the text of an event, as in ``fusion.text.event``."""
    steps: PositiveInt = 300
    """Optimiser steps."""
    histories: PositiveInt = 64
    """Users in a batch."""
    examples_per_history: PositiveInt = 8
    """Points in time drawn from one pass over a user's history."""
    temperature: PositiveFloat = 0.07
    """Of next_title: divides the cosine similarities."""
    optimization: OptimizationConfig = field(default_factory=lambda: OptimizationConfig(learning_rate=1e-3))
    """Optimiser and schedule."""
    encoder_rate: NonNegativeFloat = 0.1
    """Factor on the encoder's learning rate."""


class TitleAlignment(nn.Module):
    """Kind ``next_title``. Cross-entropy, in nats over the catalogue, of the next item under cosine similarities.

    Raises UserError where the model has no next-item task, or no user tokens at all.
    """

    titles: Tensor

    def __init__(self, model: UserLLM, temperature: float):
        super().__init__()
        self.model = model
        self.temperature = temperature
        names = [name for name, task in model.tasks.items() if task.config.kind == "next_item"]
        if not names:
            raise UserError("contextualize.alignment to next_title needs a task of kind next_item")
        if model.config.kind == "none":
            raise UserError("contextualize.alignment: fusion.kind none has no user tokens to align")
        self.task = names[0]
        with torch.no_grad():
            titles = title_embeddings(model, self.task, output=model.soft_prompt is None)
        # common to all titles is what any title is, not which
        self.register_buffer("titles", F.normalize(titles - titles.mean(0), dim=-1), persistent=False)

    def forward(self, examples: Examples) -> dict[str, Tensor]:
        """See the class."""
        device = self.model.lm.device
        mine = torch.nonzero(examples.task == examples.tasks.index(self.task))[:, 0]
        users = self.model.context(
            examples.histories.to(device), examples.rows[mine].to(device), examples.ends[mine].to(device)
        )
        scores = F.normalize(self._shown(users.tokens, users.mask), dim=-1) @ self.titles.T / self.temperature
        loss = F.cross_entropy(scores, examples.answers[mine].to(device), reduction="sum")
        loss = loss / processes.share(len(mine))
        return {"loss": loss, "alignment": loss}

    def _shown(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """What the language model is shown of each user's latest token (of all, where they have no age): [E, D]."""
        latest = tokens[:, -1] if self.model.config.tokens_have_age else tokens.mean(1)
        if self.model.soft_prompt is not None:
            projected: Tensor = self.model.soft_prompt.project(latest)
            return projected
        block = self.model.attachment.blocks[max(self.model.attachment.blocks)]
        update: Tensor = block.out(block.value(block.user_norm(latest)))
        return update


class TextAlignment(nn.Module):
    """Kind ``own_text``. Mean squared distance of soft prompts to the mean embedding of their events' words.

    In units of the LM's embeddings: 1 is what a prompt of zeros would have. event: template of an event's text. Raises
    UserError where there are no soft prompts, one per event.
    """

    def __init__(self, model: UserLLM, event: str):
        super().__init__()
        if model.soft_prompt is None or model.config.perceiver is not None:
            raise UserError(
                "contextualize.alignment to own_text needs a soft prompt per event: fusion.kind soft_prompt without a "
                "Perceiver"
            )
        self.model = model
        self.project = model.soft_prompt.project
        words = HistoryTextConfig(events=model.window, lead="", event=event, close="", max_tokens=sys.maxsize)
        self.words = HistoryText(words, event_texts(model.collator), model.tokenizer, model.lead)

    def forward(self, examples: Examples) -> dict[str, Tensor]:
        """See the class."""
        device = self.model.lm.device
        histories, rows, ends = examples.histories, examples.rows, examples.ends
        users = self.model.context(histories.to(device), rows.to(device), ends.to(device))
        events = [words for history in self.words.events(histories, rows, ends) for _, words in history]
        starts = torch.tensor([0, *map(len, events)], device=device).cumsum(0)[:-1]
        words = torch.tensor([word for event in events for word in event], dtype=torch.long, device=device)
        table: Tensor = self.model.lm.get_input_embeddings().weight.detach().float()  # type: ignore[union-attr, operator]
        target = F.embedding_bag(words, table, starts, mode="mean")
        prompts: Tensor = self.project(users.tokens[users.mask])
        distance = (prompts.float() - target).square().sum(-1) / target.square().sum(-1).mean().clamp_min(
            1e-12
        )
        loss = distance.sum() / processes.share(len(events))
        return {"loss": loss, "alignment": loss}


def title_embeddings(model: UserLLM, task: str, output: bool) -> Tensor:
    """Mean embedding [N, D] of each answer's tokens in the LM's output (or input) table."""
    layer = model.lm.get_output_embeddings() if output else model.lm.get_input_embeddings()
    table: Tensor = layer.weight  # type: ignore[union-attr, assignment]
    tokens = model.answers[task].tree.answer_tokens()
    real = (tokens >= 0)[..., None]
    rows = table.detach()[tokens.clamp_min(0)].float() * real
    return torch.sum(rows, 1) / torch.sum(real, 1).clamp_min(1)


def align(
    model: UserLLM,
    dataset: Dataset,
    split: Split,
    stored: StoredHistories,
    config: AlignmentConfig,
    folder: Path,
    seed: int,
    budget: Budget | None = None,
) -> list[dict[str, float]]:
    """Align ``model`` in place; resumes from ``folder``, and is skipped where it has been done. Returns the log.

    budget: of all of stage 2. It is charged what the alignment took, also where that was done before an interruption.
    """
    step = (
        TitleAlignment(model, config.temperature)
        if config.to == "next_title"
        else TextAlignment(model, config.event)
    )
    done = folder / "aligned.safetensors"
    if done.exists():
        load_trainable(step, done)
        if budget is not None:
            budget.resume(folder)
        return []
    trainer = StageTrainer(
        step,
        training_arguments(folder, config.optimization, config.steps, seed, None),
        ExampleBatches(model, dataset, split, stored, config, seed),
        # what is fused into the LM bears its name and is not the LM's own: the first match counts
        rates={".user_block.": 1.0, "model.encoder.": config.encoder_rate, "model.lm.": 0.0},
    )
    history = trainer.run()
    if budget is not None:
        budget.agree()
        if processes.is_main():
            budget.save(folder)
    save_trainable(step, done)
    processes.wait()
    return history
