"""Fields of an event: one embedding table each, fused early; tied output heads (User-LLM section 3.1).

Each field j has its own vocabulary and table of width d_j. The M embeddings of an event are concatenated and projected
to the encoder's width U. For pretraining, an output of width U is projected back to d_j and scored against the field's
*input* table. The papers do not state d_j; ours: ``item_width`` for the item, ``field_width`` for every other field.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from userllm import processes
from userllm.encoders.cross_entropy import blocked_cross_entropy

RESERVED = 2
"""Vocabulary ids 0 (padding) and 1 (unknown value) name no value: they are embedded but never predicted."""


@dataclass(frozen=True)
class FieldShape:
    """What an encoder must know of a field: its name, whether an event has several values, and its vocabulary size."""

    name: str
    multi: bool
    size: int


class FieldTables(nn.Module):
    """Embedding tables of the fields, their early fusion to width U, and the tied heads back.

    fields: the declared fields, the item first. ``fields[j].size`` counts the two reserved ids. item_std: standard
    deviation the item table starts with; None as for every other table, d_j^-0.5.
    """

    def __init__(
        self,
        fields: list[FieldShape],
        width: int,
        item_width: int,
        field_width: int,
        item_std: float | None = None,
    ):
        super().__init__()
        self.fields = list(fields)
        widths = {f.name: item_width if f.name == "item" else field_width for f in fields}
        self.tables = nn.ModuleDict(
            {f.name: nn.Embedding(f.size, widths[f.name], padding_idx=0) for f in fields}
        )
        self.fuse = nn.Linear(sum(widths.values()), width)
        self.heads = nn.ModuleDict({f.name: nn.Linear(width, widths[f.name]) for f in fields})
        for name, table in self.tables.items():
            assert isinstance(table, nn.Embedding)
            small = item_std if name == "item" else None
            nn.init.normal_(table.weight, std=table.embedding_dim**-0.5 if small is None else small)
            with torch.no_grad():
                table.weight[0].zero_()

    def table(self, name: str) -> Tensor:
        """The rows of a field's table that are values: [size - 2, d_j]."""
        weight = self.tables[name].weight
        assert isinstance(weight, Tensor)
        return weight[RESERVED:]

    @torch.no_grad()
    def start(self, name: str, rows: Tensor) -> None:
        """Put rows [size - 2, d_j] into a field's table."""
        self.table(name).copy_(rows)

    def forward(self, ids: Mapping[str, Tensor]) -> Tensor:
        """Ids [B, S] (or [B, S, K] for multi-valued fields) -> fused event embeddings [B, S, U]."""
        parts = []
        for field in self.fields:
            embedded = self.tables[field.name](ids[field.name])
            if field.multi:  # the mean over an event's values; an event without a value gives zeros
                count = (ids[field.name] != 0).sum(-1, keepdim=True).clamp_min(1)
                embedded = embedded.sum(-2) / count
            parts.append(embedded)
        return self.fuse(torch.cat(parts, dim=-1))

    def scores(self, name: str, hidden: Tensor) -> Tensor:
        """Logits of a field's values, [..., size - 2], from encoder outputs [..., U]; column j is id j + 2."""
        return self.heads[name](hidden) @ self.table(name).T

    def losses(
        self,
        hidden: Tensor,
        targets: Mapping[str, Tensor],
        skip: Collection[str] = (),
        item_loss: Callable[[Tensor, Tensor, Tensor], Tensor] = blocked_cross_entropy,
    ) -> dict[str, Tensor]:
        """Cross-entropy per field, in nats, of encoder outputs [N, U] against the next event's ids ([N] or [N, K]).

        Targets that are padding or unknown do not count. For a multi-valued field the target distribution is uniform
        over the event's values (ours; the papers only say "cross-entropy per feature").
        skip: fields whose loss is not computed. item_loss: the item's, of (projected outputs [N, d], table [V, d],
        target rows [N]).
        """
        result = {}
        for field in self.fields:
            if field.name in skip:
                continue
            target = targets[field.name] - RESERVED
            if field.multi:
                valid = target >= 0
                rows = valid.any(-1)
                log_p = F.log_softmax(self.scores(field.name, hidden[rows]), dim=-1)
                picked = log_p.gather(-1, target[rows].clamp_min(0)) * valid[rows]
                nats = -(picked.sum(-1) / valid[rows].sum(-1)).sum()
                result[field.name] = nats / processes.share(int(rows.sum()))
            else:
                rows = target >= 0
                projected = self.heads[field.name](hidden[rows])
                loss = item_loss if field.name == "item" else blocked_cross_entropy
                result[field.name] = loss(projected, self.table(field.name), target[rows])
        return result
