"""The dual encoder, late fusion (User-LLM section 3.1 and appendix A): a user tower and a label tower.

    field 1's sequence -> Transformer --+
    field 2's sequence -> Transformer --+-> fusion layers -> m user embeddings -+
    ...                               --+                                       +-> similarity -> softmax
    values of the label field -> label tower -----------------------------------+

Only the user tower goes on into User-LLM. Each field is a sequence of its own, with its own length: see
``FieldSequence``. Where we fill in what the paper leaves out ("ours"):
  - the fields' Transformers are causal and read at their last position, so that one pass over a history trains every
    prefix of it, as with the autoregressive encoder; nothing else knows of that, a user has m embeddings;
  - similarity is the dot product, the largest one where a user has several embeddings; in training the embedding that
    fits the right label best is the one that learns (as in ComiRec, Cen et al. 2020);
  - with sampled negatives the softmax's sum is estimated without bias: a negative counts 1 / (the probability that it
    is there), which is the logQ correction with the right label itself left alone, since it is always there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from userllm import processes
from userllm.encoders.base import UserEncoder
from userllm.encoders.cross_entropy import blocked_cross_entropy
from userllm.encoders.features import RESERVED, FieldShape
from userllm.encoders.transformer import Transformer
from userllm.errors import UserError
from userllm.events import HistoryBatch
from userllm.ranges import BelowOne, PositiveInt


@dataclass
class DualConfig:
    """Sizes of the dual encoder; the paper states none but the number of embeddings."""

    kind: Literal["dual"] = "dual"
    """Which encoder: autoregressive, dual or bert4rec."""
    layers: PositiveInt = 2
    """Transformer layers per field (ours)."""
    width: PositiveInt = 128
    """U, the width of a user embedding and of a label's (ours: the autoregressive encoder's)."""
    heads: PositiveInt = 8
    """Attention heads of every field's Transformer (ours)."""
    feed_forward: PositiveInt = 512
    """Width of the feed-forward layers of the item's Transformer, of other fields' in proportion (ours)."""
    item_width: PositiveInt = 128
    """Width of the item's Transformer, and of the label tower's table (ours)."""
    field_width: PositiveInt = 32
    """Width of every other field's Transformer (ours)."""
    fusion_layers: PositiveInt = 2
    """Linear layers, with GELU between them, from the fields' states to the user's embeddings (ours)."""
    embeddings: PositiveInt = 1
    """m, embeddings per user (paper: 1 by default)."""
    label: str = "item"
    """Field of the next event that stage 1 predicts, one of ``data.fields`` (paper: the item; its appendix also names
    the category). Only with the item can the encoder rank the catalogue, and teach in stage 2."""
    negatives: Literal["catalogue", "batch", "mixed"] = "catalogue"
    """What a right label is compared with. catalogue: every label, exactly; batch: the other labels of the batch;
    mixed: these, and ``drawn_negatives`` of all labels (Yang et al. 2020) (ours: the paper says softmax)."""
    drawn_negatives: PositiveInt = 1024
    """Labels drawn for ``mixed``, each equally likely (ours)."""
    dropout: BelowOne = 0.1
    """Dropout on embeddings, attention weights, and in the feed-forward layers (ours)."""
    max_length: PositiveInt = 200
    """Events seen at most; of a longer history the latest (ours; the paper's windows are 50, 100 and 200)."""

    def build(self, fields: list[FieldShape]) -> DualEncoder:
        """The encoder for these fields, with random weights."""
        return DualEncoder(self, fields)


@dataclass
class FieldSequence:
    """One field's values in their own order, however many there are, padded on the right with 0.

    ids:  [B, L] or [B, L, K], L the field's own longest sequence.
    seen: [B, P], in 0..L: how many of the values had come at each of P moments; it is the sequence's mask, and all that
          ties the fields' times together.
    """

    ids: Tensor
    seen: Tensor

    @classmethod
    def from_events(cls, ids: Tensor, mask: Tensor) -> FieldSequence:
        """A field [B, S] or [B, S, K] of a HistoryBatch: its values at the events that have one (a film without genres
        has none; an unknown value is one), and as moments "before the first event" and "after each event", P = S + 1.
        """
        there = mask & ((ids != 0) if ids.ndim == 2 else (ids != 0).any(-1))
        length = max(1, int(there.sum(1).max())) if len(there) else 1
        order = torch.argsort(~there, dim=1, stable=True)[:, :length]
        kept = there.gather(1, order)
        ids = ids[torch.arange(len(ids), device=ids.device)[:, None], order]
        return cls(
            ids.masked_fill(~kept if ids.ndim == 2 else ~kept[..., None], 0), F.pad(there.cumsum(1), (1, 0))
        )


class FieldTower(nn.Module):
    """The Transformer over one field's sequence: what it has seen at each moment, [B, P, d]."""

    def __init__(self, field: FieldShape, width: int, feed_forward: int, config: DualConfig):
        super().__init__()
        self.dropout = config.dropout
        self.table = nn.Embedding(field.size, width, padding_idx=0)
        self.positions = nn.Embedding(config.max_length, width)
        self.nothing = nn.Parameter(torch.randn(width) * 0.02)  # the state before the first value
        name = "item_width" if field.name == "item" else "field_width"
        self.transformer = Transformer(config.layers, width, config.heads, feed_forward, config.dropout, name)
        nn.init.normal_(self.positions.weight, std=0.02)
        nn.init.normal_(self.table.weight, std=width**-0.5)
        with torch.no_grad():
            self.table.weight[0].zero_()

    def forward(self, sequence: FieldSequence) -> Tensor:
        """See the class. Padding is on the right, so the causal mask alone keeps it out of every state that is read."""
        x = self.table(sequence.ids)
        if sequence.ids.ndim == 3:  # the mean over a value's parts
            x = x.sum(-2) / (sequence.ids != 0).sum(-1, keepdim=True).clamp_min(1)
        x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        states = self.transformer(F.dropout(x, self.dropout, self.training), causal=True)
        states = torch.cat([self.nothing.expand(len(x), 1, -1), states], dim=1)
        return states[torch.arange(len(x), device=x.device)[:, None], sequence.seen]


class UserTower(nn.Module):
    """A Transformer per field, then the fusion layers: m embeddings at each moment, [B, P, m, U]."""

    def __init__(self, config: DualConfig, fields: list[FieldShape]):
        super().__init__()
        self.embeddings = config.embeddings
        widths = {f.name: config.item_width if f.name == "item" else config.field_width for f in fields}
        self.fields = nn.ModuleDict(
            {
                f.name: FieldTower(
                    f, widths[f.name], config.feed_forward * widths[f.name] // config.item_width, config
                )
                for f in fields
            }
        )
        wide = config.embeddings * config.width
        layers: list[nn.Module] = [nn.Linear(sum(widths.values()), wide)]
        for _ in range(config.fusion_layers - 1):
            layers += [nn.GELU(), nn.Linear(wide, wide)]
        self.fuse = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, sequences: Mapping[str, FieldSequence]) -> Tensor:
        """See the class. The sequences may differ in length; their moments are the same P."""
        states = torch.cat([tower(sequences[name]) for name, tower in self.fields.items()], dim=-1)
        return self.norm(self.fuse(states).unflatten(-1, (self.embeddings, -1)))


class LabelTower(nn.Module):
    """Embeddings of all values of the label field, [V, U]."""

    def __init__(self, field: FieldShape, config: DualConfig):
        super().__init__()
        self.table = nn.Embedding(field.size - RESERVED, config.item_width)
        self.project = nn.Linear(config.item_width, config.width)
        nn.init.normal_(self.table.weight, std=config.item_width**-0.5)

    def forward(self) -> Tensor:
        """See the class; row j is vocabulary id j + 2."""
        return self.project(self.table.weight)


class DualEncoder(UserEncoder):
    """Events [B, S] -> m user embeddings [B, m, U]. A user without events has none."""

    causal = False
    per_event = False
    not_extended = "a dual encoder has one embedding of the whole history"
    frequencies: Tensor | None

    def __init__(self, config: DualConfig, fields: list[FieldShape]):
        super().__init__()
        shapes = {f.name: f for f in fields}
        if config.label not in shapes:
            raise UserError(f"encoder.label: no field {config.label!r}; the fields are {', '.join(shapes)}")
        for name in ("embeddings", "fusion_layers"):
            if getattr(config, name) < 1:
                raise UserError(f"encoder.{name} is {getattr(config, name)}; at least 1 is needed")
        self.config = config
        self.width, self.max_length = config.width, config.max_length
        self.ranks_items = config.label == "item"
        self.needs_frequencies = config.negatives != "catalogue"
        self.user_tower = UserTower(config, fields)
        self.label_tower = LabelTower(shapes[config.label], config)
        self.register_buffer("frequencies", None, persistent=False)

    def forward(self, batch: HistoryBatch) -> tuple[Tensor, Tensor]:
        """User embeddings [B, m, U] and their mask [B, m]."""
        if batch.mask.shape[1] > self.max_length:
            raise ValueError(
                f"{batch.mask.shape[1]} events given, the encoder sees {self.max_length} at most"
            )
        last = self.prefix_embeddings(batch)[
            torch.arange(len(batch), device=batch.mask.device), batch.lengths
        ]
        return last, batch.mask.any(1, keepdim=True).expand(-1, self.config.embeddings)

    def prefix_embeddings(self, batch: HistoryBatch) -> Tensor:
        """[B, S + 1, m, U]: at s the user as of the first s events."""
        names = self.user_tower.fields
        return self.user_tower(
            {name: FieldSequence.from_events(batch.fields[name], batch.mask) for name in names}
        )

    def next_item_scores(self, histories: HistoryBatch, rows: Tensor, ends: Tensor) -> Tensor:
        """See ``UserEncoder``; a history without events is ranked, too."""
        if not self.ranks_items:
            raise UserError(
                f"an encoder with encoder.label={self.config.label} cannot rank the catalogue by itself"
            )
        return self.label_scores(self.prefix_embeddings(histories)[rows, ends])

    def label_scores(self, users: Tensor) -> Tensor:
        """Scores of every label, [..., V], from a user's embeddings [..., m, U]."""
        return _similarity(users, self.label_tower())

    def use_frequencies(self, counts: Mapping[str, Tensor]) -> None:
        """See ``UserEncoder``."""
        labels = counts[self.config.label][RESERVED:].double().clamp_min(1)
        if self._chooses:
            labels = labels[self.answers]
        self.frequencies = (labels / labels.sum()).to(self.label_tower.table.weight.device)

    def next_event_losses(self, inputs: HistoryBatch, targets: HistoryBatch) -> dict[str, Tensor]:
        """Cross-entropy of the next event's label, in nats, under ``"loss"`` and the label's name.

        An event with several labels (genres) counts once for each. In evaluation mode every label is a negative.
        """
        labels = targets.fields[self.config.label][targets.mask] - RESERVED
        event, *_ = torch.nonzero(labels >= 0, as_tuple=True)
        target = labels[labels >= 0]
        users = self.prefix_embeddings(inputs)[:, 1:][targets.mask][event]
        table = self.label_tower()
        if self._chooses:
            table, target = self.among_answers(table, target)
        if self.training:
            loss = self._training_loss(users, table, target)
        else:
            loss = F.cross_entropy(_similarity(users, table), target, reduction="sum")
            loss = loss / processes.share(len(target))
        return {"loss": loss, self.config.label: loss}

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The label tower."""
        return self.label_tower.parameters()

    @property
    def _chooses(self) -> bool:
        return self.answers is not None and self.config.label == "item"

    def _training_loss(self, users: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        if self.config.embeddings > 1:
            best = torch.einsum("nmu,nu->nm", users, labels[target]).argmax(1)
            users = users[torch.arange(len(users), device=users.device), best]
        else:
            users = users[:, 0]
        if self.config.negatives == "catalogue":
            return blocked_cross_entropy(users, labels, target)
        if self.frequencies is None:
            raise ValueError("sampled negatives: call use_frequencies before training")
        drawn = self.config.drawn_negatives if self.config.negatives == "mixed" else 0
        logits, column = sampled_logits(users, labels, target, self.frequencies, drawn)
        return F.cross_entropy(logits, column, reduction="sum") / processes.share(len(target))


def _similarity(users: Tensor, labels: Tensor) -> Tensor:
    """Of the labels [V, U] to the nearest of a user's embeddings [..., m, U]: [..., V]."""
    return (users @ labels.T).amax(-2)


def sampled_logits(
    users: Tensor, labels: Tensor, target: Tensor, frequencies: Tensor, drawn: int = 0
) -> tuple[Tensor, Tensor]:
    """Corrected similarities [N, W] of users [N, U] to the W labels [V, U] that happen to be there; targets' columns.

    There are the N targets [N], taken as draws with probabilities ``frequencies`` [V], and ``drawn`` more, uniform
    ones, each label once. For a user whose target is y, any other label j is there with probability
    1 - (1 - f_j)^(N - 1) (1 - 1/V)^drawn, and counts the inverse of that in the softmax's sum, which makes the sum's
    expectation the full one.
    """
    extra = torch.randint(len(labels), (drawn,), device=target.device)
    there, column = torch.unique(torch.cat([target, extra]), return_inverse=True)
    column = column[: len(target)]
    absent = (len(target) - 1) * torch.log1p(-frequencies[there].clamp_max(1 - 1e-9))
    absent = absent + drawn * math.log1p(-1 / max(len(labels), 2))
    correction = torch.log(-torch.expm1(absent)).to(users.dtype)
    similarity = users @ labels[there].T
    own = torch.arange(len(there), device=column.device) == column[:, None]
    return torch.where(own, similarity, similarity - correction), column
