"""``userllm settings``: everything a configuration can say."""

from __future__ import annotations

import argparse
from typing import Any

from userllm.cli.arguments import add_command
from userllm.errors import UserError


def add_parser(commands: Any) -> None:
    """Add this command."""
    parser = add_command(
        commands, "settings", "list what a configuration can say, with defaults and meanings"
    )
    parser.add_argument("prefix", nargs="?", default="", metavar="GROUP", help="one group only, e.g. encoder")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Every setting, one after another."""
    from userllm.cli.configuration import describe_settings

    chosen = [one for one in describe_settings() if one[0].startswith(arguments.prefix)]
    if not chosen:
        raise UserError(f"no setting begins with {arguments.prefix!r}")
    for name, default, meaning in chosen:
        print(f"{name} = {default}" if default else name)
        if meaning:
            print(f"    {meaning}")
