"""Baselines that know the crowd and not the user. Both count training events only."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from userllm.data.splits import Split
from userllm.data.store import Dataset
from userllm.tasks import ClosedTask, OpenTask


def item_counts(dataset: Dataset, split: Split) -> Tensor:
    """How often each catalogue item occurs among the split's training events, [N] float."""
    counts = np.zeros(dataset.num_items)
    for user, end in zip(split.users, split.train_end, strict=True):
        start = dataset.offsets[user]
        np.add.at(counts, dataset.events["item"][start : start + end], 1)
    return torch.from_numpy(counts)


def answer_counts(task: ClosedTask, dataset: Dataset, split: Split, window: int) -> Tensor:
    """How often each answer of a task is right at the end of the users' training events, [N] float."""
    kept = split.train_end > split.first_target
    targets = task.targets(dataset, split.users[kept], split.train_end[kept] - 1, window)
    return torch.from_numpy(np.bincount(targets[targets >= 0], minlength=len(task.answers)).astype(float))


def written_targets(task: OpenTask, dataset: Dataset, split: Split) -> list[str]:
    """What would have been right to write at the end of the users' training events, of all who were to be asked."""
    kept = split.train_end > split.first_target
    asked = task.examples(dataset, split.users[kept], split.train_end[kept] - 1, 0)
    return [one.target for one in asked if one is not None]
