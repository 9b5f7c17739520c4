"""The baseline that knows the user's own history and nothing else of the user: what they had most often, again."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from userllm.data.store import Dataset


def own_most_frequent(dataset: Dataset, rows: np.ndarray, popularity: Tensor) -> Tensor:
    """Scores [B, N], to rank by: how often user ``rows[b, 0]`` had each item before event ``rows[b, 2]``.

    All events before it count, however long ago. Ties go to the item had most recently, and among items never had to
    the more popular one (popularity [N]: counts of the crowd, from training events).
    """
    scores = (popularity / (popularity.max() + 1)).double().repeat(len(rows), 1)  # below 1: breaks ties only
    for b, (user, _, stop) in enumerate(rows):
        start = dataset.offsets[user]
        had = torch.from_numpy(dataset.events["item"][start : start + stop].astype(np.int64))
        items, count = torch.unique(had, return_counts=True)
        latest = torch.zeros(dataset.num_items, dtype=torch.long)
        latest.scatter_reduce_(0, had, torch.arange(1, len(had) + 1), "amax")  # 1 is the oldest event
        scores[b, items] += (count * (len(had) + 1) + latest[items]).double()
    return scores
