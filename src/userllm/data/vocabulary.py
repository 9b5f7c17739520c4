"""Values of a field as numbers. In every vocabulary id 0 is padding and id 1 an unknown value; values start at 2."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from userllm.data.store import Dataset
from userllm.errors import UserError
from userllm.whole_file import write_text

PADDING = 0
UNKNOWN = 1
FIRST_VALUE = 2

TIME_GAP = "time_gap"
"""A field that every dataset has without declaring it: see ``time_gaps``."""


def value_text(value: float | str | int) -> str:
    """How a value is spelt in a vocabulary: a number by the fewest digits that tell it from every other float32, which
    is what datasets hold, and without a trailing ".0" ("0.5", "4", "1234567"); text as it is."""
    if isinstance(value, str):
        return value
    try:
        return np.format_float_positional(np.float32(value), trim="-")
    except OverflowError:  # a whole number of hundreds of digits
        return str(float("inf") if value > 0 else -float("inf"))


@dataclass(frozen=True)
class FieldVocabulary:
    """The values of one field, in order: ``values[j]`` has id j + 2.

    level: "event" where each event has its own value (item, rating), "item" where it follows from the item (genres),
    "time" where it follows from the times of the user's events (time_gap).
    """

    name: str
    kind: Literal["single", "multi"]
    values: list[str]
    level: Literal["event", "item", "time"] = "event"

    @property
    def size(self) -> int:
        """Number of ids, padding and unknown included."""
        return len(self.values) + FIRST_VALUE

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {value: number for number, value in enumerate(self.values, FIRST_VALUE)}

    def id_of(self, value: float | str) -> int:
        """The value's id, 1 where it is unknown."""
        return self._ids.get(value_text(value), UNKNOWN)

    def ids_of(self, values: Iterable[float | str]) -> np.ndarray:
        """Ids of many values, int64."""
        return np.array([self.id_of(value) for value in values], dtype=np.int64)

    def value_of(self, number: int) -> str:
        """The value with an id. Raises IndexError for padding, unknown and numbers out of range."""
        if number < FIRST_VALUE:
            raise IndexError(f"id {number} of field {self.name!r} names no value")
        return self.values[number - FIRST_VALUE]


class Vocabulary:
    """Field vocabularies in order, the item first. Item values are raw ids in row order of items.parquet."""

    def __init__(self, fields: Sequence[FieldVocabulary]):
        self.fields = list(fields)
        self._by_name = {field.name: field for field in self.fields}

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, fields: Sequence[str] = ("item", "rating", "genres")
    ) -> Vocabulary:
        """Vocabularies of the named fields: declared ones, and "time_gap". Raises UserError for others and for text."""
        return cls([_field_vocabulary(dataset, name) for name in fields])

    def __getitem__(self, name: str) -> FieldVocabulary:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[FieldVocabulary]:
        return iter(self.fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.fields == other.fields

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        raw = [{"name": f.name, "kind": f.kind, "level": f.level, "values": f.values} for f in self.fields]
        write_text(path, json.dumps({"fields": raw}, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Raises UserError where the file is missing or holds no vocabulary."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            return cls([FieldVocabulary(**field) for field in raw["fields"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a vocabulary ({error}); pretrain the encoder again") from error


def time_gap_vocabulary() -> FieldVocabulary:
    """Its values: "first" for a user's first event, then buckets called by their least gap in s: 0, 1, 2, 4, ..."""
    return FieldVocabulary(TIME_GAP, "single", ["first", "0", *(str(2**n) for n in range(31))], "time")


def _field_vocabulary(dataset: Dataset, name: str) -> FieldVocabulary:
    specs = {spec.name: spec for spec in dataset.card.fields}
    if name == TIME_GAP and name not in specs:
        return time_gap_vocabulary()
    if name not in specs:
        raise UserError(
            f"{dataset.folder}: no field {name!r}; declared fields are {', '.join(specs)}, and {TIME_GAP} follows from "
            "the times"
        )
    spec = specs[name]
    if spec.kind == "text":
        raise UserError(
            f"{dataset.folder}: field {name!r} is text and has no vocabulary; leave it out of the fields"
        )
    if name == "item":
        values = dataset.item_ids
    elif spec.level == "event":
        values = [value_text(value) for value in dataset.distinct_values(name).tolist()]
    else:
        column = dataset.items[name]
        found = (column.explode() if spec.kind == "multi" else column).drop_nulls().unique().sort()
        values = [value_text(value) for value in found.to_list()]
    return FieldVocabulary(name, spec.kind, values, spec.level)
