"""The event field that follows from an event's text: how long it is. A user encoder reads no text, but this it does."""

from __future__ import annotations

import numpy as np
import polars as pl

LENGTH = "length"
"""The field's name."""


def text_lengths(texts: pl.Series) -> pl.Series:
    """Words of each text, as the least number in a bucket; the buckets begin at 0, 1, 2, 3, 4, 6, 8, 12, 16, 23, ...

    The least of a bucket is a power of the square root of 2, rounded up.

    >>> text_lengths(pl.Series(["", "It fits.", "so so so so so"])).to_list()
    [0.0, 2.0, 4.0]
    """
    words = texts.str.count_matches(r"\S+").to_numpy()
    steps = np.floor(2 * np.log2(np.maximum(words, 1)) + 1e-9)
    return pl.Series(LENGTH, np.where(words > 0, np.ceil(2 ** (steps / 2) - 1e-9), 0), dtype=pl.Float32)
