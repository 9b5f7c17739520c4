"""transformers' Trainer for both stages: batches that are a function of the step, small checkpoints, exact resuming."""

from __future__ import annotations

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from userllm import processes
from userllm.errors import UserError
from userllm.freed_memory import hand_back, hand_back_if_scarce
from userllm.json_file import AGAIN, read_object
from userllm.ranges import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from userllm.tensor_file import save_tensors
from userllm.training.budget import Budget
from userllm.training.sharding import (
    gathered,
    is_sharded,
    keep_whole_states,
    kept,
    shard,
    share_like,
    whole,
)

__all__ = ["KeepBest", "OptimizationConfig", "StageTrainer", "StepBatches", "set_seed", "training_arguments"]

COMPLETE = "complete"
"""Marker written into a checkpoint folder after everything else: a folder without it was cut off and is not used."""

TRAIN_CPU = "eval_train_cpu_s"
"""CPU seconds of training in all processes, evaluations left out, up to an evaluation. What a killed process did after
its last evaluation does not count."""


class StepBatches(ABC, Dataset[Any]):
    """Training batches, each a pure function of (seed, step): a resumed run sees what an uninterrupted one saw.

    Of several processes (``userllm.processes``) each gets its share of the same batch; the shares may differ in size.
    """

    start = 0

    def __init__(self, steps: int):
        self.steps = steps

    @abstractmethod
    def batch(self, step: int) -> dict[str, Any]:
        """This process's share of the batch of one step, as keyword arguments of the model."""

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batch(min(self.start + index, self.steps - 1))


@dataclass
class OptimizationConfig:
    """Optimiser and schedule of one stage (User-LLM v1 Table 9 gives rate, batch and steps; the optimiser is ours)."""

    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """"adafactor": T5's own, whose steps are a share of each weight matrix's own size. T5's embeddings are of size 13,
    its other weights of .05 to 2: no one rate of AdamW suits them and what is projected among them."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Decay of matrices; vectors and scalars are never decayed."""
    warmup: Fraction = 0.1
    """Share of the steps with a linearly rising rate (paper: 0.1); cosine decay to 0 follows."""
    gradient_clip: NonNegativeFloat = 1.0
    """Largest gradient norm; 0: any (ours)."""
    log_every: PositiveInt = 20
    """Steps between two logged losses."""
    save_every: PositiveInt = 200
    """Steps between two checkpoints."""


class StageTrainer(Trainer):
    """A Trainer whose model returns a dict of losses and whose checkpoints hold trainable weights only.

    With several processes, losses are such that their mean over the processes is the batch's (``processes.share``).
    rates: factor on the learning rate by a part of the weight's name; the first match counts.
    evaluator: called without arguments, returns metrics by name. budget: ends the training, and sets its rate, by time.
    units: parts of the model, for training it sharded (see ``sharding``); afterwards it still is.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        batches: StepBatches,
        evaluator: Callable[[], dict[str, float]] | None = None,
        rates: Mapping[str, float] | None = None,
        budget: Budget | None = None,
        units: Sequence[nn.Module] | None = None,
    ):
        if units is not None:
            model.is_parallelizable = model.model_parallel = True  # type: ignore[assignment] # not to be moved as a whole
        super().__init__(model=model, args=args, train_dataset=batches, eval_dataset=batches)
        if units is not None:
            shard(model, units)
        self.batches = batches
        self.evaluator = evaluator
        self.rates = dict(rates or {})
        self.budget = budget
        self._parts: dict[str, list[float]] = {}
        self._clock = time.process_time()
        self.add_callback(_MarkComplete())
        if budget is not None:
            self.add_callback(budget)

    def get_train_dataloader(self) -> DataLoader[Any]:
        # its own generator: a loader draws a seed as it starts, and a resumed training starts one more
        return DataLoader(self.batches, batch_size=None, shuffle=False, generator=torch.Generator())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        hand_back_if_scarce()
        with processes.one_batch():
            losses: dict[str, Tensor] = model(**inputs)
        for name, value in losses.items():
            if name != "loss":
                self._parts.setdefault(name, []).append(float(value.detach()))
        return (losses["loss"], losses) if return_outputs else losses["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._parts:
            means = {name: sum(values) / len(values) for name, values in self._parts.items()}
            logs.update({name: processes.total(mean) / processes.count() for name, mean in means.items()})
            self._parts.clear()
            hand_back()
        # also after resuming: a share of the training
        self.state.epoch = (
            self.state.global_step / self.batches.steps if self.budget is None else self.budget.share
        )
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups: dict[tuple[float, bool], list[Tensor]] = {}
            for name, weight in self.model.named_parameters():  # type: ignore[union-attr]
                if weight.requires_grad:
                    rate = next((f for key, f in self.rates.items() if key in name), 1.0)
                    groups.setdefault((rate, weight.ndim > 1), []).append(weight)
            options: list[dict[str, Any]] = [
                {
                    "params": weights,
                    "lr": self.args.learning_rate * rate,
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for (rate, decays), weights in groups.items()
            ]
            sharded = is_sharded(self.model)  # type: ignore[arg-type]
            if self.args.optim == "adamw_torch":
                self.optimizer = torch.optim.AdamW(options, betas=(0.9, 0.98), fused=True)
            elif sharded:
                raise UserError(
                    "optimization.optimizer: adafactor needs whole weights; use adamw where they are sharded"
                )
            else:
                self.optimizer = torch.optim.Adafactor(options)
            if sharded:
                keep_whole_states(self.optimizer)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if (budget := self.budget) is None:
            return super().create_scheduler(num_training_steps, optimizer)
        chosen = optimizer or self.optimizer
        assert isinstance(chosen, torch.optim.Optimizer)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, lambda _: budget.rate())
        return self.lr_scheduler

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        assert self.model is not None
        earlier = [entry[TRAIN_CPU] for entry in self.state.log_history if TRAIN_CPU in entry]
        spent = max(earlier, default=0.0) + processes.total(time.process_time() - self._clock)
        self.model.eval()
        with gathered(self.model):
            metrics = {f"eval_{name}": value for name, value in self.evaluator().items()}
        metrics[TRAIN_CPU] = spent
        self.model.train()
        self._clock = time.process_time()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_trainable(self.model, folder / "trainable.safetensors")  # type: ignore[arg-type]
        if self.budget is not None and processes.is_main():
            self.budget.save(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if is_sharded(self.model) and not self.args.should_save:  # type: ignore[arg-type]
            self.optimizer.state_dict()  # type: ignore[union-attr] # the main process asks for everybody's share
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trainable(model or self.model, Path(resume_from_checkpoint) / "trainable.safetensors")  # type: ignore[arg-type]

    def run(self) -> list[dict[str, float]]:
        """Train from the last complete checkpoint, if there is one; returns the log history."""
        checkpoint = processes.told(lambda: last_checkpoint(Path(str(self.args.output_dir))))
        if (
            not processes.is_main()
        ):  # dropout and samples of its own; the main process draws as a single one does
            set_seed(self.args.seed + processes.number())
        if checkpoint is not None:
            self.batches.start = read_object(checkpoint / "trainer_state.json", AGAIN, "global_step")[
                "global_step"
            ]
            if self.budget is not None:
                self.budget.resume(checkpoint)
            print(f"resuming from {checkpoint}")
        self._clock = time.process_time()
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return self.state.log_history  # type: ignore[return-value]


class KeepBest(TrainerCallback):
    """Keeps the best evaluation's weights in ``best.safetensors``; stops after ``patience`` without a better one.

    The log history is its only memory, and that is part of every checkpoint.
    """

    def __init__(self, model: nn.Module, folder: Path, metric: str, patience: int):
        self.model, self.file, self.metric, self.patience = (
            model,
            folder / "best.safetensors",
            metric,
            patience,
        )

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A training that was cut off after its last evaluation ends after one more step."""
        values = self._values(state)
        control.should_training_stop = bool(values) and self._since_best(values) >= self.patience

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        since = self._since_best(self._values(state))
        if since == 0:
            save_trainable(self.model, self.file)
        elif since >= self.patience:
            control.should_training_stop = True

    def _values(self, state: TrainerState) -> list[float]:
        return [entry[self.metric] for entry in state.log_history if self.metric in entry]

    def _since_best(self, values: list[float]) -> int:
        return len(values) - 1 - max(range(len(values)), key=lambda i: values[i])


class _MarkComplete(TrainerCallback):
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        processes.wait()  # each keeps the state of its random numbers there
        if processes.is_main():
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The latest complete checkpoint in a folder; incomplete ones are removed."""
    complete = []
    for found in folder.glob("checkpoint-*"):
        if (found / COMPLETE).exists():
            complete.append(found)
        else:
            shutil.rmtree(found)
    return max(complete, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def save_trainable(model: nn.Module, file: Path) -> None:
    """Write the trainable weights by name, atomically; all processes call it, the main one writes."""
    weights = {n: kept(whole(p.detach())) for n, p in model.named_parameters() if p.requires_grad}
    if not processes.is_main():
        return
    save_tensors(weights, file)


def load_trainable(model: nn.Module, file: Path) -> None:
    """Read back what ``save_trainable`` wrote."""
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise UserError(
            f"{file}: damaged ({error}); remove {file.parent}, and training goes on from the one before, or anew"
        ) from error
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trainable.keys() != weights.keys():
        raise RuntimeError(
            f"{file} holds other weights than this model trains: was the configuration changed?"
        )
    with torch.no_grad():
        for name, weight in trainable.items():
            weight.copy_(share_like(weights[name], weight))


def training_arguments(
    folder: Path, config: OptimizationConfig, steps: int, seed: int, eval_every: int | None
) -> TrainingArguments:
    """TrainingArguments shared by both stages."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.parent / "tensorboard" / folder.name)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=int(round(steps * config.warmup)),
        max_grad_norm=config.gradient_clip,
        logging_steps=config.log_every,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        eval_strategy="no" if eval_every is None else "steps",
        eval_steps=eval_every,
        seed=seed,
        report_to=["tensorboard"],
        remove_unused_columns=False,
        ignore_data_skip=True,
        dataloader_num_workers=0,
        disable_tqdm=not os.isatty(2),
        optim="adafactor" if config.optimizer == "adafactor" else "adamw_torch",
        bf16=False,
        # the launchers' sign that several CPUs are meant; one process takes what there is
        use_cpu=processes.count() > 1 and not torch.accelerator.is_available(),
        ddp_broadcast_buffers=False,  # ours are constants, tables of texts among them
    )
    if arguments.n_gpu > 1:  # one process uses one accelerator; for more there are launchers
        arguments._n_gpu = 1
    return arguments
