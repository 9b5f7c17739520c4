"""The autoregressive user encoder (User-LLM section 3.1): a causal Transformer over fused events.

Where we differ from the paper or fill in what it leaves out ("ours"):
  - pre-norm blocks with GELU, learned absolute positions, dropout: the paper states none of these, and each is a
    setting with the field's newer alternatives beside it (docs: Encoder recipes);
  - the item's loss can be weighted against the other fields' (the paper averages: weight 1 each, our default);
  - one pass over a history trains every position and gives the embedding of every prefix, so windows are never
    cut out one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from userllm.encoders.base import UserEncoder
from userllm.encoders.blocks import Block, RelativeTimeBias, rotations, time_apart
from userllm.encoders.features import RESERVED, FieldShape, FieldTables
from userllm.encoders.item_loss import ItemLoss
from userllm.encoders.state import EncoderState, Reading
from userllm.errors import UserError
from userllm.events import UNKNOWN_TIME, HistoryBatch
from userllm.ranges import BelowOne, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass
class AutoregressiveConfig:
    """Sizes of the autoregressive encoder; defaults are the paper's where it states them."""

    kind: Literal["autoregressive"] = "autoregressive"
    """Which encoder: autoregressive (paper's choice), dual or bert4rec."""
    layers: PositiveInt = 6
    """Transformer layers (paper: 6)."""
    width: PositiveInt = 128
    """U, the width of a user embedding (paper: 128)."""
    heads: PositiveInt = 8
    """Attention heads (paper: 8)."""
    feed_forward: PositiveInt = 512
    """Width of the feed-forward layers (ours: the paper is silent)."""
    feed_forward_kind: Literal["gelu", "swiglu"] = "gelu"
    """"swiglu" has a third matrix: with two thirds of ``feed_forward`` it has as many weights (ours)."""
    norm: Literal["pre", "post"] = "pre"
    """LayerNorm before each part of a block, or after its residual connection as in the first Transformer (ours)."""
    positions: Literal["learned", "rotary", "relative_time"] = "learned"
    """How order is known. "learned": a table of absolute positions. "rotary": queries and keys are turned by position.
    "relative_time": attention logits get a learned number for how many events and for how much time lie between two
    events, as in HSTU (ours: the paper is silent)."""
    item_width: PositiveInt = 128
    """d_j of the item table (ours)."""
    item_start: Literal["random", "text"] = "random"
    """What the item table holds before stage 1: random numbers, or the principal components of the language model's own
    vectors of the titles (ours)."""
    item_text: Literal["input", "hidden"] = "input"
    """The vector of a title, for ``item_start: text``: the mean of the language model's input embeddings of its tokens
    (no forward pass, so no matter how large the model or the catalogue), or of its last hidden states (ours)."""
    item_std: PositiveFloat | None = None
    """Standard deviation of a random item table at the start; null: d_j^-0.5, .088 for a width of 128 (ours: the paper
    is silent). Four times smaller learns a little more slowly and, on MovieLens-1M, overfits later."""
    field_width: PositiveInt = 16
    """d_j of every other field's table (ours)."""
    dropout: BelowOne = 0.1
    """Dropout on embeddings, attention outputs and feed-forward outputs (ours)."""
    max_length: PositiveInt = 200
    """Events seen at most; of a longer history the latest (ours; the paper's windows are 50, 100 and 200)."""
    field_weights: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Weight of a field's loss, 1 where absent (paper: a plain average); 0: the loss is not even computed."""
    count_from: Literal["start", "end"] = "start"
    """Learned positions are counted from a history's first event, or back from its latest, which then always has the
    same position, as in a left-padded SASRec (ours: the paper is silent). With "end" the embedding of a prefix inside
    a longer history, which stage 2 uses, is that of a history not yet at its end, not that of the prefix alone."""
    item_loss: Literal["full", "sampled", "gbce"] = "full"
    """The next item's loss. "full": cross-entropy over the catalogue (paper). For large catalogues "sampled":
    cross-entropy over a sample, corrected for the sampling, or "gbce": gSASRec's (ours). Ranking is always exact."""
    negatives: PositiveInt = 256
    """Items drawn per batch, shared by all its events; for "sampled" and "gbce" (ours; gSASRec: 256 per user)."""
    proposal: Literal["uniform", "popularity"] = "uniform"
    """How "sampled" draws them; "popularity": by the count of training events, plus one. "gbce" draws uniformly."""
    gbce_calibration: Fraction = 0.75
    """t of "gbce", 0 to 1 (gSASRec: 0.75)."""
    loss_precision: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products in the item's full softmax; its probabilities and sums stay float32 (ours). "bfloat16"
    takes a third to a half off that loss's time on processors with bfloat16 instructions."""

    def build(self, fields: list[FieldShape]) -> AutoregressiveEncoder:
        """The encoder for these fields, with random weights."""
        return AutoregressiveEncoder(self, fields)


class AutoregressiveEncoder(UserEncoder):
    """Events [B, S] -> user embeddings [B, S, U], one per event; position s knows events 0..s only.

    Histories are padded on the right, so the causal mask alone keeps padding out of every real position. With positions
    counted from the end an output also knows how many events follow, though nothing of them.
    """

    causal = True
    ranks_items = True

    def __init__(self, config: AutoregressiveConfig, fields: list[FieldShape]):
        super().__init__()
        _check(config, fields)
        self.config = config
        self.width, self.max_length = config.width, config.max_length
        self.not_extended = (
            "encoder.count_from is end, so that every new event moves all earlier ones"
            if config.count_from == "end"
            else None
        )
        self.features = FieldTables(
            fields, config.width, config.item_width, config.field_width, config.item_std
        )
        self.positions = (
            nn.Embedding(config.max_length, config.width) if config.positions == "learned" else None
        )
        self.item_loss = ItemLoss(
            config.item_loss,
            next(f.size for f in fields if f.name == "item") - RESERVED,
            config.negatives,
            config.proposal,
            config.gbce_calibration,
            getattr(torch, config.loss_precision),
        )
        self.needs_frequencies = self.item_loss.by_popularity
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                config.feed_forward,
                config.dropout,
                config.feed_forward_kind,
                config.norm,
                RelativeTimeBias(config.heads, config.max_length)
                if config.positions == "relative_time"
                else None,
            )
            for _ in range(config.layers)
        )
        self.norm = (
            nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()
        )  # post: the last block's
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)

    def choose_among(self, answers: Tensor) -> None:
        """See ``UserEncoder``."""
        super().choose_among(answers)
        self.item_loss.frequencies = self.item_loss.frequencies.new_zeros(len(answers))

    def use_frequencies(self, counts: Mapping[str, Tensor]) -> None:
        """How often each value of a field occurs among the training targets: by field, [size], by vocabulary id."""
        frequencies = counts["item"][RESERVED:]
        self.item_loss.frequencies.copy_(frequencies if self.answers is None else frequencies[self.answers])

    def forward(self, batch: HistoryBatch) -> tuple[Tensor, Tensor]:
        """User embeddings [B, S, U] and the batch's mask; values at padding are meaningless.

        S must not exceed ``max_length``. Relative-time positions need ``batch.times``.
        """
        length = batch.mask.shape[1]
        if length > self.config.max_length:
            raise ValueError(f"{length} events given, the encoder sees {self.config.max_length} at most")
        x, rotation, apart = self.features(batch.fields), None, None
        if self.positions is not None:
            places = torch.arange(length, device=x.device)
            if self.config.count_from == "end":
                places = (batch.lengths[:, None] - 1 - places).clamp_min(0)  # at padding any will do
            x = x + self.positions(places)
        elif self.config.positions == "rotary":
            rotation = rotations(length, self.config.width // self.config.heads, x.device)
        else:
            apart = time_apart(_times(batch))
        return self._through_blocks(x, rotation, apart), batch.mask

    @torch.no_grad()
    def extend(self, state: EncoderState | None, batch: HistoryBatch) -> tuple[Tensor, EncoderState]:
        """See ``UserEncoder``. Raises ValueError where a history grows past ``max_length``."""
        if self.not_extended is not None:
            raise UserError(f"a history cannot be continued: {self.not_extended}")
        known = self.config.positions == "relative_time" or batch.times is not None
        times = _times(batch) if known else torch.full_like(batch.mask, UNKNOWN_TIME, dtype=torch.long)
        reading = Reading(state, times, batch.mask, self.config.max_length)
        x, rotation, apart = self.features(batch.fields), None, None
        if self.positions is not None:
            x = x + self.positions(reading.places)
        elif self.config.positions == "rotary":
            turns = rotations(reading.times.shape[1], self.config.width // self.config.heads, x.device)
            rotation = turns[:, reading.places][:, :, None]
        else:
            apart = time_apart(times, reading.times)
        return self._through_blocks(x, rotation, apart, reading), reading.after()

    def _through_blocks(
        self, x: Tensor, rotation: Tensor | None, apart: Tensor | None, reading: Reading | None = None
    ) -> Tensor:
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, rotation, apart, reading)
        return self.norm(x)

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

        ``targets`` holds, at each position of ``inputs``, the event that came next, and its own mask. A field of weight
        0 has no loss.
        """
        hidden = self(inputs)[0][targets.mask]
        weights = {f.name: self.config.field_weights.get(f.name, 1.0) for f in self.features.fields}
        losses = self.features.losses(
            hidden,
            {name: ids[targets.mask] for name, ids in targets.fields.items()},
            skip=[name for name, weight in weights.items() if weight == 0],
            item_loss=lambda outputs, table, right: self.item_loss(
                outputs, *self.among_answers(table, right)
            ),
        )
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        return {"loss": total / sum(weights.values()), **losses}


def _times(batch: HistoryBatch) -> Tensor:
    if batch.times is None:
        raise ValueError(
            "encoder.positions is relative_time, but the batch has no times (UNKNOWN_TIME is one)"
        )
    return batch.times


def _check(config: AutoregressiveConfig, fields: list[FieldShape]) -> None:
    """Raise UserError for settings that cannot be, or cannot go together."""
    if config.width % config.heads:
        raise UserError(f"encoder.width {config.width} is not a multiple of encoder.heads {config.heads}")
    if config.positions == "rotary" and config.width // config.heads % 2:
        raise UserError(
            f"encoder.positions: rotary needs an even width per head, not {config.width // config.heads}"
        )
    if config.positions != "learned" and config.count_from == "end":
        raise UserError(f"encoder.count_from: end is for learned positions, not {config.positions}")
    if unknown := set(config.field_weights) - {f.name for f in fields}:
        known = ", ".join(f.name for f in fields)
        raise UserError(f"encoder.field_weights: no field {sorted(unknown)[0]!r}; the fields are {known}")
    if all(config.field_weights.get(f.name, 1.0) == 0 for f in fields):
        raise UserError("encoder.field_weights: every field's weight is 0, so nothing would be learned")
    if config.item_std is not None and config.item_std <= 0:
        raise UserError(f"encoder.item_std is {config.item_std}; it has to be more than 0, or null")
    if config.negatives < 1:
        raise UserError(f"encoder.negatives is {config.negatives}; draw at least 1 item")
    if not 0 <= config.gbce_calibration <= 1:
        raise UserError(f"encoder.gbce_calibration is {config.gbce_calibration}; it goes from 0 to 1")
    if config.proposal != "uniform" and config.item_loss != "sampled":
        raise UserError(
            f"encoder.proposal: {config.proposal} is for item_loss: sampled, not {config.item_loss}"
        )
    if config.loss_precision != "float32" and config.item_loss != "full":
        raise UserError(
            f"encoder.loss_precision: {config.loss_precision} is for item_loss: full, not {config.item_loss}"
        )
