"""Published reviews -> a dataset: what Amazon's and Google Local's sets have in common.

An event is a review: user, item, time, rating, how long its text is, and its texts. Users are known by their ids; their
names are never read. Reviews stream through as a table's rows do, with the same filters, bad rows and memory; then the
metadata of their items is looked up. An item without a title is shown by its category and id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from userllm.data.build import REJECTS, DatasetBuilder, EventBatch, block_of, bytes_of
from userllm.data.card import FieldSpec, RowCounts
from userllm.data.in_turn import ahead, aside
from userllm.data.sources.catalogue import Catalogue, ItemForm
from userllm.data.sources.csv_rows import csv_rows
from userllm.data.sources.event_rows import EventRows, Rejects
from userllm.data.sources.fetch import announce
from userllm.data.sources.json_rows import json_rows, object_of
from userllm.data.sources.raw_files import FORMATS, LineBlocks, Rows, find_files
from userllm.data.sources.review_texts import one_side, plain
from userllm.data.sources.reviews_config import RATING, ReviewsConfig
from userllm.data.sources.table import source_of
from userllm.data.sources.values import SPELT, TICKS, TimeReader
from userllm.data.store import Dataset
from userllm.data.text_length import LENGTH, text_lengths
from userllm.errors import UserError

UNRATED = "reviews without a rating"
PEEKED, OBJECTS_PEEKED = 1 << 16, 100
"""Bytes and lines that are looked at to tell what a file is."""


@dataclass(frozen=True)
class ReviewForm:
    """One published form of reviews.

    columns: "user", "item", "time", "rating" and texts -> what the form calls them. unit: of its times. other_item:
    names the item where its own column does not. header: of a CSV file without one, the names of its columns.
    """

    said: str
    columns: Mapping[str, str]
    unit: str
    other_item: str | None = None
    csv: bool = False
    header: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ReviewFile:
    """A file of reviews. group: which part of the set its name says it is, None where it does not."""

    path: Path
    form: ReviewForm
    group: str | None


@dataclass(frozen=True)
class ItemFile:
    """A file of metadata."""

    path: Path
    form: ItemForm


@dataclass(frozen=True)
class Publisher:
    """A publisher's sets. recognise: what a file is, by its contents. thing: what an item is, if nothing else is known.

    texts: fields of a review. by_category: whether a file's group is a category of its items. has_translations: whether
    texts may stand in two languages.
    """

    name: str
    texts: tuple[str, ...]
    thing: str
    recognise: Callable[[Path], ReviewFile | ItemFile]
    by_category: bool
    has_translations: bool


def prepare_reviews(publisher: Publisher, paths: Sequence[str], out: Path, config: ReviewsConfig) -> Dataset:
    """Prepare reviews as a dataset in ``out``.

    paths: files, patterns or folders, in any mixture of reviews and metadata. Raises UserError for anything wrong with
    them, naming file and line.
    """
    if config.translated != "both" and not publisher.has_translations:
        raise UserError(f"translated is {config.translated}: {publisher.name} has no translated texts")
    files = _recognised(publisher, paths)
    reviews = [file for file in files if isinstance(file, ReviewFile)]
    about = [file for file in files if isinstance(file, ItemFile)]
    if not reviews:
        raise UserError(f"{', '.join(paths)}: holds metadata and no reviews; give the reviews, too")
    texts = [name for name in publisher.texts if any(name in file.form.columns for file in reviews)]
    memory = bytes_of(config.memory)
    with DatasetBuilder(out, _fields(texts), memory=memory) as builder:
        source = aside(lambda: source_of(publisher.name, paths, [file.path for file in files]))
        rejects = Rejects(builder.files / REJECTS, config.on_bad_rows == "skip")
        reader = ReviewReader(config, texts, block_of(memory), rejects)
        groups: list[pl.Series] = []
        for file in reviews:
            announce(f"{publisher.name}: {file.path}, {file.form.said}")
            before = builder.item_numbers.size
            for batch in ahead(reader.batches(file)):
                builder.add(batch)
            new = builder.item_numbers.size - before
            group = file.group if publisher.by_category else None
            groups.append(pl.Series([group], dtype=pl.String).new_from_index(0, new))
        reviewed = builder.item_numbers.ids.to_frame().with_columns(pl.concat(groups).alias("group"))
        catalogue = Catalogue(reviewed, config.catalogue == "all", publisher.thing)
        for file in about:
            announce(f"{publisher.name}: {file.path}, metadata")
            catalogue.read(file.path, file.form, block_of(memory), rejects)
        builder.describe_items(catalogue.items())
        said = dict.fromkeys(file.form.said for file in reviews)
        units = dict.fromkeys(file.form.unit for file in reviews)
        builder.finish(
            name=_name(publisher, reviews),
            source=source(),
            time=" and ".join(f"{SPELT[unit]} since 1970" for unit in units),
            ticks_per_second=TICKS["us"],
            count_filters=config.counts(),
            notes=[*said, *reader.notes(), *catalogue.notes(len(about))],
        )
    return Dataset.open(out)


class ReviewReader:
    """Files of reviews -> batches of events, times in microseconds."""

    def __init__(self, config: ReviewsConfig, texts: Sequence[str], block: int, rejects: Rejects):
        self.config, self.texts, self.block, self.rejects = config, list(texts), block, rejects
        self.translations = 0

    def batches(self, file: ReviewFile) -> Iterator[EventBatch]:
        """Every row of a file, in order; reviews without a rating are left out and counted."""
        form = file.form
        time = TimeReader(form.unit, found=False)
        own = [name for name in self.texts if name in form.columns]
        events = EventRows(form.columns, [RATING], own, self.config, self.rejects, time)
        for rows in self._rows(file.path, form):
            rating = rows.frame[form.columns[RATING]]
            unrated = rating.is_null() | (rating == "")
            if any_unrated := int(unrated.sum()):
                rows = _without(rows, unrated)
            batch = events.batch(rows)
            counts = batch.counts
            if any_unrated:
                counts += RowCounts(any_unrated, 0, filtered={UNRATED: any_unrated})
            yield EventBatch(self._finished(batch.events, TICKS["us"] // time.ticks), counts)

    def notes(self) -> list[str]:
        """What the card has to say of the texts."""
        if not self.translations:
            return []
        kept = {"both": "both sides", "original": "the original"}.get(
            self.config.translated, "the translation"
        )
        return [f"{self.translations:,} texts were translated by Google; kept is {kept}"]

    def _rows(self, path: Path, form: ReviewForm) -> Iterator[Rows]:
        wanted = [*form.columns.values(), *([form.other_item] if form.other_item else [])]
        found = (
            csv_rows(path, ",", True, form.header, wanted, self.block)
            if form.csv
            else json_rows(path, wanted, self.block)
        )
        for rows in found:
            if form.other_item is not None:
                rows.frame = rows.frame.with_columns(pl.coalesce(form.columns["item"], form.other_item))
            yield rows

    def _finished(self, events: pl.DataFrame, ticks: int) -> pl.DataFrame:
        """Clean texts, their length, times in microseconds."""
        columns = [events["time"] * ticks]
        for name in self.texts:
            text = plain(events[name]) if name in events.columns else _nothing(name, len(events))
            text, translations = one_side(text, self.config.translated)
            self.translations += translations
            columns.append(text)
        if self.texts:
            columns.append(text_lengths(columns[-1]))  # of the review itself, which comes last
        return events.with_columns(columns)


def _without(rows: Rows, gone: pl.Series) -> Rows:
    """The other rows."""
    lines, stays = rows.lines, (~gone).to_numpy()
    return Rows(rows.file, rows.frame.filter(~gone), lambda: lines()[stays], rows.rejected)


def _nothing(name: str, rows: int) -> pl.Series:
    return pl.Series(name, [""], dtype=pl.String).new_from_index(0, rows)


def _fields(texts: Sequence[str]) -> list[FieldSpec]:
    fields = [FieldSpec("item", "event", "single"), FieldSpec(RATING, "event", "single")]
    fields += [FieldSpec(LENGTH, "event", "single")] * bool(texts)
    fields += [FieldSpec(name, "event", "text") for name in texts]
    return [*fields, FieldSpec("category", "item", "multi"), FieldSpec("title", "item", "text")]


def _name(publisher: Publisher, reviews: Sequence[ReviewFile]) -> str:
    """ "amazon-musical-instruments" where all files are of one group."""
    groups = {file.group for file in reviews}
    only = groups.pop() if len(groups) == 1 else None
    return f"{publisher.name}-{only.lower().replace(' ', '-')}" if only else publisher.name


def _recognised(publisher: Publisher, paths: Sequence[str]) -> list[ReviewFile | ItemFile]:
    """What the files are, those of folders in the order of their names.

    Raises UserError for a file that is neither reviews nor metadata, and for a folder that holds the same reviews in
    two forms.
    """
    found: dict[Path, ReviewFile | ItemFile] = {}
    for path in paths:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            found |= {file: publisher.recognise(file) for file in find_files([path])}
            continue
        inside = [publisher.recognise(file) for file in sorted(folder.rglob("*")) if _is_data(file)]
        if not inside:
            raise UserError(f"{folder}: holds no .json, .jsonl or .csv files")
        groups: dict[str, Path] = {}
        for file in inside:
            if isinstance(file, ReviewFile) and file.group is not None:
                if file.group in groups:
                    raise UserError(
                        f"{folder}: {groups[file.group].name} and {file.path.name} are both reviews of {file.group}, "
                        "and one may be part of the other; name the files you mean"
                    )
                groups[file.group] = file.path
        found |= {file.path: file for file in inside}
    return list(found.values())


def _is_data(path: Path) -> bool:
    ending = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    known = tuple(end for end, kind in FORMATS.items() if kind in ("csv", "jsonl"))
    return path.is_file() and not path.name.startswith(".") and ending.endswith(known)


def first_lines(path: Path) -> list[bytes]:
    """The first lines of a file that are not blank. Raises UserError where there are none."""
    blocks = LineBlocks(path, PEEKED)
    for block in blocks:
        if lines := [line for line in block.split(b"\n") if line.strip()]:
            blocks.close()
            return lines
    raise UserError(f"{path}: is empty")


def first_keys(path: Path) -> list[str]:
    """The keys of the objects on a file's first lines. Raises UserError where none of them is an object."""
    keys: dict[str, None] = {}
    problem = ""
    for line in first_lines(path)[:OBJECTS_PEEKED]:
        try:
            keys |= dict.fromkeys(object_of(line))
        except ValueError as error:
            problem = problem or str(error)
    if not keys:
        raise UserError(
            f"{path} line 1: {problem or 'an empty object'}; each line has to be a review, or an item"
        )
    return list(keys)
