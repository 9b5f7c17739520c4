"""Review generation (User-LLM section 4.1): what the user will write about the next item."""

from __future__ import annotations

from string import Formatter
from typing import Any

import numpy as np
import polars as pl

from userllm.data.store import Dataset
from userllm.errors import UserError
from userllm.tasks.base import OpenTask, TaskConfig, TextExample


class Review(OpenTask):
    """The text that belongs to the event at position ``ends``, of which the prompt may tell item and rating.

    The prompt is a template: {title} and the item's other fields, and the fields of the event itself ({rating}), which
    may say how a number is written ({rating:.1f}); what is missing reads "unknown". White space within a text counts as
    one space (ours). Raises UserError for a template that names anything else.
    """

    def __init__(self, name: str, config: TaskConfig, items: pl.DataFrame):
        super().__init__(name, config)
        try:
            self._parts = list(Formatter().parse(config.prompt))
        except ValueError as error:
            raise UserError(
                f"task {name}: prompt {config.prompt!r}: {error}; write {{{{ for a plain {{"
            ) from error
        self.places = [place for _, place, _, _ in self._parts if place is not None]
        self._items = {place: items[place].to_list() for place in self.places if place in items.columns}

    def examples(
        self, dataset: Dataset, users: np.ndarray, ends: np.ndarray, window: int | np.ndarray
    ) -> list[TextExample | None]:
        """See the base class; users who wrote nothing there are not asked."""
        rows = dataset.offsets[users] + ends
        texts = dataset.event_texts(self.config.target, rows.tolist())
        shown: dict[str, list[Any]] = {}
        for place in self.places:
            if place in self._items:
                shown[place] = [self._items[place][item] for item in dataset.events["item"][rows].tolist()]
            elif place in dataset.event_fields:
                shown[place] = dataset.events[place][rows].tolist()
            else:
                known = ", ".join(f"{{{name}}}" for name in [*dataset.items.columns, *dataset.event_fields])
                raise UserError(f"task {self.name}: prompt: no {{{place}}}; there are {known}")
        prompts = [
            self._prompt({place: values[n] for place, values in shown.items()}) for n in range(len(rows))
        ]
        targets = [" ".join(text.split()) for text in texts]
        return [
            TextExample(prompt, target) if target else None
            for prompt, target in zip(prompts, targets, strict=True)
        ]

    def _prompt(self, values: dict[str, Any]) -> str:
        """The template with these values. Raises UserError where one cannot be written as the template says."""
        text = []
        for literal, place, how, conversion in self._parts:
            text.append(literal)
            if place is not None:
                value = values[place]
                if value is None or value != value:  # a number that is missing is NaN
                    text.append("unknown")
                    continue
                try:
                    value = value if how else _spelt(value)
                    text.append(format(Formatter().convert_field(value, conversion), how or ""))
                except (ValueError, TypeError) as error:
                    raise UserError(
                        f"task {self.name}: prompt: {{{place}}} cannot be written as {how!r} ({error}); "
                        f"leave that out: {{{place}}}"
                    ) from error
        return "".join(text)

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
