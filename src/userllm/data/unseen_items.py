"""Items that no training history has: their events become users of their own, and only these are asked.

A user of the dataset becomes two: one with the events of all other items, who trains, and one with the events of the
unseen items alone, who is asked. So what a model is told of somebody it answers for holds nothing it ever met.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import polars as pl

from userllm.data.card import Source
from userllm.data.store import Dataset, write_dataset

SUFFIX = " (unseen items)"
"""Behind the raw id of a user who is asked."""


def unseen(item_id: str, share: float) -> bool:
    """Whether an item is kept from training. A hash of its id decides, so it does not depend on the other items."""
    digest = hashlib.sha256(f"unseen item {item_id}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def unseen_items(dataset: Dataset, share: float) -> np.ndarray:
    """By row of the catalogue, whether an item is kept from training; [items] bool."""
    return np.array([unseen(item, share) for item in dataset.item_ids])


def apart(dataset: Dataset, share: float, folder: Path) -> Dataset:
    """The dataset with everybody's events of unseen items apart, in ``folder``; what was made of the same one before
    is used again."""
    what = f"{dataset.card.name}, {share:g} of the items apart"
    card = dataset.card
    parts = (card.fingerprint, card.catalogue) if card.catalogue else ()
    source = Source("unseen items", what, "", card.fingerprint, "", parts)
    if (folder / "card.json").is_file() and (made := Dataset.open(folder)).card.source == source:
        return made
    owner = np.repeat(np.arange(dataset.num_users), dataset.lengths)
    moved = unseen_items(dataset, share)[dataset.events["item"]]
    number, user = np.unique(owner + moved * dataset.num_users, return_inverse=True)
    ids = [
        dataset.user_ids[n % dataset.num_users] + SUFFIX * (n >= dataset.num_users) for n in number.tolist()
    ]
    texts = {
        spec.name: dataset.event_texts(spec.name, range(dataset.num_events))
        for spec in dataset.card.fields
        if spec.level == "event" and spec.kind == "text"
    }
    columns = {name: np.asarray(dataset.events[name]) for name in ("item", "time", *dataset.event_fields)}
    return write_dataset(
        folder,
        pl.DataFrame({"user": user, **columns, **texts}),
        dataset.items,
        pl.DataFrame({"id": ids}),
        name=dataset.card.name,
        source=source,
        fields=dataset.card.fields,
    )
