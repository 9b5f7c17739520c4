"""Datasets that userllm prepares by name."""

from __future__ import annotations

from pathlib import Path

from userllm.data.sources import rent_the_runway
from userllm.data.sources.movielens import prepare_movielens
from userllm.data.store import Dataset
from userllm.errors import UserError


def prepare(
    name: str, path: Path | None, out: Path, memory: int = 2**31, descriptions: Path | None = None
) -> Dataset:
    """The dataset called ``name`` in ``out``, from ``path``, or from where userllm finds it.

    memory: about so many bytes (Rent the Runway is small and read whole). descriptions: of MovieLens movies, see
    ``descriptions.py``.

    Raises UserError for a name without a copy of its own where ``path`` is None, and for anything wrong with the copy.
    """
    if name == rent_the_runway.NAME:
        if descriptions is not None:
            raise UserError(f"descriptions are of MovieLens movies; {name} has none of those")
        return rent_the_runway.prepare_rent_the_runway(path, out)
    return prepare_movielens(path, out, None if name == "movielens" else name, memory, descriptions)
