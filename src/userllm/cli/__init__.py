"""The command line: ``userllm COMMAND``. One file per command; this one puts them together.

A command imports what it needs only when it runs: ``--help`` and the ``data`` commands never load torch.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from userllm.cli import (
    contextualize,
    data,
    embed,
    evaluate,
    experiments,
    generate,
    grow,
    pretrain,
    recommend,
    report,
    run,
    score,
    serve,
    settings,
)
from userllm.errors import UserError

DESCRIPTION = "Gives a language model a sense of who it is talking to: user embeddings, cross-attended."
EPILOG = """\
first steps:
  userllm run configs/demo.yaml                      everything, from raw data to runs/demo/report.html
  userllm recommend runs/demo --user ID              what this user will watch next, with and without the user
  userllm data inspect DIR                           what is in a prepared dataset

Every command says more with --help. A command that was interrupted goes on where it stopped when it is given again.
"""


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other wrong input is reported."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import userllm

        print(f"userllm {userllm.__version__}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="userllm",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (
        run,
        data,
        pretrain,
        contextualize,
        evaluate,
        report,
        experiments,
        embed,
        recommend,
        score,
        generate,
        serve,
        grow,
        settings,
    ):
        command.add_parser(commands)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's arguments. Settings (a.b=c) may also follow an option: argparse alone takes only those that
    stand together. Raises UserError for what it does not know."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    settings_left = hasattr(arguments, "overrides") and all("=" in word and word[0] != "-" for word in rest)
    if rest and not settings_left:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 bad input, 130 interrupted, 141 nobody reads on."""
    try:
        arguments = parse(argv)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            arguments.command(arguments)
        sys.stdout.flush()  # a reader that has gone away is met here, not at the very end
    except UserError as error:
        return _refused(str(error))
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (what is left is flushed there, at the end)
        return 141  # as of a process that SIGPIPE ends
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _refused(
                f"{error.filename or 'the disk'}: {error.strerror}; make room, and give the same command again"
            )
        if error.filename is None:
            raise
        mend = "" if isinstance(error, FileNotFoundError) else "; choose another place, or make room there"
        return _refused(f"{error.filename}: {error.strerror}{mend}")
    except KeyboardInterrupt:
        print("interrupted: give the same command again and it goes on where it stopped", file=sys.stderr)
        return 130
    return 0


def _refused(why: str) -> int:
    number = os.environ.get("RANK", "0")  # of several processes that a launcher started
    print(f"error: {'' if number == '0' else f'process {number}: '}{why}", file=sys.stderr)
    return 2


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
