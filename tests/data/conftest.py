"""One tiny release written by hand in every format MovieLens came in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from userllm.data import Dataset, Source, write_dataset
from userllm.data.sources.movielens import FIELDS, GENRES_100K

MOVIES = [  # id, title without year, last bracket, genres
    (1, "Toy Story", "1995", ["Animation", "Children's", "Comedy"]),
    (2, "Misérables, Les", "1995", ["Drama", "Film-Noir"]),
    (7, 'City "of" Lost Children, The', "1995", ["Adventure", "Sci-Fi"]),
    (9, "Land Before Time III: The Great Giving (1995)", "V", ["Animation", "Children's"]),
    (12, "Seven: (Se7en)", "1996", []),
]
RATINGS = [  # user, item, rating, time; users 30 and 4 have events at one time
    (30, 7, 4, 1000),
    (4, 1, 5, 2000),
    (30, 2, 3, 1000),
    (30, 1, 1, 900),
    (4, 9, 2, 2000),
    (4, 2, 4, 2000),
    (30, 9, 5, 1000),
]


def write_100k(folder: Path) -> None:
    lines = []
    for number, title, year, genres in MOVIES:
        flags = "|".join("1" if genre in (genres or ["unknown"]) else "0" for genre in GENRES_100K)
        lines.append(f"{number}|{title} ({year})|01-Jan-1995||http://us.imdb.com/M|{flags}\n")
    (folder / "u.item").write_bytes("".join(lines).encode("latin-1"))
    (folder / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in RATINGS))


def write_dat(folder: Path) -> None:
    movies = (f"{n}::{t} ({y})::{'|'.join(g) or '(no genres listed)'}\n" for n, t, y, g in MOVIES)
    (folder / "movies.dat").write_bytes("".join(movies).encode("latin-1"))
    (folder / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in RATINGS))
    (folder / "users.dat").write_text("4::M::25::3::12345\n30::F::1::10::48067\n")


def write_csv(folder: Path) -> None:
    rows = []
    for number, title, year, genres in MOVIES:
        name = f"{title} ({year})".replace('"', '""')
        rows.append(f'{number},"{name}",{"|".join(genres) or "(no genres listed)"}\r\n')
    (folder / "movies.csv").write_bytes(("movieId,title,genres\r\n" + "".join(rows)).encode())
    ratings = "".join(f"{u},{i},{r:.1f},{t}\r\n" for u, i, r, t in RATINGS)
    (folder / "ratings.csv").write_bytes(("userId,movieId,rating,timestamp\r\n" + ratings).encode())


def write_recbole_100k(folder: Path) -> None:
    movies = (f"{n}\t{t}\t{y}\t{' '.join(g) or 'unknown'}\n" for n, t, y, g in MOVIES)
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    (folder / "ml-100k.item").write_text(header + "".join(movies), encoding="utf-8")
    ratings = "".join("\t".join(map(str, row)) + "\n" for row in RATINGS)
    (folder / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + ratings
    )


def write_recbole_1m(folder: Path) -> None:
    name = {n: f"{t} ({y})" for n, t, y, _ in MOVIES}
    movies = (f"{name[n]}\t{t}\t{y}\t{' '.join(g) or '(no genres listed)'}\r\n" for n, t, y, g in MOVIES)
    header = "item_id:token\tmovie_title:token\trelease_year:float\tgenre:token\r\n"
    (folder / "ml-1m.item").write_bytes((header + "".join(movies)).encode())
    ratings = "".join(f"1m_{u}\t{name[i]}\t{r}\t{t}.0\r\n" for u, i, r, t in RATINGS)
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\r\n"
    (folder / "ml-1m.inter").write_bytes((header + ratings).encode())


FORMATS: dict[str, Callable[[Path], None]] = {
    "100k": write_100k,
    "dat": write_dat,
    "csv": write_csv,
    "recbole-100k": write_recbole_100k,
    "recbole-1m": write_recbole_1m,
}


@pytest.fixture(params=FORMATS)
def any_release(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with the tiny release, in each format in turn."""
    folder = tmp_path / "raw"
    folder.mkdir()
    FORMATS[request.param](folder)
    return folder


@pytest.fixture
def release(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the tiny release in a named format, returns its folder."""

    def write(name: str) -> Path:
        folder = tmp_path / f"raw-{name}"
        folder.mkdir()
        FORMATS[name](folder)
        return folder

    return write


def dataset_of_lengths(folder: Path, lengths: list[int], items: int = 30) -> Dataset:
    """A dataset whose user u has ``lengths[u]`` events; event k of a user has time k // 2 (ties) and item by chance."""
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(n) for n in lengths])
    events = pl.DataFrame(
        {
            "user": user,
            "item": random.integers(0, items, len(user)),
            "time": 1_000_000 + step // 2,
            "rating": random.integers(1, 11, len(user)) / 2,
        }
    )
    catalogue = pl.DataFrame(
        {
            "id": [f"i{n}" for n in range(items)],
            "title": [f"Film {n} ({1970 + n})" for n in range(items)],
            "genres": [[f"g{n % 4}", f"g{n % 3}x"][: n % 3] for n in range(items)],
            "year": [1970 + n if n else None for n in range(items)],
        }
    )
    users = pl.DataFrame({"id": [f"u{n}" for n in range(len(lengths))]})
    source = Source("made", "a test", "none", "0" * 64, "path")
    return write_dataset(folder, events, catalogue, users, name="made", source=source, fields=FIELDS)


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Dataset]:
    """Writes a dataset with given history lengths."""
    return lambda lengths, name="made": dataset_of_lengths(tmp_path / name, lengths)
