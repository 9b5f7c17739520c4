"""Writes a synthetic event log in the layout and shape of MovieLens-20M: ratings.csv, movies.csv. It is noise.

    python benchmarks/synthetic_log.py --out DIR                                         # 20,000,263 events
    python benchmarks/synthetic_log.py --out DIR --events 100000000 --users 692465       # five times that

What is MovieLens-20M's: the number of events, users and items, at least 20 events a user, item ids with holes, ratings
from 0.5 to 5, rows sorted by user but not by time, half of a user's times shared with another event. What is not:
everything else. A pair of user and item may come twice.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl

EVENTS, USERS, ITEMS = 20_000_263, 138_493, 27_278
LEAST = 20
BLOCK = 1 << 20
GENRES = ("Action", "Adventure", "Animation", "Comedy", "Crime", "Drama", "Romance", "Sci-Fi", "Thriller")


def history_lengths(events: int, users: int, random: np.random.Generator) -> np.ndarray:
    """Log-normal, at least ``LEAST`` each, ``events`` in all."""
    weights = random.lognormal(0, 1.4, users)
    extra = events - LEAST * users
    if extra < 0:
        raise SystemExit(f"{events} events are too few for {users} users with {LEAST} each")
    bounds = np.floor(np.cumsum(weights) / weights.sum() * extra).astype(np.int64)
    bounds[-1] = extra
    return LEAST + np.diff(bounds, prepend=0)


def write_log(folder: Path, events: int, users: int, items: int, seed: int = 0) -> None:
    """Streams the log into ``folder``; memory does not grow with ``events``."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    ids = np.sort(random.choice(np.arange(1, 5 * items), items, replace=False))
    kinds = [
        "|".join(random.choice(GENRES, random.integers(1, 4), replace=False).tolist()) for _ in range(items)
    ]
    titles = [f"Synthetic Film {number}, The ({1930 + number % 86})" for number in ids.tolist()]
    pl.DataFrame({"movieId": ids, "title": titles, "genres": kinds}).write_csv(folder / "movies.csv")
    lengths = history_lengths(events, users, random)
    popular = np.cumsum(1 / np.arange(1, items + 1) ** 0.8)
    order = random.permutation(items)
    with open(folder / "ratings.csv", "wb") as file:
        file.write(b"userId,movieId,rating,timestamp\n")
        ends = np.cumsum(lengths)
        for start in range(0, events, BLOCK):
            stop = min(start + BLOCK, events)
            user = np.searchsorted(ends, np.arange(start, stop), side="right")
            drawn = np.searchsorted(popular, random.random(stop - start) * popular[-1])
            begun = 789_652_009 + (user * 2_654_435_761) % 600_000_000
            frame = pl.DataFrame(
                {
                    "userId": user + 1,
                    "movieId": ids[order[drawn]],
                    "rating": random.integers(1, 11, stop - start) / 2,
                    "timestamp": begun + random.integers(0, 2 * LEAST, stop - start) * 60,
                }
            )
            frame.write_csv(file, include_header=False)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--events", type=int, default=EVENTS)
    parser.add_argument("--users", type=int, default=USERS)
    parser.add_argument("--items", type=int, default=ITEMS)
    args = parser.parse_args()
    write_log(args.out, args.events, args.users, args.items)


if __name__ == "__main__":
    main()
