"""``userllm embed``: what answers need of a dataset's users, computed ahead into a store."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from userllm.cli.arguments import add_command, dataset_folder, model_folder
from userllm.errors import UserError

if TYPE_CHECKING:
    from userllm.serving.user_side import UserSide

NOTE = """\
Given again, the command computes only what is missing, and users who have new events. It can be interrupted.

  userllm embed runs/demo --out stores/demo
  userllm recommend runs/demo --user 8 --store stores/demo

A store belongs to one model and one dataset; another one's is refused. It holds all events of a user, also those that
a run keeps for its test: it is for answering, not for measuring.
"""


def add_parser(commands: Any) -> None:
    """Add this command."""
    parser = add_command(
        commands, "embed", "compute users ahead, so that answers need not read histories", NOTE
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a run folder (runs/demo) or a saved model"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="a prepared dataset (default: the run's own)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="STORE", help="the store, a folder")
    parser.add_argument(
        "--users", type=Path, metavar="FILE", help="only these users: one raw id per line (default: all)"
    )
    parser.add_argument(
        "--prune",
        action="store_true",
        help="remove users from the store who are not in the dataset (any more)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of what is stored (default: float32)",
    )
    parser.add_argument(
        "--keys-values",
        action="store_true",
        help="also keep the cross-attention's keys and values of every fused layer",
    )
    parser.add_argument(
        "--state",
        action="store_true",
        help="also keep what the encoder needs to go on with new events alone",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE.parquet",
        help="then write plain user embeddings, one row per user",
    )
    parser.add_argument(
        "--every-event", action="store_true", help="with --export: one row per event kept instead of the last"
    )
    parser.add_argument("--lm", metavar="NAME", help="where the language model is, if not where it was")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """A model and a dataset -> a store."""
    from userllm.data.store import Dataset
    from userllm.data.titles import listed

    if arguments.export is not None and arguments.export.suffix != ".parquet":
        raise UserError(
            f"--export {arguments.export}: the file is Parquet; call it {arguments.export.stem}.parquet"
        )
    if arguments.every_event and arguments.export is None:
        raise UserError("--every-event says what --export writes; give --export FILE.parquet, too")
    folder = model_folder(arguments.folder)
    dataset = Dataset.open(dataset_folder(arguments.folder, arguments.data, "embed"))
    users = None if arguments.users is None else read_users(arguments.users)
    if users is not None:
        for user in users:
            dataset.user_index(user)
    from userllm.serving.embed import DatasetUsers, embed, store_card
    from userllm.serving.export import export_embeddings
    from userllm.serving.store import UserStore

    side = open_user_side(folder, arguments.lm)
    source = DatasetUsers(side, dataset)
    if source.unknown_items:
        print(
            f"{source.unknown_items:,} of {dataset.num_items:,} items are unknown to the model and read as such"
        )
    card = store_card(side, dataset, arguments.dtype, arguments.keys_values, arguments.state)
    store = UserStore.open(arguments.out, card)
    began = time.perf_counter()

    def progress(done: int, of: int) -> None:
        rate = done / max(time.perf_counter() - began, 1e-9)
        print(f"{done:,} of {of:,} users, {rate:,.0f} a second", flush=True)

    print(embed(source, store, users, progress))
    if others := sorted(set(store).difference(dataset.user_ids)):
        what = "--prune removes them"
        if arguments.prune:
            store.remove(others, missing_ok=True)  # another process may be at it, too
            what = "removed"
        print(f"in the store but not in {dataset.folder}: {listed(others)}; {what}")
    store.compact()
    print(f"{arguments.out}: {len(store):,} users")
    if arguments.export is not None:
        rows = export_embeddings(store, arguments.export, arguments.every_event)
        what = "one per event kept" if arguments.every_event else "the last user embedding of each user"
        print(f"{arguments.export}: {rows:,} rows, {what}")


def open_user_side(folder: Path, lm: str | None) -> UserSide:
    """What reads users in a saved model. The language model is loaded only where histories stand as text."""
    from userllm import processes
    from userllm.saved_model import read_description, saved_fusion
    from userllm.serving.user_side import UserSide

    device = processes.device()
    if saved_fusion(read_description(folder)["fusion"]).text.events == 0:
        return UserSide.load(folder).to(device)
    from userllm.model import UserLLM

    return UserSide.of(UserLLM.from_pretrained(folder, lm).to(device))


def read_users(file: Path) -> list[str]:
    """Raw ids, one per line; empty lines do not count. Raises UserError where there is no such file, or no id in it."""
    try:
        users = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--users {file}: cannot be read ({error})") from error
    if not any(users):
        raise UserError(f"--users {file}: holds no user; give one raw id per line")
    return [user for user in users if user]
