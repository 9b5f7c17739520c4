"""``userllm run``: all stages."""

from __future__ import annotations

import argparse
from typing import Any

from userllm.cli.arguments import CONFIG_NOTE, add_command, add_config, go_through


def add_parser(commands: Any) -> None:
    """Add this command."""
    parser = add_command(
        commands, "run", "do all stages, from raw data to the report; skip what is done", CONFIG_NOTE
    )
    add_config(parser)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """data, pretrain, contextualize, evaluate, report."""
    go_through(arguments, "report")
