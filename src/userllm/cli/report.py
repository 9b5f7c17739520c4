"""``userllm report``: report.html and report.md anew, from what a run measured."""

from __future__ import annotations

import argparse
from typing import Any

from userllm.cli.arguments import add_command, add_config

NOTE = """\
CONFIG is the run's configuration, or simply the run folder: userllm report runs/demo
Nothing is trained or measured again.
"""


def add_parser(commands: Any) -> None:
    """Add this command."""
    parser = add_command(commands, "report", "write the report of a run anew", NOTE)
    add_config(parser)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Read the run folder, write the report."""
    from userllm.report import write_report

    if arguments.config.is_dir():
        folder = arguments.config
    else:
        from userllm.cli.configuration import load_config

        folder = arguments.runs / load_config(arguments.config, arguments.overrides)[0].name
    print(write_report(folder))
