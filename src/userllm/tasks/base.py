"""Tasks: what is asked, and the right answer. Some have a closed set of answers, others are answered in free text.

A task sees data and texts, never a model. Prompts are configuration: neither paper prints its own, so ours are short
(the paper allows 32 tokens) and say so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from userllm.data.store import Dataset
from userllm.data.titles import distinct_titles
from userllm.data.vocabulary import value_text
from userllm.errors import UserError
from userllm.ranges import Fraction, NonNegativeFloat, PositiveFraction, PositiveInt

EXAMPLES = 4096
"""Examples whose categories are counted together."""


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
    weight: NonNegativeFloat = 1.0
    """Share of this task among the training examples, relative to the other tasks'."""
    normalization: Literal["catalogue", "vocabulary"] = "catalogue"
    """Softmax over the tokens that continue some answer (ours), or over the LM's whole vocabulary (paper)."""
    teacher: Fraction = 0.0
    """next_item: weight in 0..1 of the encoder's own distribution over items as a soft target (ours; paper: 0)."""
    target: str = "text"
    """review: the event's text field that is to be written."""
    rating: str = "rating"
    """review: the event's field that says how much the user liked it; written texts are checked against it."""
    liked: float = 4.0
    """genre_preference: an item with at least this rating is liked (ours)."""
    share: PositiveFraction = 0.25
    """genre_preference: at least this share of the liked items must carry a preferred genre (ours)."""
    history: PositiveInt = 200
    """genre_preference: latest events that decide, however many the model sees (ours)."""
    target_tokens: PositiveInt = 64
    """Free text: leading tokens of a target that are learned and whose likelihood is measured (ours)."""


class Task(ABC):  # noqa: B024 - what a closed and an open task must do has nothing in common
    """Something that is asked about a user at a point in time."""

    def __init__(self, name: str, config: TaskConfig):
        self.name = name
        self.config = config


class ClosedTask(Task):
    """A task whose answers are known beforehand. ``answers`` [N] are distinct texts."""

    tie_rule: str | None = None
    """Which answer is right where several are as good; None where there is never more than one."""

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
        super().__init__(name, config, distinct_titles(items["title"].to_list()))

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

    tie_rule = "of categories that are equally frequent the first in alphabetical order"

    def __init__(self, name: str, config: TaskConfig, items: pl.DataFrame):
        if config.field not in items.columns:
            raise UserError(
                f"task {name}: items have no field {config.field!r}; they have {', '.join(items.columns)}"
            )
        column = items[config.field]
        lists = column.to_list() if column.dtype == pl.List else [[v] for v in column.to_list()]
        values = sorted({v for row in lists for v in row or () if v is not None})
        if not values:
            raise UserError(f"task {name}: no item has a {config.field}; leave this task out")
        super().__init__(name, config, [answer_text(value) for value in values])
        number = {value: i for i, value in enumerate(values)}
        of_item = [sorted({number[value] for value in row or () if value is not None}) for row in lists]
        # the values of item i are _values[_starts[i]:_starts[i + 1]]: there may be thousands of each
        self._starts = np.concatenate([[0], np.cumsum([len(row) for row in of_item])]).astype(np.int64)
        self._values = np.array([value for row in of_item for value in row], dtype=np.int64)

    def targets(
        self, dataset: Dataset, users: np.ndarray, ends: np.ndarray, window: int | np.ndarray
    ) -> np.ndarray:
        """See the base class: the most frequent value among the latest ``window`` events before ``ends``."""
        seen = np.minimum(ends, window)
        blocks = [slice(start, start + EXAMPLES) for start in range(0, len(users), EXAMPLES)]
        found = [self._most_frequent(dataset, users[b], ends[b] - seen[b], seen[b]) for b in blocks]
        return np.concatenate([np.empty(0, dtype=np.int64), *found])

    def _most_frequent(
        self, dataset: Dataset, users: np.ndarray, starts: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        """The most frequent value [E] of each user's events ``starts:starts + lengths``, -1 where there is none."""
        items = dataset.events["item"][_stretches(dataset.offsets[users] + starts, lengths)]
        counts = self._starts[items + 1] - self._starts[items]
        values = self._values[_stretches(self._starts[items], counts)]
        example = np.repeat(np.repeat(np.arange(len(users)), lengths), counts)
        found, often = np.unique(example * len(self.answers) + values, return_counts=True)
        owner = found // len(self.answers)
        order = np.lexsort(
            (found, -often, owner)
        )  # of each example the most frequent first, of these the first
        best = order[np.flatnonzero(np.diff(owner[order], prepend=-1))]
        targets = np.full(len(users), -1)
        targets[owner[best]] = found[best] % len(self.answers)
        return targets


def answer_text(value: object) -> str:
    """How a value of an item field is written in an answer."""
    return value_text(value) if isinstance(value, float) else str(value)


def _stretches(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``starts[0], starts[0] + 1, ...``, ``lengths[0]`` numbers, then those from ``starts[1]`` on, and so on."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
