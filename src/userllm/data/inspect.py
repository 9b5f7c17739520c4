"""A dataset in words: its card, one user's history, and how long histories are."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from userllm.data.columns import BLOCK
from userllm.data.store import Dataset

BAR = 40
EVENTS_SHOWN = 15


def describe(dataset: Dataset, user: int | None = None) -> str:
    """The card, the latest events of a user (None: the user of median history length), and the histogram of lengths."""
    if user is None:
        user = int(np.argsort(dataset.lengths, kind="stable")[dataset.num_users // 2])
    return "\n\n".join([describe_card(dataset), describe_user(dataset, user), describe_lengths(dataset)])


def describe_card(dataset: Dataset) -> str:
    card = dataset.card
    rated = int((item_counts(dataset) > 0).sum())
    lines = {
        "dataset": f"{card.name}, in {dataset.folder}",
        "source": f"{card.source.where} ({card.source.file}), served by {card.source.served_by}",
        "sha256": card.source.sha256,
        "counts": f"{card.users:,} users, {card.items:,} items ({rated:,} with events), {card.events:,} events",
        "time span": " to ".join(_day(second) for second in card.time_span),
        "times": card.time,
        "ties": card.tie_rule,
        "fields": ", ".join(f"{f.name} ({f.kind}, per {f.level})" for f in card.fields),
        "rows": str(card.rows),
        "filters": "; ".join(card.filters) or "none",
        **({"notes": "; ".join(card.notes)} if card.notes else {}),
        "fingerprint": card.fingerprint,
        "created by": card.created_by,
    }
    return "\n".join(f"{name + ':':<13}{value}" for name, value in lines.items())


def item_counts(dataset: Dataset) -> np.ndarray:
    """Events of each item, [items], without having the whole column in memory."""
    counts = np.zeros(dataset.num_items, dtype=np.int64)
    for start in range(0, dataset.num_events, BLOCK):
        counts += np.bincount(dataset.events["item"][start : start + BLOCK], minlength=dataset.num_items)
    return counts


def describe_user(dataset: Dataset, user: int) -> str:
    """The latest events of a user. Raises UserError where there is no such user."""
    history = dataset.history(user)
    first = max(0, len(history) - EVENTS_SHOWN)
    rows = range(int(dataset.offsets[user]) + first, int(dataset.offsets[user + 1]))
    lines = [
        f"user {user} (id {history.user}): {len(history)} events"
        + (f", the latest {EVENTS_SHOWN}" if first else "")
    ]
    for event, row in zip(history.events[first:], rows, strict=True):
        item = dataset.items.row(int(dataset.events["item"][row]), named=True)
        values = "  ".join(
            f"{name} {value:g}" for name, value in event.fields.items() if not isinstance(value, str)
        )
        named = [f.name for f in dataset.card.fields if f.level == "item" and f.name not in ("title", "year")]
        several = [", ".join(_several(item[name])) for name in named]
        shown = [
            _day(event.time or 0),
            values,
            " ".join(item["title"].split()),
            *(f"[{text}]" for text in several),
        ]
        lines.append("  " + "  ".join(part for part in shown if part))
    return "\n".join(lines)


def describe_lengths(dataset: Dataset) -> str:
    """Users by history length, in bins that double."""
    lengths = dataset.lengths
    low, high, middle = int(lengths.min()), int(lengths.max()), int(np.median(lengths))
    lines = [f"history lengths: shortest {low}, median {middle}, longest {high}"]
    edges = 2 ** np.arange(int(np.log2(low)), int(np.log2(high)) + 2)
    counts = np.histogram(lengths, bins=edges)[0]
    for start, stop, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "#" * round(BAR * count / counts.max()) or "." * bool(count)
        lines.append(f"  {f'{start:,} to {stop - 1:,}':>17}  {count:>9,}  {bar}".rstrip())
    return "\n".join(lines)


def _several(value: object) -> list[str]:
    if isinstance(value, list):
        return [str(one) for one in value]
    return [] if value is None else [str(value)]


def _day(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%d")
