"""``userllm score``: exact log-likelihoods of given items, or of the whole catalogue, for one user."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from userllm.cli.arguments import HISTORY_NOTE, add_command, add_model, open_model, within
from userllm.errors import UserError

TITLE_WIDTH = 52
NOTE = (
    HISTORY_NOTE
    + """
Which items: ids or titles of the catalogue, or one JSON file (NAME.json) with a list of them; all of it by default.
The gain is what knowing the user adds to an item's log-likelihood.
"""
)


def add_parser(commands: Any) -> None:
    """Add this command."""
    parser = add_command(commands, "score", "score given items exactly, with and without the user", NOTE)
    add_model(parser)
    parser.add_argument(
        "--items", nargs="+", metavar="ITEM", help="what to score (default: the whole catalogue)"
    )
    parser.add_argument(
        "-k", "--k", type=int, metavar="K", help="show the best K only (default: all given, or 10)"
    )
    parser.add_argument(
        "--task", metavar="NAME", help="a task the model was trained for (default: its first)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """One ranking, exact, with what the same LM says without the user beside it."""
    from userllm.events import UserHistory

    items = None if arguments.items is None else read_items(arguments.items)
    k = arguments.k if arguments.k is not None else 10 if items is None else len(items)
    if k < 1:
        raise UserError(f"-k is {k}; ask for at least one item")
    model, history = open_model(arguments)
    task = arguments.task or model.first_closed_task
    with_user, without_user = model.score([history, UserHistory(())], items, task=task)
    about_items = model.tasks[task].config.kind == "next_item"
    if items is None:
        items = model.collator.items["id"].to_list() if about_items else model.closed_tasks[task].answers
    answers = [
        {
            "item": items[n],
            "title": model.title(items[n]) if about_items else items[n],
            "log_likelihood": float(with_user[n]),
            "without_user": float(without_user[n]),
        }
        for n in with_user.argsort(descending=True, stable=True)[:k].tolist()
    ]
    if arguments.json:
        said = {"task": task, "events": len(history), "scored": len(items), "answers": answers}
        print(json.dumps(said, indent=1, ensure_ascii=False))
    else:
        print(
            f"{task}: {model.tasks[task].config.prompt} ...  "
            f"({len(history)} events; the best {len(answers)} of {len(items)}; log-likelihoods in nats)"
        )
        print(_table(answers))


def _table(answers: Sequence[dict[str, Any]]) -> str:
    lines = [f"{'':>3}  {'':<{TITLE_WIDTH}}  {'with this user':>14}  {'without':>8}  {'gain':>6}"]
    for rank, answer in enumerate(answers, 1):
        title, own, base = answer["title"], answer["log_likelihood"], answer["without_user"]
        shown = within(title, TITLE_WIDTH)
        lines.append(f"{rank:>3}  {shown:<{TITLE_WIDTH}}  {own:14.2f}  {base:8.2f}  {own - base:+6.2f}")
    return "\n".join(lines)


def read_items(given: Sequence[str]) -> list[str]:
    """Items from the command line: themselves, or the list in the one JSON file that is named."""
    if len(given) != 1 or not given[0].endswith(".json"):
        return list(given)
    file = Path(given[0])
    if not file.is_file():
        raise UserError(f"{file}: no such file of items")
    try:
        items = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(items, list) or not items or not all(isinstance(item, str | int) for item in items):
        raise UserError(f'{file}: items are a JSON list of ids or titles such as ["1", "Heat (1995)"]')
    return [str(item) for item in items]
