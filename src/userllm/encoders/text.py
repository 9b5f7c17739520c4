"""The text-history encoder of UEM (arXiv 2401.04858): events are sentences, there is no item vocabulary.

    "The movie T is listed with genres G"  --+
    the rating                             --+-- sentence encoder --> [3s] --> Transformer --> user embedding
    the description                        --+

Sentence embeddings are computed once per distinct text and looked up in a memory-mapped table (``data.text_store``).
The weights know nothing of any catalogue: ``use`` takes a table for another one, and items unseen in training are read
like all others.

Where we differ from the paper or fill in what it leaves out ("ours"): attention is causal by default, so that one pass
serves every prefix of a history; learned positions; sentence embeddings are standardised, each part by the mean and
variance over the catalogue the encoder is trained on (as they come they are almost alike, and so small that positions
and layers drown what tells them apart); the projection to the language model's width is the fusion's, and 3s goes to
the Transformer's width before it; a text that is missing has a learned vector; an optional stage 1, the next item by
inner products with the catalogue's own sentence embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from userllm.bfloat16 import multiplies
from userllm.data.text_store import TextStore
from userllm.data.vocabulary import FIRST_VALUE, Vocabulary
from userllm.encoders.base import UserEncoder
from userllm.encoders.cross_entropy import blocked_cross_entropy
from userllm.encoders.features import FieldShape
from userllm.encoders.transformer import Transformer
from userllm.errors import UserError
from userllm.events import HistoryBatch
from userllm.ranges import BelowOne, PositiveInt

_SMALLEST_SPREAD = 1e-3
"""A part whose texts are all alike would be divided by nothing."""

Part = Literal["title", "rating", "description"]
Texts = Mapping[str, Sequence[str | None]]
"""By part, the text of each vocabulary id of its field; None: there is none."""


@dataclass
class TextConfig:
    """Sizes and texts of the text-history encoder; defaults are UEM's where it states them."""

    kind: Literal["text"] = "text"
    """Which encoder: text (UEM's)."""
    layers: PositiveInt = 3
    """Transformer layers (UEM: 3)."""
    width: PositiveInt = 768
    """U, the width of a user embedding (UEM: 768)."""
    heads: PositiveInt = 12
    """Attention heads (UEM: 12)."""
    feed_forward: PositiveInt = 2048
    """Width of the feed-forward layers (UEM: 2048)."""
    dropout: BelowOne = 0.1
    """Dropout on embeddings, attention outputs and feed-forward outputs (ours)."""
    max_length: PositiveInt = 200
    """Events seen at most; of a longer history the latest (ours)."""
    products: Literal["float32", "bfloat16"] = "float32"
    """Of the Transformer's matrix products (ours); weights, norms and sums stay float32. "bfloat16" is several times as
    fast on processors with bfloat16 instructions; on others it stays float32, which the output says."""
    causal: bool = True
    """Whether an embedding knows its own and earlier events only, so that one pass serves every prefix of a history
    (ours: the paper is silent), or all of them."""
    sentences: str = "sentence-transformers/sentence-t5-base"
    """Sentence encoder (UEM: SentenceT5): a hub id, a folder, or ``all-minilm-l6-v2``, which a package has, too."""
    sentence_width: PositiveInt = 768
    """s, the width of its vectors (sentence-t5-base: 768, all-minilm-l6-v2: 384)."""
    parts: list[Part] = field(default_factory=lambda: ["title", "rating", "description"])
    """What is known of an event, in this order (UEM: all three)."""
    title: str = "The movie {title} is listed with genres {genres}"
    """Text of part title (UEM); any field of the catalogue may stand in it."""
    rating: str = "{rating}"
    """Text of part rating, of one event-level field (ours: the paper does not print it. Bare numbers have embeddings
    further apart than sentences around them)."""
    description: str = "{description}"
    """Text of part description; any field of the catalogue may stand in it."""

    def build(self, fields: list[FieldShape]) -> TextEncoder:
        """The encoder with random weights and no texts yet: see ``TextEncoder.use``."""
        return TextEncoder(self, fields)

    def texts(self, items: pl.DataFrame, vocabulary: Vocabulary) -> dict[str, list[str | None]]:
        """By part, the text of each vocabulary id of its field; None for padding, unknown values and missing texts.

        A template whose single-valued fields are not all known gives no text; of an empty list it says "none".
        Raises UserError for a template that names anything but fields of the catalogue (rating: but one field of the
        events).
        """
        return {part: self._texts(part, items, vocabulary) for part in self.parts}

    def _texts(self, part: Part, items: pl.DataFrame, vocabulary: Vocabulary) -> list[str | None]:
        template = {"title": self.title, "rating": self.rating, "description": self.description}[part]
        names = named_fields(template)
        reserved: list[str | None] = [None] * FIRST_VALUE
        if part == "rating":
            events = [f.name for f in vocabulary if f.level == "event" and f.name != "item"]
            if len(names) != 1 or names[0] not in events:
                raise UserError(
                    f"encoder.rating {template!r}: name one field of the events among data.fields "
                    f"({', '.join(events) or 'none'}), or leave rating out of encoder.parts"
                )
            return reserved + [template.format(**{names[0]: value}) for value in vocabulary[names[0]].values]
        if unknown := [name for name in names if name not in items.columns]:
            hint = " (data.descriptions brings it)" if unknown[0] == "description" else ""
            raise UserError(
                f"encoder.{part}: the catalogue has no {{{unknown[0]}}}{hint}; it has {', '.join(items.columns)}"
            )
        columns = [items[name].to_list() for name in names]
        texts = [_filled(template, names, values) for values in zip(*columns, strict=True)]
        rows = dict(zip(items["id"].to_list(), texts, strict=True))
        return reserved + [rows[item] for item in vocabulary["item"].values]


def named_fields(template: str) -> list[str]:
    """The fields a template names."""
    return [name for _, name, _, _ in Formatter().parse(template) if name is not None]


def _filled(template: str, names: Sequence[str], values: Sequence[object]) -> str | None:
    shown = {}
    for name, value in zip(names, values, strict=True):
        if value is None or value == "":
            return None
        shown[name] = (", ".join(map(str, value)) or "none") if isinstance(value, list) else value
    return template.format(**shown)


class TextEncoder(UserEncoder):
    """Events [B, S] -> user embeddings [B, S, U], one per event.

    The table of sentence embeddings is no weight of the encoder: it is not saved with it, and comes with ``use``.
    """

    ranks_items = True

    def __init__(self, config: TextConfig, fields: list[FieldShape]):
        super().__init__()
        if not config.parts or len(set(config.parts)) < len(config.parts):
            raise UserError(f"encoder.parts is {config.parts}; name one to three different parts")
        rating = " ".join(named_fields(config.rating))  # more than one, or none, is no field's name
        self.field_of = {part: rating if part == "rating" else "item" for part in config.parts}
        if unknown := [name for name in self.field_of.values() if name not in [f.name for f in fields]]:
            raise UserError(
                f"encoder.parts: field {unknown[0]!r} is not one of data.fields; add it, or drop the part"
            )
        self.config = config
        self.width, self.max_length, self.causal = config.width, config.max_length, config.causal
        s = config.sentence_width
        for part in config.parts:  # of the catalogue of the training; a spread of 0: none was read yet
            self.register_buffer(f"centre_{part}", torch.zeros(s))
            self.register_buffer(f"spread_{part}", torch.zeros(()))
        self.missing = nn.ParameterDict({part: nn.Parameter(torch.randn(s)) for part in config.parts})
        self.fuse = nn.Linear(len(config.parts) * s, config.width)
        self.positions = nn.Embedding(config.max_length, config.width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.transformer = Transformer(
            config.layers, config.width, config.heads, config.feed_forward, config.dropout
        )
        self.item_parts = [part for part in config.parts if part != "rating"]
        self.head = nn.Linear(config.width, len(self.item_parts) * s) if self.item_parts else None
        self.ranks_items = self.head is not None
        self.store: TextStore | None = None
        self.texts: Texts = {}
        self.vectors: Tensor
        self.register_buffer("vectors", torch.zeros(0, s, dtype=torch.float16), persistent=False)
        for part in config.parts:
            self.register_buffer(f"rows_{part}", torch.zeros(0, dtype=torch.long), persistent=False)

    def use(self, store: TextStore, texts: Texts) -> None:
        """Read these texts: by part, one per vocabulary id; they must be in the store.

        The first catalogue's mean and spread stay with the encoder: the same text is the same input in every other.
        Raises UserError where the store's vectors have another width.
        """
        if store.encoder.width != self.config.sentence_width:
            raise UserError(
                f"{store.encoder.name} makes vectors of width {store.encoder.width}; set encoder.sentence_width to that"
            )
        self.store, self.texts = store, texts
        device = self.fuse.weight.device
        self.vectors = torch.from_numpy(np.asarray(store.vectors)).to(device)
        for part in self.config.parts:
            rows = torch.from_numpy(store.rows(texts[part])).to(device)
            setattr(self, f"rows_{part}", rows)
            spread: Tensor = getattr(self, f"spread_{part}")
            if spread == 0 and (rows >= 0).any():
                vectors = self.vectors[rows[rows >= 0]].float()
                centre = vectors.mean(0)
                getattr(self, f"centre_{part}").copy_(centre)
                spread.copy_((vectors - centre).square().mean().sqrt().clamp_min(_SMALLEST_SPREAD))

    def save_texts(self, folder: Path) -> None:
        """A store of what this encoder reads, so that it can be used elsewhere."""
        if self.store is None:
            raise RuntimeError("this encoder has no texts yet: call use(store, texts)")
        self.store.copy(folder, [text for column in self.texts.values() for text in column])

    def forward(self, batch: HistoryBatch) -> tuple[Tensor, Tensor]:
        """User embeddings [B, S, U] and the batch's mask; values at padding are meaningless."""
        length = batch.mask.shape[1]
        if length > self.max_length:
            raise ValueError(f"{length} events given, the encoder sees {self.max_length} at most")
        with self._products():
            return self._embeddings(batch, length).to(self.fuse.weight.dtype), batch.mask

    def _products(self) -> AbstractContextManager[object]:
        if self.config.products == "float32" or not multiplies(self.fuse.weight.device):
            return nullcontext()
        return torch.autocast(self.fuse.weight.device.type, torch.bfloat16)

    def _embeddings(self, batch: HistoryBatch, length: int) -> Tensor:
        parts = [self._sentences(part, batch.fields[self.field_of[part]]) for part in self.config.parts]
        x = self.fuse(torch.cat(parts, dim=-1)) + self.positions.weight[:length]
        x = F.dropout(x, self.config.dropout, self.training)
        if self.causal:  # padding on the right: no event sees it
            return self.transformer(x, causal=True)
        visible = batch.mask.clone()
        visible[:, 0] = True  # attention over nothing would be no number; only an empty history is concerned
        return self.transformer(x, visible)

    def _sentences(self, part: str, ids: Tensor) -> Tensor:
        """Sentence embeddings [..., s] of vocabulary ids [...]."""
        rows: Tensor = getattr(self, f"rows_{part}")
        if not len(rows):
            raise RuntimeError("this encoder has no texts yet: call use(store, texts)")
        place = rows[ids]
        missing = self.missing[part]
        if not len(self.vectors):
            return missing.expand(*ids.shape, -1)
        found = self.vectors[place.clamp_min(0)].to(missing.dtype) - getattr(self, f"centre_{part}")
        found = found / getattr(self, f"spread_{part}").clamp_min(_SMALLEST_SPREAD)
        return torch.where((place >= 0)[..., None], found, missing)

    def _catalogue(self) -> Tensor:
        """Sentence embeddings of the whole catalogue, [items, parts * s], of length 1."""
        ids = torch.arange(
            FIRST_VALUE, len(getattr(self, f"rows_{self.item_parts[0]}")), device=self.vectors.device
        )
        rows = torch.cat([self._sentences(part, ids) for part in self.item_parts], dim=-1)
        return F.normalize(rows, dim=-1)

    def item_scores(self, embeddings: Tensor) -> Tensor | None:
        """Scores [..., items] of every item as the next event, from user embeddings [..., U]."""
        return None if self.head is None else self.head(embeddings) @ self._catalogue().T

    def next_item_scores(self, histories: HistoryBatch, rows: Tensor, ends: Tensor) -> Tensor:
        """See ``UserEncoder``."""
        if self.causal:
            embeddings = self(histories)[0][rows, ends - 1]
        else:
            states = self(histories.select(rows).prefixes(ends))[0]
            embeddings = states[torch.arange(len(rows), device=rows.device), ends - 1]
        scores = self.item_scores(embeddings)
        if scores is None:
            raise UserError("encoder.parts holds nothing of the item, so items cannot be ranked")
        return scores

    def next_event_losses(self, inputs: HistoryBatch, targets: HistoryBatch) -> dict[str, Tensor]:
        """Cross-entropy of the next item over the catalogue, in nats (ours; only of a causal encoder)."""
        if not self.causal or self.head is None:
            raise UserError("a text encoder is pretrained only if it is causal and has parts of the item")
        known = targets.mask & (targets.fields["item"] >= FIRST_VALUE)
        hidden, target = self(inputs)[0][known], targets.fields["item"][known] - FIRST_VALUE
        loss = blocked_cross_entropy(self.head(hidden), *self.among_answers(self._catalogue(), target))
        return {"loss": loss, "item": loss}

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The map to the catalogue's sentence embeddings."""
        return iter(()) if self.head is None else self.head.parameters()
