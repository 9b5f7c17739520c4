"""Arguments of ``data prepare`` and ``data append``: flags and a YAML file -> ``TableConfig`` or ``ReviewsConfig``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from userllm.errors import UserError

if TYPE_CHECKING:
    from userllm.data.sources.reviews_config import ReviewsConfig
    from userllm.data.sources.table_config import TableConfig

TABLE_NOTE = """\
table reads your own event log: CSV, TSV, JSON Lines or Parquet, plain, .gz or .zst, in one file or many.

  userllm data prepare table --path 'logs/*.csv.gz' --user user_id --item product --time when \\
      --field rating:number --text review --items products.jsonl --item-key id --title name --category kind

Nothing is left out unless you ask for it, and the card says what became of every row.
"""


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of ``TableConfig``; what is not given is None and leaves the file's or the default."""
    group = parser.add_argument_group("table")
    add = group.add_argument
    add("--spec", type=Path, metavar="FILE.yaml", help="all of these settings in a file; flags come on top")
    for name, what in (("user", "user's id"), ("item", "item's id"), ("time", "time")):
        add(f"--{name}", metavar="COL", help=f"column of the {what}")
    add(
        "--time-unit",
        metavar="UNIT",
        help="s, ms, us, ns, iso or a format like %%d.%%m.%%Y (default: found out)",
    )
    add("--field", dest="fields", action="append", metavar="COL:number", help="a number that each event has")
    add("--text", nargs="+", metavar="COL", help="texts of an event, read when they are needed")
    add("--items", nargs="+", metavar="FILE", help="what is known of the items")
    add("--item-key", metavar="COL", help="in --items: the id that events name")
    add("--title", metavar="COL", help="in --items: the title (default: the id)")
    add("--category", metavar="COL", help="in --items: the categories")
    add("--category-separator", metavar="C", help="between two categories (default: |)")
    formats = ("csv", "tsv", "jsonl", "parquet")
    add("--items-format", choices=formats, help="of --items, if the file names do not say it")
    add("--items-separator", metavar="C", help="of --items, if it is not that of the events")
    add("--items-header", nargs="+", metavar="COL", help="of --items, if the files have no line with them")
    add("--format", choices=formats, help="of the events, if the file names do not say it")
    add("--separator", metavar="C", help="between two columns of a CSV file (default: a comma)")
    add(
        "--header", nargs="+", metavar="COL", help="names of all columns, if the files have no line with them"
    )
    group = parser.add_argument_group("table, amazon, google-local")
    add = group.add_argument
    add("--after", metavar="DATE", help="keep events from this date on")
    add("--before", metavar="DATE", help="keep events before this date")
    add(
        "--at-least",
        action="append",
        metavar="COL:VALUE",
        help="keep events whose field is that much or more",
    )
    add(
        "--repeated",
        choices=("all", "first", "last"),
        help="of a user's events with one item keep... (default: all)",
    )
    add("--min-item-events", type=int, metavar="N", help="leave out items with fewer events")
    add("--min-user-events", type=int, metavar="N", help="leave out users with fewer events")
    add_reading_arguments(group)
    group = parser.add_argument_group("amazon, google-local")
    group.add_argument(
        "--catalogue",
        choices=("reviewed", "all"),
        help="the items of the reviews (default), or all that the metadata names",
    )
    group.add_argument(
        "--translated",
        choices=("both", "translation", "original"),
        help="google-local: which side of a translated text to keep (default: both, as they stand)",
    )


FILTERS = (
    "after", "before", "at_least", "repeated", "min_item_events", "min_user_events", "on_bad_rows", "memory",
)  # fmt: skip
TABLE = (
    "spec", "user", "item", "time", "time_unit", "fields", "text", "items", "item_key", "title", "category",
    "category_separator", "items_format", "items_separator", "items_header", "format", "separator", "header",
)  # fmt: skip
REVIEWS = ("catalogue", "translated")
NOT_SETTINGS = ("name", "path", "out", "command")


def check_arguments(arguments: argparse.Namespace, known: Sequence[str]) -> None:
    """Raise UserError for a flag that says nothing to this data set."""
    for name, value in vars(arguments).items():
        if value is not None and name not in known and name not in NOT_SETTINGS:
            flag = "--field" if name == "fields" else f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} means nothing to {arguments.name}; see `userllm data prepare --help`")


def reviews_config(arguments: argparse.Namespace) -> ReviewsConfig:
    """The flags. Raises UserError for impossible ones."""
    from userllm.data.sources.reviews_config import ReviewsConfig

    given = {name: getattr(arguments, name) for name in (*FILTERS, *REVIEWS)}
    return ReviewsConfig(**{name: value for name, value in given.items() if value is not None})


def add_reading_arguments(parser: Any) -> None:
    """How rows are read, also by ``data append``."""
    parser.add_argument(
        "--on-bad-rows",
        choices=("error", "skip"),
        help="a row that cannot be read: stop (default), or leave it out and list it in rejects.csv",
    )
    parser.add_argument("--memory", metavar="SIZE", help="about how much to use, e.g. 2GiB (default)")


def table_config(arguments: argparse.Namespace) -> TableConfig:
    """The file's settings with the flags on top. Raises UserError for unknown or impossible ones."""
    from userllm.data.sources.table_config import TableConfig

    settings = {} if arguments.spec is None else _read(arguments.spec)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    items = {"items": "path", "item_key": "key", "title": "title", "category": "category"}
    items |= {"category_separator": "separator", "items_format": "format"}
    items |= {"items_separator": "column_separator", "items_header": "header"}
    known = set(TableConfig.__dataclass_fields__) - {"items"}
    settings |= {name: value for name, value in given.items() if name in known}
    about_items = {own: given[name] for name, own in items.items() if name in given}
    if about_items:
        settings["items"] = settings.get("items", {}) | about_items
    if "path" in given:
        settings["path"] = [str(path) for path in given["path"]]
    if not settings.get("path"):
        raise UserError("table: give its files with --path, or path in --spec")
    return _checked(settings, str(arguments.spec or "table"))


def _read(file: Path) -> dict[str, Any]:
    from userllm.overrides import read_yaml

    settings = read_yaml(file)
    if not isinstance(settings, dict):
        raise UserError(
            f"{file}: a table's settings are names with values, see `userllm data prepare --help`"
        )
    return settings


def _checked(settings: dict[str, Any], where: str) -> TableConfig:
    from jsonargparse import ArgumentParser

    from userllm.data.sources.table_config import TableConfig

    parser = ArgumentParser(exit_on_error=False, prog="table")
    parser.add_class_arguments(TableConfig, "table")
    try:
        return parser.instantiate(parser.parse_object({"table": settings})).table
    except (argparse.ArgumentError, TypeError, KeyError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())[:400]}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
