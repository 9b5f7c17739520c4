"""Datasets that userllm prepares by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from userllm.data.build import bytes_of
from userllm.data.sources import amazon, google_local, rent_the_runway
from userllm.data.sources.movielens import prepare_movielens
from userllm.data.sources.reviews import prepare_reviews
from userllm.data.sources.reviews_config import ReviewsConfig
from userllm.data.store import Dataset
from userllm.errors import UserError

REVIEWS = {publisher.name: publisher for publisher in (amazon.AMAZON, google_local.GOOGLE_LOCAL)}
"""Publishers of reviews, by the name of their sets; they are read with ``ReviewsConfig``."""


def prepare(
    name: str,
    paths: Sequence[str],
    out: Path,
    *,
    memory: str = "2GiB",
    descriptions: Path | None = None,
    reviews: ReviewsConfig | None = None,
) -> Dataset:
    """The dataset called ``name`` in ``out``, from ``paths``, or from where userllm finds it if there are none.

    memory: about so much (Rent the Runway is small and read whole; of Amazon and Google Local ``reviews`` says it).
    descriptions: of MovieLens movies, see ``descriptions.py``. reviews: what is kept of Amazon and Google Local.

    Raises UserError for a name without a copy of its own where there are no paths, for settings of another set, and for
    anything wrong with the copy.
    """
    if descriptions is not None and (name in REVIEWS or name == rent_the_runway.NAME):
        raise UserError(f"descriptions are of MovieLens movies; {name} has none of those")
    if reviews is not None and name not in REVIEWS:
        raise UserError(f"settings of reviews are for {' and '.join(REVIEWS)}, not for {name}")
    if name in REVIEWS:
        if not paths:
            raise UserError(
                f"{name} is not found by itself; give your copy with --path (of a run: data.path), files or a folder"
            )
        return prepare_reviews(REVIEWS[name], paths, out, reviews or ReviewsConfig())
    if len(paths) > 1:
        raise UserError(f"--path: {name} is one folder or file, {len(paths)} were given")
    path = Path(paths[0]) if paths else None
    if name == rent_the_runway.NAME:
        return rent_the_runway.prepare_rent_the_runway(path, out)
    return prepare_movielens(path, out, None if name == "movielens" else name, bytes_of(memory), descriptions)
