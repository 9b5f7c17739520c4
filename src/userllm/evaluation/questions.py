"""An evaluation's long work as questions that can be answered anywhere: one batch of users each.

Who answers is an ``Ask``: by default the processes of this run, each for every so manieth batch; ``scale_out`` has one
that hands questions to the workers of a Ray cluster. A batch is answered whole, by one of them, so that the numbers are
the same, bit for bit, whoever answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Question:
    """What a system of a task says about the batch of the evaluation's users that begins at ``start``."""

    task: str
    system: str
    start: int


Answers = dict[str, np.ndarray]
"""By name, a value for each user of a batch."""

Ask = Callable[[Sequence[Question], Callable[[Question], Answers]], list[Answers]]
"""(questions, how they are answered here) -> answers, in the order of the questions."""


def joined(answers: Sequence[Answers]) -> Answers:
    """Answers of batch after batch as one; of no batch, nothing."""
    return {name: np.concatenate([one[name] for one in answers]) for name in (answers[0] if answers else {})}
