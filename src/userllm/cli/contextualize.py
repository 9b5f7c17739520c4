"""``userllm contextualize``: one stage and what it needs."""

from __future__ import annotations

import argparse
from typing import Any

from userllm.cli.arguments import CONFIG_NOTE, add_command, add_config, go_through


def add_parser(commands: Any) -> None:
    """Add this command."""
    help_text = "train the language model to use the user embeddings, and what comes before (stage 2)"
    parser = add_command(commands, "contextualize", help_text, CONFIG_NOTE)
    add_config(parser)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """data, pretrain, contextualize."""
    go_through(arguments, "contextualize")
