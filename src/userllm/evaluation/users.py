"""Whom an evaluation asks about, and whose history stands in for theirs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from userllm.data.splits import Split
from userllm.decoding.next_token import TextDecoding
from userllm.errors import UserError
from userllm.ranges import AtLeastTwo, PositiveInt


@dataclass
class TextEvaluationConfig:
    """How tasks that are answered in free text are evaluated."""

    users: AtLeastTwo | None = 500
    """Users of the evaluation who get texts written, sampled by the run's seed, a smaller sample inside every larger
    one; null: all of them."""
    greedy: TextDecoding = field(default_factory=TextDecoding)
    """Settings of the texts that the comparisons rest on."""
    sampled: TextDecoding | None = field(default_factory=lambda: TextDecoding(sample=True, top_p=0.95))
    """Settings of a second set of texts, drawn; null: none."""
    sampled_users: AtLeastTwo | None = 100
    """Users of these, the first, who get drawn texts, too; null: all."""

    def check(self) -> None:
        """Raise UserError for settings that cannot be used."""
        for decoding in (self.greedy, self.sampled):
            if decoding is not None:
                decoding.check()


@dataclass
class EvaluationConfig:
    """How a run is evaluated."""

    part: Literal["test", "validation"] = "test"
    """Part of the split."""
    users: AtLeastTwo | None = None
    """Users sampled for the evaluation, by the run's seed; all by default. The report says n of N. A smaller sample
    lies inside every larger one of the same seed, so that runs of different cost can be compared pair by pair."""
    other_user: bool = True
    """Whether the model is also asked with somebody else's history. It doubles the time."""
    list_length: PositiveInt = 20
    """Answers the language model gives per user."""
    beams: PositiveInt = 20
    """Hypotheses kept per user in the constrained beam search."""
    exclude_seen: bool = True
    """Whether next items already in the history are left out of every system's list."""
    batch: PositiveInt = 32
    """Users answered at once."""
    knowledge_tokens: PositiveInt | None = 512
    """Tokens of the general English text that the LM reads, to see what it still knows; null: all, about 2,000."""
    knowledge_users: PositiveInt = 2
    """Users it reads the text with, one after the other."""
    text: TextEvaluationConfig = field(default_factory=TextEvaluationConfig)
    """Tasks that are answered in free text."""


@dataclass(frozen=True)
class EvaluatedUsers:
    """The users of an evaluation.

    rows: (user, start, stop) of each [n, 3]; available: of how many. other: by user, the row of somebody else, whose
    history stands in for the user's own ("shuffled").
    """

    rows: np.ndarray
    available: int
    other: np.ndarray

    @classmethod
    def draw(cls, split: Split, config: EvaluationConfig, max_length: int, seed: int) -> EvaluatedUsers:
        """Raises UserError where there are not two users."""
        rows = split.examples(config.part, max_length=max_length)
        available = len(rows)
        if config.users is not None:
            order = np.random.default_rng([seed, 11]).permutation(len(rows))
            rows = rows[np.sort(order[: config.users])]
        if len(rows) < 2:
            raise UserError(
                f"evaluation: {len(rows)} user in the {config.part} part; it takes at least two users"
            )
        # everyone gets somebody else: a random cycle through all users
        cycle = np.random.default_rng([seed, 13]).permutation(len(rows))
        other = np.empty(len(rows), dtype=np.int64)
        other[cycle] = np.roll(cycle, 1)
        return cls(rows, available, other)
