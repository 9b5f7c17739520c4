"""The command line."""

from __future__ import annotations

import sys
from pathlib import Path

from userllm.cli.configuration import load_config
from userllm.errors import UserError


def main() -> None:
    from userllm.pipeline import Run
    try:
        config, plain = load_config(Path(sys.argv[2]), sys.argv[3:])
        Run(config, plain).through({"run": "report", "pretrain":"pretrain","contextualize":"contextualize","evaluate":"evaluate"}[sys.argv[1]])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
