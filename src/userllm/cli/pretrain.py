"""``userllm pretrain``: one stage and what it needs."""

from __future__ import annotations

import argparse
from typing import Any

from userllm.cli.arguments import CONFIG_NOTE, add_command, add_config, go_through


def add_parser(commands: Any) -> None:
    """Add this command."""
    help_text = "train the user encoder to predict the next event, and what comes before (stage 1)"
    parser = add_command(commands, "pretrain", help_text, CONFIG_NOTE)
    add_config(parser)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """data, pretrain."""
    go_through(arguments, "pretrain")
