"""``userllm recommend``: the best answers for one user, beside those of the same LM without the user."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from userllm.cli.arguments import HISTORY_NOTE, add_command, add_model, open_model, within

if TYPE_CHECKING:
    from userllm.model import Recommendation

TITLE_WIDTH = 44


def add_parser(commands: Any) -> None:
    """Add this command."""
    help_text = "say what a user will choose next, with and without the user"
    parser = add_command(commands, "recommend", help_text, HISTORY_NOTE)
    add_model(parser)
    parser.add_argument("-k", type=int, default=10, metavar="K", help="answers (default: 10)")
    parser.add_argument(
        "--task", metavar="NAME", help="a task the model was trained for (default: its first)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Two rankings of the same answers."""
    from userllm.events import UserHistory

    model, history = open_model(arguments)
    task = arguments.task or model.first_closed_task
    nobody = UserHistory(())  # a user without events leaves the language model as it is
    with_user, without_user = model.recommend([history, nobody], arguments.k, task=task)
    if arguments.json:
        answers = {"with_user": with_user, "without_user": without_user}
        listed = {side: [asdict(answer) for answer in ranking] for side, ranking in answers.items()}
        print(json.dumps({"task": task, "events": len(history), **listed}, indent=1, ensure_ascii=False))
    else:
        print(
            f"{task}: {model.tasks[task].config.prompt} ...  ({len(history)} events; log-likelihoods in nats)"
        )
        print(_table(with_user, without_user))


def _table(with_user: Sequence[Recommendation], without_user: Sequence[Recommendation]) -> str:
    lines = [
        f"{'':>3}  {'with this user':<{TITLE_WIDTH}}  {'nats':>7}   {'without the user':<{TITLE_WIDTH}}  {'nats':>7}"
    ]
    for rank in range(max(len(with_user), len(without_user))):
        cells = [_cell(side[rank]) if rank < len(side) else "" for side in (with_user, without_user)]
        lines.append(f"{rank + 1:>3}  {cells[0]:<{TITLE_WIDTH + 9}}   {cells[1]}".rstrip())
    return "\n".join(lines)


def _cell(answer: Recommendation) -> str:
    return f"{within(answer.title, TITLE_WIDTH):<{TITLE_WIDTH}}  {answer.log_likelihood:7.2f}"
