"""How a free text goes on: its next token, by settings that are always given and never the language model's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from userllm.errors import UserError
from userllm.ranges import NonNegativeInt, PositiveFloat, PositiveFraction, PositiveInt, check_ranges


@dataclass(frozen=True)
class TextDecoding:
    """Settings of free text (ours: the papers name none)."""

    max_new_tokens: PositiveInt = 64
    """Tokens of a text at most, its end included."""
    min_new_tokens: NonNegativeInt = 0
    """Tokens before a text may end: a model that has seen many short texts may think an empty one the likeliest."""
    sample: bool = False
    """Whether tokens are drawn; otherwise each is the most likely one (greedy)."""
    temperature: PositiveFloat = 1.0
    """Divides the logits before a token is drawn."""
    top_p: PositiveFraction = 1.0
    """A token is drawn from the fewest most likely ones that have this much probability together; 1: from all."""
    no_repeat: NonNegativeInt = 0
    """No run of so many tokens comes twice in a text: small models go round in circles; 0: they may."""
    seed: NonNegativeInt = 0
    """Of the draws. Each text has its own, so that a text does not depend on what is written beside it."""

    def check(self) -> None:
        """Raise UserError for settings that cannot be used."""
        check_ranges(self)
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens is {self.min_new_tokens}; it must be at most max_new_tokens ({self.max_new_tokens})"
            )

    def draws(self, numbers: Sequence[int]) -> Tensor:
        """What the tokens of texts are drawn by: [R, max_new_tokens] in 0..1, a function of seed and number alone."""
        rows = [np.random.default_rng([self.seed, n]).random(self.max_new_tokens) for n in numbers]
        return torch.from_numpy(np.stack(rows))

    def allowed(self, logits: Tensor, written: Tensor, end: int) -> Tensor:
        """Logits [R, V] of tokens that may follow what is ``written`` [R, t]: no ``end`` before ``min_new_tokens``, no
        run of ``no_repeat`` a second time."""
        if written.shape[1] < self.min_new_tokens:
            logits = logits.index_fill(1, torch.tensor([end], device=logits.device), -torch.inf)
        n = self.no_repeat
        if n == 0 or written.shape[1] < n:
            return logits
        runs = written.unfold(1, n, 1)
        latest = written[:, written.shape[1] - n + 1 :]
        row, place = torch.nonzero((runs[..., : n - 1] == latest[:, None]).all(-1), as_tuple=True)
        return logits.index_put((row, runs[row, place, n - 1]), logits.new_tensor(-torch.inf))

    def choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        """The next token of each text, [R], from logits [R, V] and, where tokens are drawn, ``draws`` [R] in 0..1."""
        if not self.sample:
            return logits.argmax(-1)
        logits = logits.double()
        logits = logits - logits.amax(-1, keepdim=True)  # else a temperature near 0 makes them infinite
        p = torch.softmax(logits / self.temperature, dim=-1)
        order = None
        if self.top_p < 1:
            p, order = p.sort(-1, descending=True)
            p = torch.where(p.cumsum(-1) - p < self.top_p, p, 0)
        reached = p.cumsum(-1)
        wanted = draws.to(reached)[:, None] * reached[:, -1:]
        place = torch.searchsorted(reached, wanted, right=True)
        # a draw that rounding puts at the very end belongs to the last token that can be drawn
        place = torch.minimum(place, (p > 0).cumsum(-1).argmax(-1, keepdim=True))
        return (place if order is None else order.gather(1, place))[:, 0]
