"""Beam search over a closed set of answers, batched over users; and the same search without the constraint.

A hypothesis is finished as soon as one answer is left below its node. Log-likelihoods only fall along a path, so a
hypothesis that is already worse than a user's k-th finished answer is dropped, and a user is done when none is left.
Scores are exact sequence log-likelihoods: no length penalty, no renormalisation of the survivors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from userllm.decoding.answers import Advice, ClosedAnswers, LogitHead


class TextState(Protocol):
    """A batch of texts inside the LM, advanced token by token (implemented by ``model.py``)."""

    def start(self, prompt_ids: Tensor) -> Tensor:
        """Read the prompt once per user: last hidden states [B, D]."""
        ...

    def advance(self, tokens: Tensor, nodes: Tensor, parents: Tensor) -> Tensor:
        """Go on from rows ``parents`` [R] (R a multiple of B, users adjacent) with one token each: [R, D]."""
        ...


@dataclass
class Ranking:
    """The best answers per user: answers [B, k] (-1 where fewer were found) and scores [B, k] in nats, best first."""

    answers: Tensor
    scores: Tensor


@torch.no_grad()
def search_answers(
    state: TextState,
    answers: ClosedAnswers,
    head: LogitHead,
    users: int,
    k: int,
    beams: int | None = None,
    excluded: Tensor | None = None,
    advice: Advice | None = None,
) -> Ranking:
    """The k best answers for each of B = ``users`` users by beam search on the trie.

    beams: hypotheses kept per user and step (default k). excluded: [B, N] bool, answers never to give (items already
    in the history); they and beginnings that lead to no others are passed over, the others' scores do not change.
    advice: see ``ClosedAnswers.choices``; the nodes it is given are as many for every user, user by user.
    """
    tree, device = answers.tree, answers.prompt_ids.device
    beams = k if beams is None else beams
    whole = answers.normalization == "vocabulary"
    left = None  # [B, N + 1]: answers that may be given before each place of the tree's order
    if excluded is not None:
        left = torch.nn.functional.pad((~excluded)[:, tree.order].long().cumsum(1), (1, 0))
    done_answer = torch.full((users, k), -1, dtype=torch.long, device=device)
    done_score = torch.full((users, k), -torch.inf, device=device)
    width = 1
    node = torch.zeros(users, 1, dtype=torch.long, device=device)
    score = torch.zeros(users, 1, device=device)
    hidden = state.start(answers.prompt_ids)
    if len(tree) == 1 and not whole:
        allowed = torch.ones_like(node, dtype=torch.bool) if excluded is None else ~excluded
        done_answer[:, :1], done_score[:, :1] = (
            torch.where(allowed, 0, -1),
            torch.where(allowed, 0.0, -torch.inf),
        )
        node[:] = -1
    while bool((node >= 0).any()):
        rows, children, log_p = answers.choices(hidden, node.flatten(), head, advice)
        total = score.flatten()[rows] + log_p
        user = rows // width
        ended = tree.child_count[children] == 0 if whole else tree.is_single(children)
        answer = tree.order[tree.low[children]]
        if left is not None:  # where nothing below may be given, a beam would be wasted
            none = left[user, tree.high[children]] == left[user, tree.low[children]]
            total = total.masked_fill(none, -torch.inf)
        grid, filled = _by_user(user, users)
        flat_total = torch.where(filled, total[grid], -torch.inf)
        is_end = ended[grid] & filled

        # finished answers compete with those found before
        pool_score = torch.cat([done_score, flat_total.masked_fill(~is_end, -torch.inf)], dim=1)
        pool_answer = torch.cat([done_answer, answer[grid]], dim=1)
        done_score, best = pool_score.topk(k, dim=1)
        done_answer = pool_answer.gather(1, best).masked_fill(done_score == -torch.inf, -1)

        # open hypotheses go on where they can still beat the k-th finished answer
        open_score = flat_total.masked_fill(is_end, -torch.inf)
        open_score = open_score.masked_fill(open_score <= done_score[:, -1:], -torch.inf)
        score, best = open_score.topk(min(beams, open_score.shape[1]), dim=1)
        width = int((score > -torch.inf).sum(1).max())
        if width == 0:
            break
        score, picked = score[:, :width], grid.gather(1, best[:, :width])
        alive = score > -torch.inf
        first_row = torch.arange(users, device=device)[:, None] * (len(hidden) // users)
        parents = torch.where(alive, rows[picked], first_row)
        node = torch.where(alive, children[picked], -1)
        tokens = torch.where(alive, tree.token[node.clamp_min(0)], answers.prompt_ids[0])
        hidden = state.advance(tokens.flatten(), node.clamp_min(0).flatten(), parents.flatten())
    return Ranking(done_answer, done_score)


@torch.no_grad()
def search_free(
    state: TextState, prompt_ids: Tensor, head: LogitHead, users: int, k: int, eos: int, steps: int
) -> tuple[Tensor, Tensor]:
    """Unconstrained beam search with the same bookkeeping: token sequences [B, k, steps] and scores [B, k].

    It exists to measure what the constraint costs (``benchmarks/decoding.py``).
    """
    device = prompt_ids.device
    hidden = state.start(prompt_ids)
    score = torch.zeros(users, 1, device=device)
    sequences = torch.zeros(users, 1, 0, dtype=torch.long, device=device)
    done_score = torch.full((users, k), -torch.inf, device=device)
    done = torch.full((users, k, steps), eos, dtype=torch.long, device=device)
    for step in range(steps):
        width = score.shape[1]
        log_p = torch.log_softmax(head(hidden).float(), dim=-1)
        total = (score.reshape(-1, 1) + log_p).view(users, -1)
        vocabulary = log_p.shape[-1]
        best_score, best = total.topk(min(2 * k, total.shape[1]), dim=1)
        row, token = best // vocabulary, best % vocabulary
        extended = torch.cat(
            [sequences.gather(1, row[..., None].expand(-1, -1, step)), token[..., None]], dim=2
        )
        ended = token == eos if step < steps - 1 else torch.ones_like(token, dtype=torch.bool)
        padded = torch.nn.functional.pad(extended, (0, steps - step - 1), value=eos)
        pool = torch.cat([done_score, best_score.masked_fill(~ended, -torch.inf)], dim=1)
        done_score, keep = pool.topk(k, dim=1)
        done = torch.cat([done, padded], dim=1).gather(1, keep[..., None].expand(-1, -1, steps))
        open_score = best_score.masked_fill(ended, -torch.inf)
        open_score = open_score.masked_fill(open_score <= done_score[:, -1:], -torch.inf)
        score, keep = open_score.topk(min(k, open_score.shape[1]), dim=1)
        width_next = int((score > -torch.inf).sum(1).max())
        if width_next == 0:
            break
        score, keep = score[:, :width_next], keep[:, :width_next]
        sequences = extended.gather(1, keep[..., None].expand(-1, -1, step + 1))
        offset = torch.arange(users, device=device)[:, None] * width
        parents = (row.gather(1, keep) + offset).flatten()
        hidden = state.advance(sequences[..., -1].flatten(), torch.zeros_like(parents), parents)
    return done, done_score


def _by_user(user: Tensor, users: int) -> tuple[Tensor, Tensor]:
    """A flat list sorted by user as a padded grid [users, most]: positions in the list, and which are real."""
    counts = torch.bincount(user, minlength=users)
    first = torch.cumsum(counts, 0) - counts
    within = torch.arange(int(counts.max()) if len(user) else 0, device=user.device)
    filled = within[None] < counts[:, None]
    return torch.where(filled, first[:, None] + within[None], 0), filled
