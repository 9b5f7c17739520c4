"""What the user is likely to see next, said in the language model's own space (ours; neither paper has it).

A frozen language model scores a next token by the product of its output with 576 or so numbers per token. What a user
embedding says about thousands of items cannot get through a linear map into so few: on MovieLens-1M the best one ranks
about a quarter as well as the encoder does. What does get through is a *sparse* message: the few tokens that the user's
likely items go on with. So where an item is being named, at node n of the tree of all titles, the user attends to the
node's children,

    scores   s = log p(child | n, user), the encoder's probabilities of the titles below    weights  relu(s + threshold)
    values   the language model's embeddings of the children's tokens                       result   one vector [D]

and the result is added, gated, to what the last layer puts out there. Any other text or task is left alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from userllm.decoding.prefix_tree import NodeMasses


@dataclass
class CatalogueConfig:
    """Attention from the user to the next tokens of the catalogue's titles."""

    least: float = 0.02
    """Share of the probability at a node from which on a child is heard, at the start; learned."""
    tokens: int = 3
    """J, leading tokens of a title with weights of their own; all that follow share the last's."""
    start: float = 0.1
    """The gates at the start. At 0 the LM starts as itself, as with cross-attention, but this block then learns late:
    what it says helps only once the LM's own preference among titles has been overcome."""


@dataclass
class LikelyItems:
    """Each user's next item, as the encoder sees it: masses over the tree of the titles, zero for a user without a
    history; table: the LM's output embeddings, [V, D]."""

    masses: NodeMasses
    table: Tensor

    def __len__(self) -> int:
        return len(self.masses)

    def select(self, users: Tensor) -> LikelyItems:
        """Those of some of the users, in the order given."""
        return LikelyItems(self.masses.select(users), self.table)


class CatalogueBlock(nn.Module):
    """Adds to text hidden states which tokens the user's likely items go on with.

    title_tokens: [N, L] token ids of each item's title, -1 where a title is shorter. table: [V, D], the LM's output
    embeddings, which say where the maps start.
    """

    def __init__(self, config: CatalogueConfig, title_tokens: Tensor, table: Tensor):
        super().__init__()
        self.config = config
        last = config.tokens - 1
        # saved with the rest: after training with strategy "full" the table says something else
        self.register_buffer(
            "size", table.detach()[title_tokens[title_tokens >= 0]].float().pow(2).mean().sqrt()
        )
        self.size: Tensor
        groups = [*title_tokens[:, :last].unbind(1), title_tokens[:, last:]]
        found = [_separating(tokens, table.detach(), float(self.size)) for tokens in groups]
        self.maps = nn.Parameter(torch.stack([to_text for to_text, _ in found]))
        self.centres = nn.Parameter(torch.stack([centre for _, centre in found]))
        self.threshold = nn.Parameter(torch.full((len(groups),), -math.log(config.least)))
        self.gate = nn.Parameter(torch.full((len(groups),), config.start))

    def forward(self, hidden: Tensor, likely: LikelyItems, nodes: Tensor) -> Tensor:
        """hidden [B*k, T, D] (k rows per user, adjacent), B users, nodes [B*k, T] of the tree, -1 elsewhere."""
        copies = hidden.shape[0] // len(likely)
        row, position = torch.nonzero(nodes >= 0, as_tuple=True)
        at, tree = nodes[row, position], likely.masses.tree
        place = tree.depth[at].clamp_max(len(self.gate) - 1)
        rows, children = tree.children(at)
        shares = likely.masses.shares(row // copies, at, rows, children)
        scores = shares.clamp_min(1e-30).log().to(self.threshold.dtype)
        weights = torch.relu(scores + self.threshold[place][rows])
        heard = torch.nonzero(weights > 0)[:, 0]
        rows, weights = rows[heard], weights[heard, None]
        values = likely.table[tree.token[children[heard]]].to(weights.dtype) / self.size
        said = weights * (values - self.centres[place][rows])
        told = torch.zeros(len(at), hidden.shape[-1], dtype=said.dtype, device=said.device)
        told = told.index_add(0, rows, said)
        update = torch.zeros_like(told)
        for number, to_text in enumerate(self.maps):
            mine = torch.nonzero(place == number)[:, 0]
            update = update.index_add(0, mine, told[mine] @ to_text)
        size = hidden.detach()[row, position].to(update.dtype).pow(2).mean(-1, keepdim=True).sqrt()
        update = torch.tanh(self.gate)[place, None] * size * update
        return hidden.index_put((row, position), update.to(hidden.dtype), accumulate=True)

    @property
    def gate_values(self) -> list[float]:
        """tanh(alpha) by place in the title, the share of the update that reaches the text."""
        return torch.tanh(self.gate.detach()).tolist()


def _separating(tokens: Tensor, table: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """A map [D, D] that tells tokens apart best by their embeddings in units of ``size``, and the centre [D] of those.

    With rows X of the tokens' embeddings, each token once, less their centre: X (X'X)^-1 X' is as close to the identity
    as a map through D numbers gets, so (X'X)^-1 is where the map starts. The ridge keeps rare directions small; the
    factor makes a gate of .1 to .2 right for SmolLM2 on MovieLens-1M.
    """
    rows = table[torch.unique(tokens[tokens >= 0])].float() / size
    if len(rows) == 0:
        return torch.zeros(table.shape[1], table.shape[1]), torch.zeros(table.shape[1])
    centre = rows.mean(0)
    square = (rows - centre).T @ (rows - centre)
    ridge = 1e-2 * square.diagonal().mean().clamp_min(1e-12) * torch.eye(len(square), device=square.device)
    return 5 / size * torch.linalg.inv(square + ridge), centre
