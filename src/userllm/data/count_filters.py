"""Filters that need all events at once: repeated pairs, and rare items and short histories."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from userllm.data.columns import BLOCK, ColumnWriter, column_file, read_column, users_of

Repeated = Literal["all", "first", "last"]


@dataclass(frozen=True)
class CountFilters:
    """Filters that need all events at once. Off by default."""

    repeated: Repeated = "all"
    """Of a user's events with one item keep all, the first, or the last."""
    min_item_events: int = 1
    """Items with fewer events are left out, and with them their events."""
    min_user_events: int = 1
    """Users with fewer events are left out. Both minima hold in the end: they are applied in turns."""


@dataclass(frozen=True)
class Enough:
    """What the minima left. items, users: which stay, bool. taken: events each rule took."""

    lengths: np.ndarray
    items: np.ndarray
    users: np.ndarray
    span: tuple[int, int]
    taken: dict[str, int]


def enough(
    folder: Path, types: Mapping[str, str], lengths: np.ndarray, items: int, asked: CountFilters
) -> Enough:
    """Leave rare items and short histories out of sorted columns, in turns, until there are neither.

    folder: the columns, which are replaced. lengths: events per user. items: how many there are.
    """
    item = read_column(folder, "item")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    keep = np.ones(len(item), dtype=bool)
    blocks = [slice(start, min(start + BLOCK, len(item))) for start in range(0, len(item), BLOCK)]
    taken = {"item": 0, "user": 0}
    span: list[tuple[int, int]] = []
    while True:
        before = int(keep.sum())
        item_counts = np.zeros(items, dtype=np.int64)
        for b in blocks:
            item_counts += np.bincount(item[b][keep[b]], minlength=items)
        rare = item_counts < asked.min_item_events
        for b in blocks:
            keep[b] &= ~rare[item[b]]
        middle = int(keep.sum())
        user_counts = np.zeros(len(lengths), dtype=np.int64)
        for b in blocks:
            user = users_of(offsets, b.start, b.stop)
            user_counts += np.bincount(user[keep[b]], minlength=len(lengths))
        short = user_counts < asked.min_user_events
        for b in blocks:
            keep[b] &= ~short[users_of(offsets, b.start, b.stop)]
        after = int(keep.sum())
        taken["item"] += before - middle
        taken["user"] += middle - after
        if after == before:
            break
    stays = item_counts >= asked.min_item_events if asked.min_item_events > 1 else np.ones(items, dtype=bool)
    number = (np.cumsum(stays) - 1).astype(np.int32)
    for name in types:
        if name == "user":
            continue
        column, partial = read_column(folder, name), folder.parent / "kept.npy"
        writer = ColumnWriter(partial, types[name])
        for b in blocks:
            values = column[b][keep[b]]
            writer.append(number[values] if name == "item" else values)
            if name == "time" and len(values):
                span.append((int(values.min()), int(values.max())))
        writer.close()
        os.replace(partial, column_file(folder, name))
    rules = {"item": f"items with fewer than {asked.min_item_events} events"}
    rules["user"] = f"users with fewer than {asked.min_user_events} events"
    asked_for = {"item": asked.min_item_events > 1, "user": asked.min_user_events > 1}
    return Enough(
        lengths=user_counts[~short],
        items=stays,
        users=~short,
        span=(min((low for low, _ in span), default=0), max((high for _, high in span), default=0)),
        taken={rules[kind]: count for kind, count in taken.items() if asked_for[kind]},
    )
