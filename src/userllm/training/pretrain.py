"""Stage 1: the user encoder learns to predict the next event (User-LLM section 3.1).

Whole histories are trained in one pass, every position at once; batches hold a number of events, of similar length.
After each epoch the encoder ranks the full catalogue for the validation events; the best weights are kept and training
stops when they have not improved for ``patience`` epochs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from userllm import processes
from userllm.data.batches import BatchConfig, LengthBucketSampler, TrainingSequences
from userllm.data.collation import StoredHistories
from userllm.data.splits import Split
from userllm.data.store import Dataset
from userllm.encoders import UserEncoder
from userllm.errors import UserError
from userllm.evaluation.metrics import ranking_metrics
from userllm.evaluation.ranking import encoder_ranks
from userllm.events import HistoryBatch
from userllm.ranges import PositiveFloat, PositiveInt
from userllm.training.budget import MAX_STEPS, Budget
from userllm.training.trainer import (
    KeepBest,
    OptimizationConfig,
    StageTrainer,
    StepBatches,
    load_trainable,
    training_arguments,
)


@dataclass
class PretrainConfig:
    """Stage 1."""

    epochs: PositiveFloat = 10.0
    """Passes over the training events at most."""
    seconds: PositiveFloat | None = None
    """Train for so long instead of ``epochs`` (ours): CPU seconds, all threads together, or wall-clock seconds on an
    accelerator, validations included."""
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(events=4096))
    """Size of a batch."""
    windows_per_epoch: PositiveInt | None = None
    """Windows drawn per epoch under the papers' split; all by default."""
    recent: PositiveInt | None = None
    """Only each user's latest so many training events are targets, and an epoch holds no others; null: all of them.
    ``encoder.max_length`` gives one chunk per user, what RecTools' SASRec trains on (ours: the paper is silent)."""
    optimization: OptimizationConfig = field(
        default_factory=lambda: OptimizationConfig(learning_rate=2e-3, warmup=0.05)
    )
    """Optimiser and schedule."""
    evaluate_every: PositiveFloat = 1.0
    """Epochs between two validations."""
    validation_users: PositiveInt | None = 2000
    """Users ranked at a validation, the same ones each time; all by None."""
    patience: PositiveInt = 3
    """Validations without a better one before training stops."""
    select: Literal["recall@10", "ndcg@10", "log_likelihood"] | None = None
    """What makes a validation better than another (ours): of the next item, over the whole catalogue, seen items left
    out. Recall is a share of users and moves by chance between epochs, the log-likelihood hardly does. null: recall@10
    of an encoder that ranks items, the log-likelihood of any other."""


class PretrainBatches(StepBatches):
    """Chunks of histories, epoch after epoch."""

    def __init__(
        self, stored: StoredHistories, split: Split, max_length: int, config: PretrainConfig, seed: int
    ):
        sequences = TrainingSequences(split, max_length, seed, config.windows_per_epoch, config.recent)
        self.sampler = LengthBucketSampler(sequences, config.batch, seed)
        self.stored = stored
        self._epoch, self._order = -1, []
        steps = max(1, int(round(config.epochs * len(self.sampler))))
        super().__init__(steps if config.seconds is None else MAX_STEPS)

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return len(self.sampler)

    def batch(self, step: int) -> dict[str, Any]:
        """See ``StepBatches``."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self.sampler.set_epoch(epoch)
            self._epoch, self._order = epoch, self.sampler.order()
        rows = self.sampler.sequences.rows[self._order[place]]
        own = rows[processes.own_places(len(rows))]
        if len(own) == 0:  # more processes than chunks: one of a single event, which has no target
            own = rows[:1].copy()
            own[:, 2] = own[:, 1] + 1
        return dict(self.stored.next_events(own))


class NextEventLosses(nn.Module):
    """The encoder as the Trainer sees it: inputs and targets in, the losses of every field out."""

    def __init__(self, encoder: UserEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs: HistoryBatch, targets: HistoryBatch) -> dict[str, Tensor]:
        """See the class."""
        device = next(self.encoder.parameters()).device
        return self.encoder.next_event_losses(inputs.to(device), targets.to(device))


def pretrain(
    encoder: UserEncoder,
    dataset: Dataset,
    split: Split,
    stored: StoredHistories,
    config: PretrainConfig,
    folder: Path,
    seed: int,
    fsdp: bool = False,
) -> list[dict[str, float]]:
    """Train ``encoder`` in place and leave it with its best weights; resumes from ``folder``. Returns the log history.

    fsdp: train sharded over the processes; the encoder's weights are then shares (``sharding.whole``).
    Where the split has no validation events the last weights are kept. An encoder that cannot rank the catalogue is
    judged by the log-likelihood of what it predicts.
    """
    if (answers := split.answers(dataset)) is not None:
        encoder.choose_among(torch.from_numpy(answers))
    if encoder.needs_frequencies:
        encoder.use_frequencies(training_counts(stored, split))
    batches = PretrainBatches(stored, split, encoder.max_length, config, seed)
    rows = split.examples("validation", max_length=encoder.max_length)
    if config.validation_users is not None and config.validation_users < len(rows):
        rows = rows[
            np.random.default_rng([seed, 5]).choice(len(rows), config.validation_users, replace=False)
        ]

    def validate() -> dict[str, float]:
        if not encoder.ranks_items:
            return {"log_likelihood": next_event_log_likelihood(encoder, stored, rows)}
        ranks, logliks = encoder_ranks(encoder, stored, dataset, rows, exclude_seen=True)
        metrics = {name: estimate.value for name, estimate in ranking_metrics(ranks).items()}
        return metrics | {"log_likelihood": float(logliks.mean())}

    every = max(1, int(round(config.evaluate_every * batches.per_epoch))) if len(rows) else None
    model = NextEventLosses(encoder)
    arguments = training_arguments(folder, config.optimization, batches.steps, seed, every)
    budget = None
    if config.seconds is not None:
        budget = Budget(config.seconds, config.optimization.warmup, arguments.device)
    trainer = StageTrainer(model, arguments, batches, validate, budget=budget, units=[] if fsdp else None)
    if every is not None:
        trainer.add_callback(
            KeepBest(model, folder, f"eval_{_selected_by(config, encoder)}", config.patience)
        )
    history = trainer.run()
    processes.wait()
    if (folder / "best.safetensors").exists():
        load_trainable(model, folder / "best.safetensors")
    return history


def _selected_by(config: PretrainConfig, encoder: UserEncoder) -> str:
    if config.select is None:
        return "recall@10" if encoder.ranks_items else "log_likelihood"
    if config.select != "log_likelihood" and not encoder.ranks_items:
        raise UserError(
            f"pretrain.select: this encoder cannot rank the catalogue, so it has no {config.select}; "
            "use log_likelihood or leave it out"
        )
    return config.select


def training_counts(stored: StoredHistories, split: Split, batch: int = 512) -> dict[str, Tensor]:
    """By field, how often each vocabulary id is that of a training target, [size]; 0 at padding."""
    counts = {f.name: torch.zeros(f.size, dtype=torch.long) for f in stored.collator.vocabulary}
    first = np.full(len(split.users), split.first_target)
    rows = np.stack([split.users, first, np.maximum(first, split.train_end)], axis=1)
    for start in range(0, len(rows), batch):
        for name, ids in stored.batch(rows[start : start + batch]).fields.items():
            counts[name] += torch.bincount(ids.flatten(), minlength=len(counts[name]))
    for count in counts.values():
        count[0] = 0
    return counts


@torch.no_grad()
def next_event_log_likelihood(
    encoder: UserEncoder, stored: StoredHistories, rows: np.ndarray, batch: int = 64
) -> float:
    """Mean log-likelihood of the event that follows each row (user, start, stop), in nats; minus the encoder's loss."""
    device = next(encoder.parameters()).device
    was_training = encoder.training
    encoder.eval()

    def of_batch(start: int) -> float:
        part = rows[start : start + batch]
        inputs, targets = stored.batch(part), stored.batch(part + np.array([0, 1, 1]))
        last = targets.mask & (targets.mask.cumsum(1) == targets.lengths[:, None])
        targets = HistoryBatch(targets.fields, last)
        losses = encoder.next_event_losses(inputs.to(device), targets.to(device))
        return -float(losses["loss"]) * len(part)

    total = 0.0
    for nats in processes.spread(range(0, len(rows), batch), of_batch):
        total += nats
    encoder.train(was_training)
    return total / max(len(rows), 1)
