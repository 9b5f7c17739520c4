"""Bert4Rec as a user encoder (Sun et al. 2019): events are hidden, and guessed from both sides.

Inside User-LLM it gives one embedding per event, each of which knows the whole (cut off) history. By itself it ranks
the catalogue with a hidden event appended at the end. Where we differ from the publication ("ours"):
  - events have fields, fused early and guessed each, as by the autoregressive encoder; ``data.fields: [item]`` is the
    published model;
  - pre-norm blocks; a full softmax over the item table behind a linear head, without the published output bias;
  - positions are counted from the latest event, which is what left padding does in the published code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from userllm.encoders.base import UserEncoder
from userllm.encoders.cross_entropy import blocked_cross_entropy
from userllm.encoders.features import FieldShape, FieldTables
from userllm.encoders.transformer import Transformer
from userllm.errors import UserError
from userllm.events import HistoryBatch
from userllm.ranges import BelowOne, Fraction, NonNegativeFloat, PositiveFraction, PositiveInt


@dataclass
class Bert4RecConfig:
    """Sizes as of the autoregressive encoder, as in the paper; the masking is the publication's."""

    kind: Literal["bert4rec"] = "bert4rec"
    """Which encoder: autoregressive, dual or bert4rec."""
    layers: PositiveInt = 6
    """Transformer layers (paper: like the autoregressive encoder's)."""
    width: PositiveInt = 128
    """U, the width of a user embedding (paper: like the autoregressive encoder's)."""
    heads: PositiveInt = 8
    """Attention heads (paper: like the autoregressive encoder's)."""
    feed_forward: PositiveInt = 512
    """Width of the feed-forward layers (ours; Sun et al.: 4 times the width)."""
    item_width: PositiveInt = 128
    """d_j of the item table (ours)."""
    field_width: PositiveInt = 16
    """d_j of every other field's table (ours)."""
    dropout: BelowOne = 0.1
    """Dropout on embeddings, attention weights, and in the feed-forward layers (ours)."""
    max_length: PositiveInt = 200
    """Events seen at most; of a longer history the latest (ours; the paper's windows are 50, 100 and 200)."""
    hidden_share: PositiveFraction = 0.2
    """Share of the events hidden in training, at least one per history (Sun et al.: 0.2 on MovieLens)."""
    last_share: Fraction = 0.1
    """Share of the training histories of which only the last event is hidden, as when ranking (Sun et al. do so; their
    code for one history in eleven)."""
    next_embedding: bool = False
    """Whether the language model also gets the embedding of a hidden event after the last: what the encoder expects
    next (ours; the embeddings of the events themselves are never trained to say so)."""
    field_weights: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Weight of a field's loss, 1 where absent (ours; Sun et al. have items only)."""

    def build(self, fields: list[FieldShape]) -> Bert4RecEncoder:
        """The encoder for these fields, with random weights."""
        return Bert4RecEncoder(self, fields)


class Bert4RecEncoder(UserEncoder):
    """Events [B, S] -> user embeddings [B, S, U], one per event, each knowing every event of the history."""

    causal = False
    ranks_items = True
    not_extended = "of Bert4Rec every embedding knows all events, later ones too"

    def __init__(self, config: Bert4RecConfig, fields: list[FieldShape]):
        super().__init__()
        if unknown := set(config.field_weights) - {f.name for f in fields}:
            known = ", ".join(f.name for f in fields)
            raise UserError(f"encoder.field_weights: no field {sorted(unknown)[0]!r}; the fields are {known}")
        if not 0 < config.hidden_share < 1 or not 0 <= config.last_share <= 1:
            raise UserError("encoder.hidden_share must be between 0 and 1, encoder.last_share in 0..1")
        self.config = config
        self.width, self.max_length = config.width, config.max_length
        self.per_event = not config.next_embedding
        self.features = FieldTables(fields, config.width, config.item_width, config.field_width)
        self.hidden_event = nn.Parameter(torch.randn(config.width) * 0.02)
        self.positions = nn.Embedding(config.max_length + 1, config.width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.transformer = Transformer(
            config.layers, config.width, config.heads, config.feed_forward, config.dropout
        )

    def forward(self, batch: HistoryBatch) -> tuple[Tensor, Tensor]:
        """User embeddings [B, S, U] and the batch's mask; with ``next_embedding`` one more, if there are events."""
        if batch.mask.shape[1] > self.max_length:
            raise ValueError(
                f"{batch.mask.shape[1]} events given, the encoder sees {self.max_length} at most"
            )
        if not self.config.next_embedding:
            return self._states(batch, torch.zeros_like(batch.mask)), batch.mask
        longer, hidden = _one_more(batch)
        return self._states(longer, hidden), longer.mask & batch.mask.any(1, keepdim=True)

    def next_item_scores(self, histories: HistoryBatch, rows: Tensor, ends: Tensor) -> Tensor:
        """See ``UserEncoder``; a history without events is ranked, too."""
        longer, hidden = _one_more(histories.select(rows).prefixes(ends))
        return self.features.scores("item", self._states(longer, hidden)[hidden])

    def next_event_losses(self, inputs: HistoryBatch, targets: HistoryBatch) -> dict[str, Tensor]:
        """Per field the cross-entropy of hidden events, and their weighted mean under ``"loss"``, in nats.

        The chunk's events are the first of ``inputs`` and all of ``targets``; which are hidden is drawn from torch's
        generator.
        """
        fields = {
            name: torch.cat([inputs.fields[name][:, :1], targets.fields[name]], dim=1)
            for name in inputs.fields
        }
        chunk = HistoryBatch(fields, torch.cat([inputs.mask[:, :1], targets.mask], dim=1))
        hidden = self.hide(chunk.mask)
        losses = self.features.losses(
            self._states(chunk, hidden)[hidden],
            {name: ids[hidden] for name, ids in fields.items()},
            item_loss=lambda outputs, table, right: blocked_cross_entropy(
                outputs, *self.among_answers(table, right)
            ),
        )
        weights = {name: self.config.field_weights.get(name, 1.0) for name in losses}
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        return {"loss": total / sum(weights.values()), **losses}

    def hide(self, mask: Tensor) -> Tensor:
        """Which of the events [B, S] to hide in training, [B, S]."""
        last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        hidden = mask & (torch.rand(mask.shape, device=mask.device) < self.config.hidden_share)
        only_last = torch.rand(len(mask), 1, device=mask.device) < self.config.last_share
        return torch.where(only_last | ~hidden.any(1, keepdim=True), last, hidden)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The output heads."""
        return self.features.heads.parameters()

    def _states(self, batch: HistoryBatch, hidden: Tensor) -> Tensor:
        """Last states [B, S, U] with the events in ``hidden`` [B, S] replaced: none of their fields can be seen."""
        events = torch.where(hidden[..., None], self.hidden_event, self.features(batch.fields))
        places = torch.arange(events.shape[1], device=events.device)
        back = (batch.lengths[:, None] - 1 - places).clamp_min(0)  # at padding any will do
        x = F.dropout(events + self.positions(back), self.config.dropout, self.training)
        visible = batch.mask.clone()
        visible[:, 0] = (
            True  # attention over nothing would be no number; only a history without events is concerned
        )
        return self.transformer(x, visible)


def _one_more(batch: HistoryBatch) -> tuple[HistoryBatch, Tensor]:
    """The histories with a further event, of no values yet, at their end; and where it is, [B, S + 1]."""
    fields = {
        name: F.pad(ids, (0, 1) if ids.ndim == 2 else (0, 0, 0, 1)) for name, ids in batch.fields.items()
    }
    places = torch.arange(batch.mask.shape[1] + 1, device=batch.mask.device)
    return HistoryBatch(fields, places <= batch.lengths[:, None]), places == batch.lengths[:, None]
