"""A trained model takes in a catalogue that has grown (``userllm data append``), without training.

Where the encoder's item embeddings started from the titles, a new item gets the embedding its title would have started
with, and can be read and recommended like any other. Otherwise there is nothing to make an embedding of: new items stay
unknown, they are read as such and never recommended. Ours; the papers' catalogues are fixed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import polars as pl
import torch

from userllm.data.build import known_by_id
from userllm.data.collation import HistoryCollator
from userllm.data.vocabulary import Vocabulary
from userllm.encoders import AutoregressiveEncoder, UserEncoder
from userllm.errors import UserError
from userllm.language_models.text_embeddings import text_embeddings
from userllm.model import UserLLM, encoder_for
from userllm.tasks import build_task

ITEM_TABLE = "features.tables.item.weight"


@dataclass(frozen=True)
class Growth:
    """How many items are new, and how many of them the model now knows through their titles.

    described: items the model was trained on by their id alone and the dataset describes by now.
    """

    new: int
    known: int
    described: int = 0

    def __str__(self) -> str:
        told = (
            f"{self.new:,} new items: {self.known:,} known through their titles, "
            f"{self.new - self.known:,} read as unknown"
        )
        if self.described:
            told += f"; {self.described:,} described by now keep the ids that the model knows them by"
        return told


@torch.no_grad()
def grow(model: UserLLM, items: pl.DataFrame) -> tuple[UserLLM, Growth]:
    """The model with the catalogue ``items``: its own items first, in their order and as it knows them, then new ones.

    The weights and the language model are shared with ``model``, which must not be used any more where there is
    something to take in. Raises UserError where the catalogue is not the model's with items added.
    """
    own = model.collator.items
    described = _described(own, items)
    new = len(items) - len(own)
    if new == 0 or model.text_start is None or not isinstance(model.encoder, AutoregressiveEncoder):
        return model, Growth(new, 0, described)
    # what was trained under an id stays under it: another title would be another answer, read for another embedding
    items = pl.concat([own, items.select(own.columns)[len(own) :]], how="vertical_relaxed")
    titles = items["title"].to_list()[len(own) :]
    with model.attachment.detached():
        vectors = text_embeddings(model.lm, model.tokenizer, titles, model.encoder.config.item_text)
    vocabulary = Vocabulary(
        [
            replace(f, values=[*f.values, *items["id"].to_list()[len(own) :]]) if f.name == "item" else f
            for f in model.collator.vocabulary
        ]
    )
    encoder = _grown_encoder(model.encoder, vocabulary, model.text_start.rows(vectors))
    model.attachment.detach()
    grown = UserLLM(
        model.lm,
        model.tokenizer,
        encoder,
        model.config,
        {name: build_task(name, task.config, items) for name, task in model.tasks.items()},
        HistoryCollator(items, vocabulary),
        model.reference,
        model.strategy,
        model.adapter,
    )
    weights = model.fusion_weights()
    for name, weight in grown.fusion_weights().items():
        weight.copy_(weights[name])
    grown.text_start, grown.run = model.text_start, model.run
    grown.requires_grad_(False)
    return grown.eval(), Growth(new, new, described)


def _described(own: pl.DataFrame, items: pl.DataFrame) -> int:
    """How many of the model's ``own`` items were known by their id alone and are described in ``items``.

    Raises UserError where ``items`` does not begin with the model's items, otherwise unchanged.
    """
    begin, bare = items.head(len(own)), own.select(known_by_id(own)).to_series()
    described = bare & ~bare
    for column in own.columns:
        fits = column in items.columns and len(begin) == len(own)
        changed = begin[column].ne_missing(own[column]) if fits else None
        if changed is None or (changed if column in ("item", "id") else changed & ~bare).any():
            raise UserError(
                f"the catalogue's column {column!r} does not begin with the model's {len(own)} items; only a "
                "dataset that grew by `userllm data append` fits"
            )
        described |= changed
    return int(described.sum())


def _grown_encoder(encoder: AutoregressiveEncoder, vocabulary: Vocabulary, rows: torch.Tensor) -> UserEncoder:
    grown = encoder_for(vocabulary, encoder.config)
    weights = encoder.state_dict()
    table = weights[ITEM_TABLE]
    weights[ITEM_TABLE] = torch.cat([table, rows.to(table)])
    grown.load_state_dict(weights)
    return grown.to(table.device)
