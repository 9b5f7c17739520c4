"""The settings of published reviews: what is kept, which items the catalogue holds, which side of a translation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from userllm.data.sources.event_filters import EventFilters

RATING = "rating"
Translated = Literal["both", "translation", "original"]


@dataclass
class ReviewsConfig(EventFilters):
    """How the reviews of Amazon and Google Local are read; their fields are rating, length and texts."""

    catalogue: Literal["reviewed", "all"] = "reviewed"
    """Items of the catalogue: those of the reviews, or all that the metadata names (as the paper counts them)."""
    translated: Translated = "both"
    """google-local: of a text that Google translated keep both sides as they stand, the translation or the original."""

    def __post_init__(self) -> None:
        """Raise UserError for settings that cannot be."""
        self.check([RATING])
