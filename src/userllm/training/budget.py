"""Training for a given time instead of a number of steps, so that unlike models can be compared at equal cost.

The clock counts the process's CPU seconds, all threads together, where the model is on a CPU: a busy machine does not
shorten a training, and several processes use it up together. On an accelerator it counts wall-clock seconds, the main
process's. The learning rate follows the share that is used of the time left when the first step begins: what is done
before (the LM's states of titles, an alignment) is paid for, and takes nothing from the warm-up. A resumed training
goes on from the seconds its checkpoint had used. Its batches are the same, but how many of them fit depends on the
machine: unlike a training by steps, two of these are not equal bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from userllm import processes
from userllm.clock import clock_of
from userllm.json_file import AGAIN, read_object
from userllm.whole_file import write_text

MAX_STEPS = 10**9
"""Steps a Trainer is told where time is what ends the training."""

_FILE = "seconds.json"


class Budget(TrainerCallback):
    """``seconds`` of training on ``device``, counted from now. ``warmup``: share of them with a rising rate.

    spared: seconds so far that work took which is part of the training, but was found done; they count.
    """

    def __init__(
        self, seconds: float, warmup: float, device: torch.device, spared: Callable[[], float] = lambda: 0.0
    ):
        self.seconds = seconds
        self.warmup = warmup
        self._counts_cpu = device.type == "cpu"
        clock = clock_of(device)
        self._clock = lambda: clock() + spared()
        self._began = self._clock()
        self._agreed = self._before = 0.0
        self._first_step: float | None = None  # the share that was used when it began

    @property
    def used(self) -> float:
        """Seconds used so far, those before an interruption included; of several processes as of their last step."""
        return self._before + (self._here if processes.count() == 1 else self._agreed)

    @property
    def _here(self) -> float:
        return self._clock() - self._began

    @property
    def share(self) -> float:
        """Share of the budget that is used, 0..1."""
        return min(self.used / self.seconds, 1.0)

    def rate(self) -> float:
        """Factor on the learning rate now: a linear rise, then cosine decay to 0."""
        before = self.share if self._first_step is None else self._first_step
        share = (self.share - before) / (1 - before) if before < 1 else 1.0
        if share < self.warmup:
            return share / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (share - self.warmup) / (1 - self.warmup)))

    def save(self, folder: Path) -> None:
        """Write the seconds used into a folder: a checkpoint, or what came before the first one."""
        write_text(folder / _FILE, json.dumps({"used": self.used, "first_step": self._first_step}))

    def resume(self, folder: Path) -> None:
        """Go on from the seconds in such a folder."""
        saved = read_object(folder / _FILE, AGAIN, "used")
        self._before, self._first_step = saved["used"], saved.get("first_step")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The rate begins to rise, unless it did so before an interruption."""
        self.agree()
        if self._first_step is None:
            self._first_step = self.share

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Rate and end are to be the same in all processes."""
        self.agree()

    def agree(self) -> None:
        """Settle ``used`` between the processes; all of them have to call this."""
        if processes.count() > 1:
            self._agreed = (
                processes.total(self._here) if self._counts_cpu else processes.told(lambda: self._here)
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop when the time is used up, after a last evaluation where there are any."""
        if self.used >= self.seconds:
            control.should_training_stop = True
            control.should_evaluate = args.eval_strategy != "no"
            control.should_log = True
