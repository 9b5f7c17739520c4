"""What beam search misses: its best k beside the exact best k, for the same users.

A beam can lose an answer whose beginning looks poor. The exact list comes from the score of every answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from userllm.contextual import ContextualLM
from userllm.errors import UserError
from userllm.evaluation.metrics import Estimate, bootstrap_mean
from userllm.fusion.attach import UserContext


@dataclass(frozen=True)
class BeamMisses:
    """Beam search against the exact ranking over ``users`` users; lists of k, found with ``beams`` hypotheses."""

    users: int
    k: int
    beams: int
    recall: Estimate
    """Mean share of a user's exact best k that the beam search found."""
    identical: Estimate
    """Share of users whose list holds the same answers in the same order (answers of one score may change places)."""
    worst_gap: float
    """The most, in nats, by which the r-th answer of any user's exact list beats the r-th of the beam search's."""
    missing: int
    """Places of the exact lists for which the beam search found no answer at all."""


@torch.no_grad()
def beam_misses(
    model: ContextualLM,
    task: str,
    batches: Iterable[tuple[UserContext, Tensor | None]],
    k: int = 10,
    beams: Sequence[int] = (20,),
    block: int = 256,
) -> list[BeamMisses]:
    """Compare the two for each number of beams, over batches of users.

    A batch is the users and the answers [B, N] to pass over, or None. Raises UserError for k < 1, beams < 1, no users.
    """
    if k < 1 or not beams or min(beams) < 1:
        raise UserError(f"k is {k} and beams is {beams}; both are at least 1")
    k = min(k, len(model.answers[task]))
    tallies = [_Tally() for _ in beams]
    for users, excluded in batches:
        scores = model.score_answers(task, users, block=block)
        if excluded is not None:
            scores = scores.masked_fill(excluded, -torch.inf)
        for width, tally in zip(beams, tallies, strict=True):
            found = model.rank_answers(task, users, k, width, excluded)
            for own, answers in zip(scores, found.answers, strict=True):
                tally.add(own, answers)
    if not tallies[0].recall:
        raise UserError("no user to compare the beam search for")
    return [tally.result(k, width) for width, tally in zip(beams, tallies, strict=True)]


class _Tally:
    """One number of beams, user by user."""

    def __init__(self) -> None:
        self.recall: list[float] = []
        self.identical: list[float] = []
        self.worst_gap = 0.0
        self.missing = 0

    def add(self, scores: Tensor, found: Tensor) -> None:
        """A user's exact scores [N], -inf for what is passed over, and the beam search's list [k]."""
        values, exact = scores.topk(len(found))
        real = values > -torch.inf  # a user may have fewer than k answers left
        values, exact, found = values[real], exact[real], found[real]
        if len(exact) == 0:
            return
        given = found >= 0
        # both lists by the exact scores: the two computations differ in the last digits
        gap = values[given] - scores[found[given]]
        self.recall.append(float(torch.isin(exact, found).float().mean()))
        self.identical.append(float(bool(given.all()) and bool((gap.abs() < 1e-4).all())))
        self.worst_gap = max([self.worst_gap, *gap.tolist()])
        self.missing += int((~given).sum())

    def result(self, k: int, beams: int) -> BeamMisses:
        recall, identical = bootstrap_mean(self.recall), bootstrap_mean(self.identical)
        return BeamMisses(len(self.recall), k, beams, recall, identical, self.worst_gap, self.missing)
