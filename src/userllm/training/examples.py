"""Training examples of stage 2: which user, at which point in time, is asked what, and the right answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from userllm import processes
from userllm.data.collation import StoredHistories
from userllm.data.splits import Split
from userllm.data.store import Dataset
from userllm.events import HistoryBatch
from userllm.model import UserLLM
from userllm.tasks import ClosedTask, OpenTask, TextExample
from userllm.training.trainer import StepBatches


class ExampleCounts(Protocol):
    """How many examples: optimiser steps, users in a batch, points in time from one pass over a user's history."""

    steps: int
    histories: int
    examples_per_history: int


@dataclass
class Examples:
    """E examples over B histories: which history, how many of its events count, the task, the answer; all [E].

    answers: of closed tasks, -1 elsewhere. texts: of open tasks, None elsewhere. The last ``stand_ins`` examples count
    for nothing.
    """

    histories: HistoryBatch
    rows: Tensor
    ends: Tensor
    tasks: list[str]
    task: Tensor
    answers: Tensor
    texts: list[TextExample | None]
    stand_ins: int = 0

    def with_stand_ins(self) -> Examples:
        """The same, and a made-up example of each task that has none."""
        missing = [number for number in range(len(self.tasks)) if not bool((self.task == number).any())]

        def more(known: Tensor, value: int | list[int]) -> Tensor:
            new = value if isinstance(value, list) else [value] * len(missing)
            return torch.cat([known, torch.tensor(new, dtype=known.dtype)])

        return replace(
            self,
            rows=more(self.rows, 0),
            ends=more(self.ends, 1),
            task=more(self.task, missing),
            answers=more(self.answers, 0),
            texts=self.texts + [TextExample("?", "?")] * len(missing),
            stand_ins=len(missing),
        )


class ExampleBatches(StepBatches):
    """Examples from the training part of a split.

    Users come in random order, every user once per pass; a user's examples are drawn from the events that the split
    gives to training, all within one stretch the encoder can see at once. steps: other than the config's.
    every: points in time are so many events apart, counted from a history's start; the first target is one, too.
    """

    def __init__(
        self,
        model: UserLLM,
        dataset: Dataset,
        split: Split,
        stored: StoredHistories,
        config: ExampleCounts,
        seed: int,
        steps: int | None = None,
        every: int = 1,
    ):
        super().__init__(config.steps if steps is None else steps)
        self.every = every
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
            latest = max(first, latest - latest % self.every)
            begin = max(0, latest - self.longest)
            lowest = max(first, begin + 1)
            others = rng.integers(lowest, latest + 1, size=self.config.examples_per_history - 1)
            others = np.maximum(lowest, others - others % self.every)
            targets = np.concatenate([[latest], others])
            user = int(self.split.users[k])
            spans.append((user, begin, latest))
            rows += [row] * len(targets)
            ends += list(targets)
            users += [user] * len(targets)
            tasks += list(rng.choice(len(names), size=len(targets), p=weights / weights.sum()))
        row_of, end_of = np.array(rows), np.array(ends)
        user_of, task_of = np.array(users), np.array(tasks)
        # every process draws the whole batch, so that its own share does not depend on how many there are
        own = np.array(processes.own_places(len(spans)), dtype=np.int64)
        mine = np.isin(row_of, own)
        end_of, user_of, task_of = end_of[mine], user_of[mine], task_of[mine]
        row_of = np.searchsorted(own, row_of[mine])
        spans = [spans[place] for place in own] or spans[:1]  # more processes than users: no examples, then
        begins = np.array([begin for _, begin, _ in spans])
        seen = np.minimum(end_of - begins[row_of], self.window)
        answers = np.full(len(row_of), -1)
        texts: list[TextExample | None] = [None] * len(row_of)
        for number, name in enumerate(names):
            its = np.flatnonzero(task_of == number)
            asked, case = self.model_tasks[name], (user_of[its], end_of[its], seen[its])
            if isinstance(asked, ClosedTask):
                answers[its] = asked.targets(self.dataset, *case)
            elif isinstance(asked, OpenTask):
                for place, text in zip(its, asked.examples(self.dataset, *case), strict=True):
                    texts[place] = text
        keep = (answers >= 0) | np.array([text is not None for text in texts], dtype=bool)
        examples = Examples(
            histories=self.stored.batch(spans),
            rows=torch.from_numpy(row_of[keep]),
            ends=torch.from_numpy((end_of - begins[row_of])[keep]),
            tasks=names,
            task=torch.from_numpy(task_of[keep]),
            answers=torch.from_numpy(answers[keep]),
            texts=[texts[place] for place in np.flatnonzero(keep)],
        )
        return {"examples": examples}
