"""From a user embedding to the catalogue's titles in the language model's own space (ours; neither paper has it).

A frozen language model scores a next token by the product of its output with 576 or so numbers per token. What a user
embedding says about thousands of items cannot get through a linear map into so few: on MovieLens-1M the best one ranks
about a quarter as well as the encoder does. What does get through is a *sparse* message: which few titles this user is
likely to see next. So the user attends to the catalogue,

    keys    the encoder's own item vectors, as stage 1 left them        weights  relu(log p(item | user) + threshold)
    values  the language model's embeddings of a title's first tokens   result   one vector per token position, [J, D]

and the result is added, gated, to what the last layer puts out. Which of the J vectors a text position takes up is for
its own hidden state to say: at the first token of an answer the first, later the others, and none where the question is
another. In free text (``free_text.py``) the block is switched off: titles are no part of the language there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class CatalogueConfig:
    """Attention from the user to the catalogue."""

    items: int = 128
    """Most likely items that take part."""
    tokens: int = 3
    """J, leading tokens of a title that have a vector of their own."""
    start: float = 0.1
    """The gate at the start. At 0 the LM starts as itself, as with cross-attention, but this block then learns late:
    what it says helps only once the LM's own preference among titles has been overcome."""


class CatalogueBlock(nn.Module):
    """Adds to text hidden states what the user's most likely items would be called.

    title_tokens: [N, J] token ids of each item's title, -1 where a title is shorter. table: [V, D], the LM's output
    embeddings, read when the block is built to find the map that tells titles apart, and again for every user.
    """

    def __init__(self, config: CatalogueConfig, title_tokens: Tensor, table: Tensor):
        super().__init__()
        self.config = config
        items, positions = title_tokens.shape
        self.register_buffer("title_tokens", title_tokens, persistent=False)
        self.title_tokens: Tensor
        self.threshold = nn.Parameter(torch.tensor(math.log(items) - 1))
        # saved with the rest: after training with strategy "full" the table says something else
        self.register_buffer(
            "size", table.detach()[title_tokens[title_tokens >= 0]].float().pow(2).mean().sqrt()
        )
        self.size: Tensor
        found = [_separating(title_tokens[:, j], table.detach(), float(self.size)) for j in range(positions)]
        self.maps = nn.Parameter(torch.stack([to_text for to_text, _ in found]))
        self.centres = nn.Parameter(torch.stack([centre for _, centre in found]))
        self.choose = nn.Linear(table.shape[1], positions)
        nn.init.zeros_(self.choose.weight)
        nn.init.constant_(
            self.choose.bias, -2.0
        )  # later tokens' vectors are noise at an answer's first token
        with torch.no_grad():
            self.choose.bias[0] = 2.0
        self.norm = nn.LayerNorm(table.shape[1])
        self.gate = nn.Parameter(torch.full((1,), config.start))

    def vectors(self, log_p: Tensor, known: Tensor, table: Tensor) -> Tensor:
        """What the LM is told, [B, J, D], from log-probabilities of the items [B, N].

        known [B]: False for users without a history, who get zeros.
        """
        best, items = log_p.topk(min(self.config.items, log_p.shape[1]), dim=1)
        weights = torch.relu(best + self.threshold) * known[:, None]
        told = []
        for tokens, centre, to_text in zip(self.title_tokens.unbind(1), self.centres, self.maps, strict=True):
            picked = tokens[items]
            mine = weights * (picked >= 0)
            total = F.embedding_bag(picked.clamp_min(0), table.float(), per_sample_weights=mine, mode="sum")
            told.append((total / self.size - mine.sum(1, keepdim=True) * centre) @ to_text)
        return torch.stack(told, dim=1)

    def forward(self, hidden: Tensor, vectors: Tensor) -> Tensor:
        """hidden [B*k, T, D] (k rows per user, adjacent), vectors [B, J, D] -> hidden, updated."""
        copies = hidden.shape[0] // vectors.shape[0]
        states = hidden.to(self.norm.weight.dtype)
        share = torch.sigmoid(self.choose(self.norm(states)))
        update = share @ vectors.repeat_interleave(copies, 0).to(share.dtype)
        size = states.detach().pow(2).mean(-1, keepdim=True).sqrt()
        return hidden + (torch.tanh(self.gate) * size * update).to(hidden.dtype)

    @property
    def gate_value(self) -> float:
        """tanh(alpha), the share of the update that reaches the text."""
        return float(torch.tanh(self.gate.detach()))


def _separating(tokens: Tensor, table: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """A map [D, D] that tells titles apart best by their embeddings in units of ``size``, and the centre [D] of those.

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
