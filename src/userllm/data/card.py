"""card.json: what a prepared dataset is, where it came from, and what became of every row that was read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from userllm.errors import UserError

FORMAT_VERSION = 2
TIE_RULE = "events of one user at one time keep the order of the source's rows"


@dataclass(frozen=True)
class FieldSpec:
    """A declared feature: known per event (rating) or per item (genres); one value, several, or text."""

    name: str
    level: Literal["event", "item"]
    kind: Literal["single", "multi", "text"]


@dataclass(frozen=True)
class Source:
    """Where the raw data came from: kind ("movielens"), place, file and its sha256, and which source served it.

    parts: sha256 of each file where they are several.
    """

    kind: str
    where: str
    file: str
    sha256: str
    served_by: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows that were read: ``read = kept + rejected + sum(filtered)``, always.

    rejected: bad rows that were left out on request. filtered: rows that each filter took, by what it says.
    """

    read: int
    kept: int
    rejected: int = 0
    filtered: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.read != self.kept + self.rejected + sum(self.filtered.values()):
            raise ValueError(f"rows do not add up: {self}")

    def __add__(self, other: RowCounts) -> RowCounts:
        rules = dict.fromkeys([*self.filtered, *other.filtered])
        filtered = {rule: self.filtered.get(rule, 0) + other.filtered.get(rule, 0) for rule in rules}
        return RowCounts(
            self.read + other.read, self.kept + other.kept, self.rejected + other.rejected, filtered
        )

    def __str__(self) -> str:
        taken = [f"{count:,} by {rule}" for rule, count in self.filtered.items()]
        filtered = f" ({', '.join(taken)})" if taken else ""
        return (
            f"{self.read:,} read = {self.kept:,} kept + {self.rejected:,} rejected + "
            f"{sum(self.filtered.values()):,} filtered{filtered}"
        )


@dataclass(frozen=True)
class DatasetCard:
    """What card.json says. ``time_span``: first and last event, seconds since 1970. Counts are of the prepared data.

    files: the folder of the data beside card.json. time: how the times were read. recipe: the settings of
    ``prepare table``, which ``append`` reads new rows with; None of other sources. notes: what else has to be known of
    the data, each a sentence. catalogue: sha256 of the item table, of which the fingerprint knows titles alone; None
    of datasets that an older userllm made.
    """

    format_version: int
    name: str
    source: Source
    users: int
    items: int
    events: int
    time_span: tuple[int, int]
    tie_rule: str
    fields: tuple[FieldSpec, ...]
    fingerprint: str
    filters: tuple[str, ...]
    created_by: str
    files: str
    rows: RowCounts
    time: str
    recipe: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    catalogue: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: Path) -> DatasetCard:
        """Raises UserError where the text is no card of a format that is read (2, and 1 of userllm 0.1)."""
        try:
            raw: dict[str, Any] = json.loads(text)
            if raw["format_version"] not in (1, FORMAT_VERSION):
                raise UserError(
                    f"{where}: format_version is {raw['format_version']}, this userllm reads 1 and {FORMAT_VERSION}; "
                    "prepare the dataset again"
                )
            if raw["format_version"] == 1:
                raw |= {"files": ".", "time": "seconds since 1970"}
                raw["rows"] = {"read": raw["events"], "kept": raw["events"]}
            raw["source"] = Source(**raw["source"] | {"parts": tuple(raw["source"].get("parts", ()))})
            raw["time_span"] = tuple(raw["time_span"])
            raw["fields"] = tuple(FieldSpec(**spec) for spec in raw["fields"])
            raw["filters"] = tuple(raw["filters"])
            raw["notes"] = tuple(raw.get("notes", ()))
            raw["rows"] = RowCounts(**raw["rows"])
            return cls(**raw)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: not a dataset card ({error}); prepare the dataset again") from error
