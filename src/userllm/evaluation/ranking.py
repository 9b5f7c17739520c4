"""Full-catalogue ranking: the encoder's own, and popularity's.

Tie rule, everywhere: among equal scores the item that comes first in the catalogue wins.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from userllm import processes
from userllm.data.collation import StoredHistories
from userllm.data.store import Dataset
from userllm.encoders import DualEncoder, UserEncoder


def seen_items(dataset: Dataset, rows: np.ndarray) -> Tensor:
    """[B, N] bool: the items user ``rows[b, 0]`` has had before event ``rows[b, 2]``, however long ago."""
    mask = torch.zeros(len(rows), dataset.num_items, dtype=torch.bool)
    for b, (user, _, stop) in enumerate(rows):
        start = dataset.offsets[user]
        mask[b, torch.from_numpy(dataset.events["item"][start : start + stop].astype(np.int64))] = True
    return mask


def target_items(dataset: Dataset, rows: np.ndarray) -> Tensor:
    """[B] the item at event ``rows[b, 2]``."""
    return torch.from_numpy(dataset.events["item"][dataset.offsets[rows[:, 0]] + rows[:, 2]].astype(np.int64))


def rank_of(scores: Tensor, target: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Rank [B], from 1, of each target among scores [B, N]; ``excluded`` [B, N] items take no part.

    A target that is itself excluded keeps its place (a repeated item still has to be found). A score that is not a
    number never wins: such a target comes last, and such an item counts as ahead.
    """
    own = scores.gather(1, target[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device)[None] < target[:, None]
    ahead = ~((scores < own) | ((scores == own) & ~earlier))
    if excluded is not None:
        ahead &= ~excluded
    return ahead.sum(1) + 1


def by_length(rows: np.ndarray, batch: int) -> list[np.ndarray]:
    """Places of rows [n, 3], a batch each, alike lengths together."""
    order = np.argsort(rows[:, 2] - rows[:, 1], kind="stable")
    return [order[start : start + batch] for start in range(0, len(order), batch)]


@torch.no_grad()
def encoder_answers(
    encoder: UserEncoder, stored: StoredHistories, dataset: Dataset, rows: np.ndarray, exclude_seen: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The encoder's rank of each true next item [b], and its log-likelihood in nats [b] over the catalogue: one batch.

    rows [b, 3]: (user, start, stop) as ``Split.examples`` gives them; a history without events is not allowed here.
    Raises UserError for an encoder that cannot rank the catalogue by itself.
    """
    device = next(encoder.parameters()).device
    histories = stored.batch(rows).to(device)
    everyone = torch.arange(len(rows), device=device)
    scores = encoder.next_item_scores(histories, everyone, histories.lengths)
    target = target_items(dataset, rows).to(device)
    excluded = seen_items(dataset, rows).to(device) if exclude_seen else None
    log_p = torch.log_softmax(scores.float(), -1).gather(1, target[:, None])[:, 0]
    return rank_of(scores, target, excluded).cpu().numpy(), log_p.cpu().numpy()


def encoder_ranks(
    encoder: UserEncoder,
    stored: StoredHistories,
    dataset: Dataset,
    rows: np.ndarray,
    exclude_seen: bool,
    batch: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """The same for any number of rows [n, 3], batches of them spread over the processes."""
    ranks, logliks = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows))
    was_training = encoder.training
    encoder.eval()
    parts = by_length(rows, batch)
    said = processes.spread(
        parts, lambda part: encoder_answers(encoder, stored, dataset, rows[part], exclude_seen)
    )
    for part, (found, log_p) in zip(parts, said, strict=True):
        ranks[part], logliks[part] = found, log_p
    encoder.train(was_training)
    return ranks, logliks


@torch.no_grad()
def label_ranks(
    encoder: DualEncoder, stored: StoredHistories, rows: np.ndarray, targets: Tensor, batch: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """The rank of the true value of the field that a dual encoder's label tower knows [n], and its log-likelihood [n].

    targets [n]: values by their place in the vocabulary. The tower has learned which values the *next event* has, and
    is asked which one the history has most: the Dual Encoder baseline of the favourite category (User-LLM section
    4.3.2; what exactly the paper's predicts is not said).
    """
    device = next(encoder.parameters()).device
    ranks, logliks = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows))
    was_training = encoder.training
    encoder.eval()
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        users, _ = encoder(stored.batch(rows[part]).to(device))
        scores, target = encoder.label_scores(users), targets[part].to(device)
        ranks[part] = rank_of(scores, target).cpu().numpy()
        logliks[part] = torch.log_softmax(scores.float(), -1).gather(1, target[:, None])[:, 0].cpu().numpy()
    encoder.train(was_training)
    return ranks, logliks


def fixed_ranks(
    scores: Tensor, dataset: Dataset, rows: np.ndarray, exclude_seen: bool, batch: int = 512
) -> np.ndarray:
    """Ranks [n] of the true next items when every user gets the same scores [N] (popularity; an LM without a user)."""
    ranks = np.zeros(len(rows), dtype=np.int64)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        excluded = seen_items(dataset, part) if exclude_seen else None
        everyone = scores[None].expand(len(part), -1)
        ranks[start : start + batch] = rank_of(everyone, target_items(dataset, part), excluded).numpy()
    return ranks
