"""A dataset that grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl
import pytest

from userllm.data.sources.movielens import FIELDS
from userllm.data.store import Dataset, Source, write_dataset


@pytest.fixture
def cut(dataset: Dataset, catalogue: pl.DataFrame, tmp_path: Path) -> Callable[..., Dataset]:
    """The small dataset with fewer events of some users: by user number, how many of their first are there.

    moved: users whose first event is of another item.
    """

    def make(
        lengths: Mapping[int, int] | None = None, moved: tuple[int, ...] = (), name: str = "small"
    ) -> Dataset:
        rows = [
            (
                user,
                (int(event.item[1:]) + (n == 0 and user in moved)) % 20,
                event.time,
                event.fields["rating"],
            )
            for user in range(dataset.num_users)
            for n, event in enumerate(dataset.history(user, 0, (lengths or {}).get(user)).events)
        ]
        return write_dataset(
            tmp_path / "dataset",
            pl.DataFrame(rows, schema=["user", "item", "time", "rating"], orient="row"),
            catalogue,
            pl.DataFrame({"id": dataset.user_ids}),
            name=name,
            source=Source("made", "a test", "none", "0" * 64, "path"),
            fields=FIELDS,
        )

    return make
