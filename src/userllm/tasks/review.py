"""Review generation (User-LLM section 4.1): what the user will write about the next item."""

from __future__ import annotations

from string import Formatter

import numpy as np
import polars as pl

from userllm.data.store import Dataset
from userllm.errors import UserError
from userllm.tasks.base import OpenTask, TaskConfig, TextExample


class Review(OpenTask):
    """The text that belongs to the event at position ``ends``, of which the prompt may tell item and rating.

    The prompt is a template: {title} and the item's other fields, and the fields of the event itself ({rating}). White
    space within a text counts as one space (ours). Raises UserError for a template that names anything else.
    """

    def __init__(self, name: str, config: TaskConfig, items: pl.DataFrame):
        super().__init__(name, config)
        self.places = [place for _, place, _, _ in Formatter().parse(config.prompt) if place is not None]
        self._items = {
            place: [_spelt(value) for value in items[place].to_list()]
            for place in self.places
            if place in items.columns
        }

    def examples(
        self, dataset: Dataset, users: np.ndarray, ends: np.ndarray, window: int | np.ndarray
    ) -> list[TextExample | None]:
        """See the base class; users who wrote nothing there are not asked."""
        rows = dataset.offsets[users] + ends
        texts = dataset.event_texts(self.config.target, rows.tolist())
        shown: dict[str, list[str]] = {}
        for place in self.places:
            if place in self._items:
                shown[place] = [self._items[place][item] for item in dataset.events["item"][rows].tolist()]
            elif place in dataset.event_fields:
                shown[place] = [_spelt(value) for value in dataset.events[place][rows].tolist()]
            else:
                known = ", ".join(f"{{{name}}}" for name in [*dataset.items.columns, *dataset.event_fields])
                raise UserError(f"task {self.name}: prompt: no {{{place}}}; there are {known}")
        prompts = [
            self.config.prompt.format(**{place: values[n] for place, values in shown.items()})
            for n in range(len(rows))
        ]
        targets = [" ".join(text.split()) for text in texts]
        return [
            TextExample(prompt, target) if target else None
            for prompt, target in zip(prompts, targets, strict=True)
        ]

    def copied(self, dataset: Dataset, users: np.ndarray, ends: np.ndarray) -> list[str]:
        """The text that the user wrote last."""
        texts = []
        for user, end in zip(users.tolist(), ends.tolist(), strict=True):
            first = int(dataset.offsets[user])
            earlier = dataset.event_texts(self.config.target, range(first, first + end))
            texts.append(next((" ".join(text.split()) for text in reversed(earlier) if text), ""))
        return texts


def _spelt(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
