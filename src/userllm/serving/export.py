"""User embeddings of a store as one Parquet file, for other systems."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from userllm.errors import UserError
from userllm.serving.store import UserStore
from userllm.whole_file import whole

USERS = 4096
"""Users held in memory at once."""


def export_embeddings(store: UserStore, file: Path, every: bool = False) -> int:
    """Write the users of a store, sorted by id; returns the rows.

    One row per user (``user``, ``events``, ``embedding``): the last user embedding, which of a causal encoder knows the
    whole history as far as the encoder sees it; null for a user without events. every: one row per embedding kept,
    those of the latest ``fusion.events`` events; ``back`` counts from the last, 0. Floats are float32. The file
    appears whole. Raises UserError where it cannot be written.
    """
    users = sorted(store)
    rows = 0
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with (
            whole(file) as partial,
            tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as scratch,
        ):
            for start in range(0, max(1, len(users)), USERS):
                frame = _frame(store, users[start : start + USERS], every)
                frame.write_parquet(Path(scratch) / f"{start:012d}.parquet")
                rows += len(frame)
            pl.scan_parquet(sorted(Path(scratch).iterdir()), glob=False).sink_parquet(partial)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{file}: cannot be written ({error})") from error
    return rows


def _frame(store: UserStore, users: list[str], every: bool) -> pl.DataFrame:
    names, events, back, vectors = [], [], [], []
    width = 0
    for user in users:
        own = store.column(user, "embeddings").float().numpy()
        width, count = own.shape[1], int(store.column(user, "events"))
        kept = own if every else own[-1:]
        names += [user] * max(len(kept), not every)
        events += [count] * max(len(kept), not every)
        back += range(len(kept) - 1, -1, -1)
        vectors += [*kept] if len(kept) or every else [None]
    columns: dict[str, pl.Series] = {
        "user": pl.Series(names, dtype=pl.String),
        "events": pl.Series(events, dtype=pl.Int64),
    }
    if every:
        columns["back"] = pl.Series(back, dtype=pl.Int32)
    if all(vector is not None for vector in vectors) and vectors:
        columns["embedding"] = pl.Series(np.stack(vectors))
    else:
        values = [None if vector is None else vector.tolist() for vector in vectors]
        columns["embedding"] = pl.Series(values, dtype=pl.Array(pl.Float32, width))
    return pl.DataFrame(columns)
