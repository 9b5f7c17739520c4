"""MovieLens in every format it was published in (Harper and Konstan 2015), from a folder or a zip.

100K: u.data, u.item. 1M and 10M: ratings.dat, movies.dat. 20M, 25M, 32M and latest: ratings.csv, movies.csv.
RecBole's copies: NAME.inter, NAME.item. All give the same dataset for the same release: users are numbered by first
appearance, titles carry their year, and the fingerprint does not depend on the style of ids.
"""

from __future__ import annotations

import csv
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path, PurePosixPath

import polars as pl

from userllm.data.build import DatasetBuilder, block_of
from userllm.data.in_turn import aside
from userllm.data.numbering import ItemNumbers, Numbering
from userllm.data.sources.delimited import ColumnType, SourceFile, line_of_row, read_log
from userllm.data.sources.descriptions import with_descriptions
from userllm.data.sources.fetch import sha256_of
from userllm.data.sources.list_column import list_column
from userllm.data.sources.releases import find_release
from userllm.data.store import Dataset, FieldSpec, Source, check_writable
from userllm.errors import UserError

FIELDS = (
    FieldSpec("item", "event", "single"),
    FieldSpec("rating", "event", "single"),
    FieldSpec("genres", "item", "multi"),
    FieldSpec("year", "item", "single"),
    FieldSpec("title", "item", "text"),
)
DESCRIPTION = FieldSpec("description", "item", "text")
GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *(
        "Fantasy",
        "Film-Noir",
        "Horror",
        "Musical",
        "Mystery",
        "Romance",
        "Sci-Fi",
        "Thriller",
        "War",
        "Western",
    ),
)
"""The genre flags of u.item, in order."""
NO_GENRES = ("(no genres listed)", "unknown", "")
YEAR = re.compile(r"\((\d{4})(?:[-–]\d{0,4})?\)")


@dataclass(frozen=True)
class Movie:
    """A line of a catalogue."""

    line: int
    id: str
    title: str
    genres: list[str]


@dataclass(frozen=True)
class Layout:
    """How a release is laid out.

    ratings, items: file names, or endings where they start with a dot. columns: user, item, rating and time columns, in
    that order. header: all columns of a ratings file without a header line. movies: reads the catalogue.
    """

    ratings: str
    items: str
    separator: str
    columns: Mapping[str, ColumnType]
    header: tuple[str, ...] | None
    movies: Callable[[SourceFile], Iterator[Movie]]


def prepare_movielens(
    path: Path | None,
    out: Path,
    release: str | None = None,
    memory: int = 2**31,
    descriptions: Path | None = None,
) -> Dataset:
    """Prepare a MovieLens release as a dataset in ``out``, with about ``memory`` bytes of memory.

    path: a folder or zip with a copy of any release; None finds ``release`` ("movielens-100k" or "-1m") by itself.
    descriptions: a CSV file with movieId and overview, which becomes the movies' field ``description``.
    Raises UserError for anything wrong with the copy, naming file and line.
    """
    check_writable(out)
    source = None
    if path is None:
        found = find_release(release)
        path, source = found.path, Source("movielens", found.where, found.file, found.sha256, found.served_by)
    fields = FIELDS if descriptions is None else (*FIELDS, DESCRIPTION)
    with (
        DatasetBuilder(out, fields, memory=memory) as builder,
        opened(path, scratch=builder.scratch) as (layout, ratings, movies),
    ):
        file = path if path.is_file() else ratings.path
        digest = aside(lambda: sha256_of(file)) if source is None else None
        items = read_movies(layout, movies)
        if descriptions is not None:
            if layout.items == "u.item" or release == "movielens-100k" or movies.path.name == "ml-100k.item":
                raise UserError(
                    f"{descriptions}: MovieLens-100K has numbers of its own, by which these descriptions would go to "
                    "other movies; leave them out, or take another release"
                )
            items = with_descriptions(items, descriptions)
        builder.add_items(items)
        for events in read_ratings(layout, ratings, items, movies.label, builder.users, block_of(memory)):
            builder.add_numbered(events)
        if builder.counts.read == 0:
            raise UserError(f"{ratings.label}: holds no events; a dataset needs at least one")
        if source is None:
            assert digest is not None
            source = Source("movielens", str(path), file.name, digest(), "path")
        builder.finish(name=release or "movielens", source=source, time="seconds since 1970")
    return Dataset.open(out)


@contextmanager
def opened(path: Path, scratch: Path) -> Iterator[tuple[Layout, SourceFile, SourceFile]]:
    """The layout of a release with its ratings and catalogue files; members of a zip are unpacked under ``scratch``."""
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if file.is_file()]
        layout, ratings, movies = match_layout(path, names)
        yield (
            layout,
            SourceFile(path / ratings, str(path / ratings)),
            SourceFile(path / movies, str(path / movies)),
        )
    elif not path.is_file():
        raise UserError(f"{path}: no such folder or zip; give the folder or zip of a MovieLens release")
    elif not zipfile.is_zipfile(path) and path.suffix != ".zip":
        raise UserError(
            f"{path}: neither a folder nor a zip; give the folder that holds it, or the release's zip"
        )
    else:
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".unzipped.") as folder:
            try:
                with zipfile.ZipFile(path) as archive:
                    layout, ratings, movies = match_layout(path, archive.namelist())
                    ratings_file = _unpacked(archive, ratings, Path(folder), path)
                    movies_file = _unpacked(archive, movies, Path(folder), path)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise UserError(f"{path}: truncated or damaged zip ({error}); download it again") from error
            yield layout, ratings_file, movies_file


def _unpacked(archive: zipfile.ZipFile, member: str, folder: Path, path: Path) -> SourceFile:
    target = folder / PurePosixPath(member).name
    with archive.open(member) as source, open(target, "wb") as file:
        while block := source.read(1 << 22):
            file.write(block)
    return SourceFile(target, f"{path}: {member}")


def match_layout(path: Path, names: list[str]) -> tuple[Layout, str, str]:
    """The layout of the files, and the names of ratings and catalogue: of those that lie in one folder the least deeply
    nested. Raises UserError where no such pair is there, and where several are.
    """
    half: str | None = None
    found: list[tuple[Layout, str, str]] = []
    for layout in LAYOUTS:
        ratings, movies = _named(layout.ratings, names), _named(layout.items, names)
        found += [(layout, ratings[place], movies[place]) for place in ratings if place in movies]
        if half is None and (ratings or movies):
            there = min((ratings or movies).values(), key=_depth)
            half = f"{there} is there, {layout.items if ratings else layout.ratings} is missing"
    if found:
        least = min(_depth(ratings) for _, ratings, _ in found)
        fits = [one for one in found if _depth(one[1]) == least]
        if len(fits) > 1:
            several = " and ".join(ratings for _, ratings, _ in fits)
            raise UserError(f"{path}: several releases in it, with {several}; give one alone")
        return fits[0]
    if half:
        raise UserError(f"{path}: {half}; give a complete copy of the release, in one folder")
    pairs = ", ".join(f"{layout.ratings} with {layout.items}" for layout in LAYOUTS)
    raise UserError(f"{path}: no MovieLens release in it; expected {pairs}")


def _named(wanted: str, names: list[str]) -> dict[str, str]:
    """The files with this name by their folder; where it is an ending, which starts with a dot, by all before that."""
    found = {}
    for name in names:
        base = PurePosixPath(name).name
        if base and base[0] != "." and (base.endswith(wanted) if wanted[0] == "." else base == wanted):
            found[name.removesuffix(wanted)] = name
    return found


def _depth(name: str) -> int:
    return name.count("/")


def read_movies(layout: Layout, file: SourceFile) -> pl.DataFrame:
    """The catalogue: id, title, genres, year. Raises UserError where it is empty or an id or title is missing."""
    movies = list(layout.movies(file))
    if not movies:
        raise UserError(f"{file.label}: the catalogue is empty; give a complete copy of the release")
    seen: dict[str, int] = {}
    for movie in movies:
        if not movie.id or not movie.title:
            raise file.bad_line(movie.line, f"the {'title' if movie.id else 'id'} is missing")
        if "integer" in layout.columns.values() and not movie.id.isdecimal():
            raise file.bad_line(movie.line, f"the id is {movie.id!r}, not a whole number")
        if movie.id in seen:
            raise file.bad_line(movie.line, f"item {movie.id} is already on line {seen[movie.id]}")
        seen[movie.id] = movie.line
    years = [YEAR.findall(movie.title) for movie in movies]
    return pl.DataFrame(
        {
            "id": [movie.id for movie in movies],
            "title": [movie.title for movie in movies],
            "genres": list_column(
                "genres",
                [[one for one in dict.fromkeys(movie.genres) if one not in NO_GENRES] for movie in movies],
            ),
            "year": [int(found[-1]) if found else None for found in years],
        },
        schema={"id": pl.String, "title": pl.String, "genres": pl.List(pl.String), "year": pl.Int32},
    )


def read_ratings(
    layout: Layout, file: SourceFile, items: pl.DataFrame, catalogue: str, users: Numbering, size: int
) -> Iterator[pl.DataFrame]:
    """Batches of events (user, item, rating, time) in file order; users are numbered by first appearance."""
    # ids are compared as numbers: as text it would take longer
    ids = items["id"].cast(pl.Int64) if "integer" in layout.columns.values() else items["id"]
    number_of = ItemNumbers(ids)
    before = 0
    for log in read_log(file, layout.separator, layout.columns, layout.header, size):
        log = log.rename(dict(zip(layout.columns, ("user", "item", "rating", "time"), strict=True)))
        item = number_of(log["item"])
        if (unknown := item < 0).any():
            row = int(unknown.argmax())
            line = line_of_row(file, before + row, layout.header is None)
            raise file.bad_line(line, f"item {log['item'][row]} is not in the catalogue {catalogue}")
        before += len(log)
        yield log.select(
            pl.Series("user", users.numbers(log["user"])),
            pl.Series("item", item),
            pl.col("time").cast(pl.Int64),
            pl.col("rating").cast(pl.Float32),
        )


def _movies_100k(file: SourceFile) -> Iterator[Movie]:
    """id | title | release date | video release date | IMDb URL | 19 genre flags."""
    for number, line in file.lines():
        fields = line.split("|")
        if len(fields) != 5 + len(GENRES_100K):
            raise file.bad_line(number, f"{len(fields)} fields, expected {5 + len(GENRES_100K)}")
        genres = [genre for genre, flag in zip(GENRES_100K, fields[5:], strict=True) if flag.strip() == "1"]
        yield Movie(number, fields[0].strip(), fields[1].strip(), genres)


def _movies_dat(file: SourceFile) -> Iterator[Movie]:
    """id::title::genre|genre."""
    for number, line in file.lines():
        fields = line.split("::")
        if len(fields) != 3:
            raise file.bad_line(number, f"{len(fields)} fields, expected 3 (MovieID, Title, Genres)")
        yield Movie(number, fields[0].strip(), fields[1].strip(), fields[2].strip().split("|"))


def _movies_csv(file: SourceFile) -> Iterator[Movie]:
    """movieId,title,genres; titles with commas are quoted."""
    reader = csv.reader(StringIO(file.text(), newline=""), strict=True)
    try:
        names = next(reader, [])
        if missing := [name for name in ("movieId", "title", "genres") if name not in names]:
            raise UserError(
                f"{file.label} line 1: no column {', '.join(missing)}; give a complete copy of the release"
            )
        number, title, genres = (names.index(name) for name in ("movieId", "title", "genres"))
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(names):
                problem = f"{len(fields)} fields, expected {len(names)} ({', '.join(names)})"
                raise file.bad_line(reader.line_num, problem)
            yield Movie(
                reader.line_num,
                fields[number].strip(),
                fields[title].strip(),
                fields[genres].strip().split("|"),
            )
    except csv.Error as error:
        raise file.bad_line(reader.line_num, f"not CSV ({error})") from error


def _movies_recbole(file: SourceFile) -> Iterator[Movie]:
    """Tab-separated with a typed header; the year in a column of its own; genres apart by spaces.

    RecBole cut the last bracket off every title, whatever it held ("(V)"), and spells a missing one "unkonwn".
    """
    names: list[str] | None = None
    for number, line in file.lines():
        fields = line.split("\t")
        if names is None:
            names = [name.split(":")[0].strip() for name in fields]
            if missing := [name for name in ("item_id", "movie_title") if name not in names]:
                raise UserError(
                    f"{file.label} line {number}: no column {', '.join(missing)}; the header is not RecBole's"
                )
            continue
        if len(fields) != len(names):
            raise file.bad_line(number, f"{len(fields)} fields, expected {len(names)} ({', '.join(names)})")
        row = dict(zip(names, (field.strip() for field in fields), strict=True))
        title = row["movie_title"].replace("unkonwn", "unknown")
        year = row.get("release_year", "").removesuffix(".0")
        if title and year not in ("", "unkonwn") and not title.endswith(f"({year})"):
            title = f"{title} ({year})"
        genres = row.get("genre", row.get("genres", row.get("class", "")))
        yield Movie(number, row["item_id"], title, [] if genres == NO_GENRES[0] else genres.split())


INTEGER_IDS: dict[str, ColumnType] = {
    "user": "integer",
    "item": "integer",
    "rating": "number",
    "timestamp": "integer",
}
CSV_COLUMNS: dict[str, ColumnType] = {
    "userId": "integer",
    "movieId": "integer",
    "rating": "number",
    "timestamp": "integer",
}
RECBOLE_COLUMNS: dict[str, ColumnType] = {
    "user_id": "text",
    "item_id": "text",
    "rating": "number",
    "timestamp": "number",
}
LAYOUTS = (
    Layout("u.data", "u.item", "\t", INTEGER_IDS, tuple(INTEGER_IDS), _movies_100k),
    Layout("ratings.dat", "movies.dat", "::", INTEGER_IDS, tuple(INTEGER_IDS), _movies_dat),
    Layout("ratings.csv", "movies.csv", ",", CSV_COLUMNS, None, _movies_csv),
    Layout(".inter", ".item", "\t", RECBOLE_COLUMNS, None, _movies_recbole),
)
