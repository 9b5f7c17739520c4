"""Tasks: what is asked, and the right answer. Some have a closed set of answers, others are answered in free text.

A task sees data and texts, never a model. Prompts are configuration: neither paper prints its own, so ours are short
(the paper allows 32 tokens) and say so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from userllm.data.store import Dataset
from userllm.errors import UserError


@dataclass
class TaskConfig:
    """One task of a run."""

    kind: Literal["next_item", "favorite_category", "review", "genre_preference"] = "next_item"
    """What is asked."""
    prompt: str = "The next movie this user will watch is"
    """The query text (ours: the papers do not print theirs). The answer follows after one space. Of a review it is a
    template: {title} and other fields of the item, {rating} and other fields of the event to be written about."""
    field: str = "genres"
    """favorite_category: the item field whose most frequent value is asked for; genre_preference: the field whose
    preferred values are."""
    weight: float = 1.0
    """Share of this task among the training examples, relative to the other tasks'."""
    normalization: Literal["catalogue", "vocabulary"] = "catalogue"
    """Softmax over the tokens that continue some answer (ours), or over the LM's whole vocabulary (paper)."""
    teacher: float = 0.0
    """next_item: weight in 0..1 of the encoder's own distribution over items as a soft target (ours; paper: 0)."""
    target: str = "text"
    """review: the event's text field that is to be written."""
    rating: str = "rating"
    """review: the event's field that says how much the user liked it; written texts are checked against it."""
    liked: float = 4.0
    """genre_preference: an item with at least this rating is liked (ours)."""
    share: float = 0.25
    """genre_preference: at least this share of the liked items must carry a preferred genre (ours)."""
    history: int = 200
    """genre_preference: latest events that decide, however many the model sees (ours)."""
    target_tokens: int = 64
    """Free text: leading tokens of a target that are learned and whose likelihood is measured (ours)."""


class Task(ABC):  # noqa: B024 - what a closed and an open task must do has nothing in common
    """Something that is asked about a user at a point in time."""

    def __init__(self, name: str, config: TaskConfig):
        self.name = name
        self.config = config


class ClosedTask(Task):
    """A task whose answers are known beforehand. ``answers`` [N] are distinct texts."""

    def __init__(self, name: str, config: TaskConfig, answers: Sequence[str]):
        super().__init__(name, config)
        self.answers = list(answers)

    @abstractmethod
    def targets(
        self, dataset: Dataset, users: np.ndarray, ends: np.ndarray, window: int | np.ndarray
    ) -> np.ndarray:
        """The right answer [E] for each example: user [E], who has had ``ends`` [E] events, of which the model sees
        the latest ``window`` (one number, or [E]). -1 where there is no right answer."""


@dataclass(frozen=True)
class TextExample:
    """What an open task asks in one case, and the text that answers it."""

    prompt: str
    target: str


class OpenTask(Task):
    """A task that is answered in free text. The prompt may differ from case to case.

    It is trained on targets token by token over the LM's whole vocabulary, in nats per token, and evaluated on what the
    LM writes (``evaluation.open``).
    """

    @abstractmethod
    def examples(
        self, dataset: Dataset, users: np.ndarray, ends: np.ndarray, window: int | np.ndarray
    ) -> list[TextExample | None]:
        """What to ask each user [E], who has had ``ends`` [E] events, of which the model sees the latest ``window``
        (one number, or [E]). None where there is nothing to ask."""

    def copied(self, dataset: Dataset, users: np.ndarray, ends: np.ndarray) -> list[str] | None:
        """What each user [E] has said so far that could be copied as an answer: a baseline. None where there is none.

        "" for users who have said nothing yet.
        """
        return None


class NextItem(ClosedTask):
    """Which item comes next (User-LLM section 4.1). Answer n is row n of the catalogue."""

    def __init__(self, name: str, config: TaskConfig, items: pl.DataFrame):
        super().__init__(name, config, distinct_texts(items["title"].to_list()))

    def targets(
        self, dataset: Dataset, users: np.ndarray, ends: np.ndarray, window: int | np.ndarray
    ) -> np.ndarray:
        """See the base class: the event at position ``ends``."""
        return dataset.events["item"][dataset.offsets[users] + ends].astype(np.int64)


class FavoriteCategory(ClosedTask):
    """The value of a field that occurs most often in the history (User-LLM section 4.1).

    Ties go to the value that comes first in alphabetical order (ours: the paper names no rule). The history is what
    the model sees, so counting would answer every question: the exact answer's upper bound is 1.
    """

    def __init__(self, name: str, config: TaskConfig, items: pl.DataFrame):
        if config.field not in items.columns:
            raise UserError(
                f"task {name}: items have no field {config.field!r}; they have {', '.join(items.columns)}"
            )
        column = items[config.field]
        lists = column.to_list() if column.dtype == pl.List else [[v] for v in column.to_list()]
        values = sorted({v for row in lists for v in row or () if v is not None})
        super().__init__(name, config, values)
        number = {value: i for i, value in enumerate(values)}
        self._has = np.zeros((len(lists), len(values)), dtype=np.int32)
        for row, names in enumerate(lists):
            for value in names or ():
                if value is not None:
                    self._has[row, number[value]] = 1

    def targets(
        self, dataset: Dataset, users: np.ndarray, ends: np.ndarray, window: int | np.ndarray
    ) -> np.ndarray:
        """See the base class: the most frequent value among the latest ``window`` events before ``ends``."""
        seen = np.minimum(ends, window)[:, None]
        back = np.arange(seen.max(initial=1))[None]
        index = dataset.offsets[users][:, None] + ends[:, None] - 1 - back
        real = back < seen
        counts = self._has[dataset.events["item"][np.where(real, index, 0)]] * real[..., None]
        totals = counts.sum(1)
        return np.where(totals.max(1) > 0, totals.argmax(1), -1)


def distinct_texts(titles: Sequence[str]) -> list[str]:
    """Titles made distinct: the second item of a title becomes ``"title [2]"``, and so on, in catalogue order."""
    used, seen, result = set(titles), Counter[str](), []
    for title in titles:
        seen[title] += 1
        text, number = title, seen[title]
        while number > 1 and (text := f"{title} [{number}]") in used:
            number += 1
        used.add(text)
        result.append(text)
    return result
