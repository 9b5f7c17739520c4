"""What stands before the prompt in the language model's input, one sequence per user: soft prompts, a history as text.

    [ padding | task prompt | user tokens | history as text ]  then  prompt, answer

All padding is on the left of everything. Padding between a soft prompt and the text would count as text for models
with a sliding window, and would move the text to other positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]
"""Embeddings [B, n, D] and their mask [B, n]."""


@dataclass
class Prefix:
    """Embeddings [B, P, D], padded on the left, and their mask [B, P]. P may be 0."""

    embeddings: Tensor
    mask: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Prefix:
        """The parts one after the other, what is masked in any of them moved to the left."""
        embeddings = torch.cat([values for values, _ in parts], dim=1)
        mask = torch.cat([real for _, real in parts], dim=1)
        order = torch.argsort(mask.int(), dim=1, stable=True)
        longest = int(mask.sum(1).max()) if mask.numel() else 0
        order = order[:, order.shape[1] - longest :]
        mask = mask.gather(1, order)
        picked = embeddings.gather(1, order[..., None].expand(-1, -1, embeddings.shape[2]))
        # padding holds no value at all: 0 * NaN would otherwise reach real tokens
        return cls(torch.where(mask[..., None], picked, torch.zeros((), dtype=picked.dtype)), mask)

    def __len__(self) -> int:
        return len(self.mask)

    def select(self, users: Tensor) -> Prefix:
        """The prefixes of some of the users, in the order given."""
        return Prefix(self.embeddings[users], self.mask[users])

    def repeated(self, rows: int) -> Prefix:
        """For ``rows`` texts, a multiple of the users: each user's prefix as often, adjacent."""
        if rows == len(self):
            return self
        copies = rows // len(self)
        return Prefix(self.embeddings.repeat_interleave(copies, 0), self.mask.repeat_interleave(copies, 0))

    def then(self, embeddings: Tensor) -> Prefix:
        """Prefix and text [B, T, D] (no padding, or padding on its right) as one sequence."""
        real = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
        return Prefix(
            torch.cat([self.embeddings.to(embeddings.dtype), embeddings], dim=1),
            torch.cat([self.mask, real], dim=1),
        )


def position_ids(mask: Tensor) -> Tensor:
    """Positions [B, P] of a left-padded mask [B, P]: the first real token has position 0."""
    return (mask.long().cumsum(1) - 1).clamp_min(0)
