"""``userllm generate``: free text for one user."""

from __future__ import annotations

import argparse
from typing import Any

from userllm.cli.arguments import HISTORY_NOTE, add_command, add_model, open_model
from userllm.errors import UserError


def add_parser(commands: Any) -> None:
    """Add this command."""
    parser = add_command(commands, "generate", "let the language model write for a user", HISTORY_NOTE)
    add_model(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the model goes on from")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the LM's chat template")
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="tokens at most (default: 32)"
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Greedy continuation."""
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {arguments.max_new_tokens}; ask for at least one")
    model, history = open_model(arguments)
    print(
        model.generate(
            arguments.prompt, history, chat=arguments.chat, max_new_tokens=arguments.max_new_tokens
        )
    )
