"""Genre preference (UEM): which genres a user likes, several at once, written as text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import polars as pl

from userllm.data.store import Dataset
from userllm.errors import UserError
from userllm.tasks.base import OpenTask, TaskConfig, TextExample, answer_text

_SEPARATOR = re.compile(r"[,;\n]")


class GenrePreference(OpenTask):
    """The values of an item field that many of the items carry which the user rated well.

    The rule (ours: the paper prints none). Of the user's latest ``history`` events those with a rating of at least
    ``liked`` are liked. A genre is preferred if at least a share ``share`` of the liked items carry it. The target
    names the preferred genres, those of most liked items first, ties in alphabetical order: "Comedy, Drama". The
    target is the same however many events the model sees, so histories of different length can be compared.
    Users without a liked item or a preferred genre are not asked.

    ``values`` [L]: the field's values in alphabetical order.
    """

    def __init__(self, name: str, config: TaskConfig, items: pl.DataFrame):
        super().__init__(name, config)
        if config.field not in items.columns:
            raise UserError(
                f"task {name}: items have no field {config.field!r}; they have {', '.join(items.columns)}"
            )
        if not 0 < config.share <= 1 or config.history < 1:
            raise UserError(f"task {name}: share is in 0..1 and above 0, history at least 1")
        column = items[config.field]
        lists = column.to_list() if column.dtype == pl.List else [[value] for value in column.to_list()]
        lists = [[answer_text(value) for value in row or () if value is not None] for row in lists]
        self.values = sorted({value for row in lists for value in row})
        for value in self.values:
            if _SEPARATOR.search(value) or value != value.strip().rstrip(".").strip():
                raise UserError(
                    f"task {name}: {config.field} has the value {value!r}; in a text, values are apart by commas, "
                    "semicolons or line ends and may end in a full stop: give this one another name"
                )
        self._number = {value.casefold(): number for number, value in enumerate(self.values)}
        self._has = np.zeros((len(lists), len(self.values)), dtype=np.int32)
        for row, names in enumerate(lists):
            for value in names:
                self._has[row, self._number[value.casefold()]] = 1

    def examples(
        self, dataset: Dataset, users: np.ndarray, ends: np.ndarray, window: int | np.ndarray
    ) -> list[TextExample | None]:
        """See the base class; the window does not matter."""
        if "rating" not in dataset.event_fields:
            raise UserError(f"task {self.name}: {dataset.folder} has no event field 'rating'")
        offsets, items, ratings = dataset.offsets, dataset.events["item"], dataset.events["rating"]
        asked: list[TextExample | None] = []
        for user, end in zip(users.tolist(), ends.tolist(), strict=True):
            stop = int(offsets[user]) + end
            seen = slice(max(int(offsets[user]), stop - self.config.history), stop)
            liked = self._has[items[seen][ratings[seen] >= self.config.liked]]
            target = self._target(liked.sum(0), len(liked))
            asked.append(TextExample(self.config.prompt, target) if target else None)
        return asked

    def _target(self, counts: np.ndarray, liked: int) -> str:
        preferred = np.flatnonzero((counts > 0) & (counts >= self.config.share * liked))
        return ", ".join(self.values[n] for n in preferred[np.argsort(-counts[preferred], kind="stable")])

    def read(self, text: str) -> tuple[np.ndarray, int]:
        """The values a text names, [L] bool, and how many of the things it names are none of them.

        Names are apart by commas, semicolons or line ends; case, white space and a full stop at the end do not matter.
        """
        named = np.zeros(len(self.values), dtype=bool)
        unknown = 0
        for name in _SEPARATOR.split(text):
            cleaned = name.strip().rstrip(".").strip().casefold()
            if cleaned in self._number:
                named[self._number[cleaned]] = True
            elif cleaned:
                unknown += 1
        return named, unknown

    def majority(self, targets: Sequence[str]) -> str:
        """The target that occurs most often; among equals the one that comes first in alphabetical order."""
        counts = Counter(targets)
        return min(counts, key=lambda text: (-counts[text], text))
