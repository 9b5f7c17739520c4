"""``userllm evaluate``: one stage and what it needs."""

from __future__ import annotations

import argparse
from typing import Any

from userllm.cli.arguments import CONFIG_NOTE, add_command, add_config, go_through


def add_parser(commands: Any) -> None:
    """Add this command."""
    help_text = "measure every task on the test users, and do what comes before"
    parser = add_command(commands, "evaluate", help_text, CONFIG_NOTE)
    add_config(parser)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """data, pretrain, contextualize, evaluate."""
    go_through(arguments, "evaluate")
