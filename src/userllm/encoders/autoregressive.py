"""The autoregressive user encoder (User-LLM section 3.1): a causal Transformer over fused events.

Where we differ from the paper or fill in what it leaves out ("ours"):
  - pre-norm blocks with GELU, learned absolute positions, dropout: the paper states none of these;
  - the item's loss can be weighted against the other fields' (the paper averages: weight 1 each, our default);
  - one pass over a history trains every position and gives the embedding of every prefix, so windows are never
    cut out one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from userllm.encoders.base import UserEncoder
from userllm.encoders.features import FieldShape, FieldTables
from userllm.errors import UserError
from userllm.events import HistoryBatch


@dataclass
class AutoregressiveConfig:
    """Sizes of the autoregressive encoder; defaults are the paper's where it states them."""

    kind: Literal["autoregressive"] = "autoregressive"
    """Which encoder: autoregressive (paper's choice), dual or bert4rec."""
    layers: int = 6
    """Transformer layers (paper: 6)."""
    width: int = 128
    """U, the width of a user embedding (paper: 128)."""
    heads: int = 8
    """Attention heads (paper: 8)."""
    feed_forward: int = 512
    """Width of the feed-forward layers (ours: the paper is silent)."""
    item_width: int = 128
    """d_j of the item table (ours)."""
    field_width: int = 16
    """d_j of every other field's table (ours)."""
    dropout: float = 0.1
    """Dropout on embeddings, attention outputs and feed-forward outputs (ours)."""
    max_length: int = 200
    """Events seen at most; of a longer history the latest (ours; the paper's windows are 50, 100 and 200)."""
    field_weights: dict[str, float] = field(default_factory=dict)
    """Weight of a field's loss, 1 where absent (paper: a plain average)."""

    def build(self, fields: list[FieldShape]) -> AutoregressiveEncoder:
        """The encoder for these fields, with random weights."""
        return AutoregressiveEncoder(self, fields)


class _Block(nn.Module):
    """Pre-norm causal self-attention and feed-forward."""

    def __init__(self, config: AutoregressiveConfig):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.feed_forward)
        self.down = nn.Linear(config.feed_forward, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + F.dropout(mixed, self.dropout, self.training)
        fed = self.down(F.gelu(self.up(self.feed_forward_norm(x))))
        return x + F.dropout(fed, self.dropout, self.training)


class AutoregressiveEncoder(UserEncoder):
    """Events [B, S] -> user embeddings [B, S, U], one per event; position s knows events 0..s only.

    Histories are padded on the right, so the causal mask alone keeps padding out of every real position.
    """

    causal = True
    ranks_items = True

    def __init__(self, config: AutoregressiveConfig, fields: list[FieldShape]):
        super().__init__()
        if config.width % config.heads:
            raise UserError(f"encoder.width {config.width} is not a multiple of encoder.heads {config.heads}")
        if unknown := set(config.field_weights) - {f.name for f in fields}:
            known = ", ".join(f.name for f in fields)
            raise UserError(f"encoder.field_weights: no field {sorted(unknown)[0]!r}; the fields are {known}")
        self.config = config
        self.width, self.max_length = config.width, config.max_length
        self.features = FieldTables(fields, config.width, config.item_width, config.field_width)
        self.positions = nn.Embedding(config.max_length, config.width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, batch: HistoryBatch) -> tuple[Tensor, Tensor]:
        """User embeddings [B, S, U] and the batch's mask; values at padding are meaningless.

        S must not exceed ``max_length``.
        """
        length = batch.mask.shape[1]
        if length > self.config.max_length:
            raise ValueError(f"{length} events given, the encoder sees {self.config.max_length} at most")
        positions = self.positions(torch.arange(length, device=batch.mask.device))
        x = F.dropout(self.features(batch.fields) + positions, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), batch.mask

    def item_scores(self, embeddings: Tensor) -> Tensor:
        """Scores of every catalogue item as the next event, [..., items], from user embeddings [..., U]."""
        return self.features.scores("item", embeddings)

    def next_item_scores(self, histories: HistoryBatch, rows: Tensor, ends: Tensor) -> Tensor:
        """See ``UserEncoder``."""
        return self.item_scores(self(histories)[0][rows, ends - 1])

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The output heads."""
        return self.features.heads.parameters()

    def next_event_losses(self, inputs: HistoryBatch, targets: HistoryBatch) -> dict[str, Tensor]:
        """Next-event loss per field and their weighted mean under ``"loss"`` (User-LLM section 3.1), in nats.

        ``targets`` holds, at each position of ``inputs``, the event that came next, and its own mask.
        """
        hidden = self(inputs)[0][targets.mask]
        losses = self.features.losses(
            hidden, {name: ids[targets.mask] for name, ids in targets.fields.items()}
        )
        weights = {name: self.config.field_weights.get(name, 1.0) for name in losses}
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        return {"loss": total / sum(weights.values()), **losses}
