"""The encoder's own ranking, heard wherever an item is being named (ours; neither paper has it).

A frozen language model scores 1,632 different first tokens of MovieLens-1M's titles through 576 numbers: what a user
embedding says about thousands of items does not get through (docs/log.md). So where a title is being written, at node n
of the tree of all titles, two opinions on its children are added up (log-linear interpolation, "shallow fusion"):

    score(child | n, user) = LM's logit + b . log p(child | n, user) + c

p: the encoder's probability of the titles below the child, among those below n. b and c are learned, one of each for
the first tokens of a title and one for all that follow; they begin at 0, so that the LM starts as itself. The LM always
counts in full: given a weight of its own, learned too, it ended at .02, and the list was the encoder's (docs/log.md).
Any other text or task is left alone, and so is a user without a history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from userllm.ranges import PositiveInt

if TYPE_CHECKING:
    from userllm.decoding.prefix_tree import NodeMasses

LEAST = 1e-6
"""Shares of a node's probability below this count as this: nothing learns from a difference between never and never."""


@dataclass
class CatalogueConfig:
    """Log-linear interpolation with the encoder's ranking."""

    tokens: PositiveInt = 3
    """Leading tokens of a title with weights of their own; all that follow share the last's."""


@dataclass
class LikelyItems:
    """What B users will have next, as the encoder sees it: masses over the tree of the titles; known [B]: who has a
    history at all."""

    masses: NodeMasses
    known: Tensor

    def __len__(self) -> int:
        return len(self.known)

    def select(self, users: Tensor) -> LikelyItems:
        """Those of some of the users, in the order given."""
        return LikelyItems(self.masses.select(users), self.known[users])


class CatalogueWeights(nn.Module):
    """The learned weights b and c: see the module."""

    def __init__(self, config: CatalogueConfig):
        super().__init__()
        self.encoder = nn.Parameter(torch.zeros(config.tokens))
        self.offset = nn.Parameter(torch.zeros(config.tokens))

    def forward(
        self,
        logits: Tensor,
        likely: LikelyItems,
        owners: Tensor,
        nodes: Tensor,
        rows: Tensor,
        children: Tensor,
    ) -> Tensor:
        """The LM's logits [C] of children, interpolated.

        owners [Q]: which user; nodes [Q]; rows, children [C]: their flat list, as ``PrefixTree.children`` gives it.
        """
        place = likely.masses.tree.depth[nodes].clamp_max(len(self.encoder) - 1)[rows]
        said = likely.masses.shares(owners, nodes, rows, children).clamp_min(LEAST).log().to(logits.dtype)
        both = logits + self.encoder[place] * said + self.offset[place]
        return torch.where(likely.known[owners][rows], both, logits)

    def weights(self) -> list[float]:
        """b by place in the title."""
        return self.encoder.detach().tolist()
