"""``userllm grow``: a trained model takes in a catalogue that has grown."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from userllm.cli.arguments import add_command, model_folder
from userllm.errors import UserError

NOTE = """\
After `userllm data append` a dataset may have items that the model has not seen. Where its item embeddings started from
the titles (encoder.item_start: text), new items enter through theirs; otherwise they are read as unknown.

  userllm grow runs/shop --data data/shop --out models/shop-november
"""


def add_parser(commands: Any) -> None:
    """Add this command."""
    parser = add_command(commands, "grow", "take new items into a trained model, without training", NOTE)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run folder or a saved model")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the dataset that has grown")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to save the model")
    parser.add_argument("--lm", metavar="NAME", help="where the language model is, if not where it was")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """A model and a dataset -> a model."""
    from userllm.data.store import Dataset

    folder, dataset = model_folder(arguments.folder), Dataset.open(arguments.data)
    if arguments.out.resolve() == folder.resolve():
        raise UserError(f"--out {arguments.out}: this is the model that is to grow; give another folder")
    from userllm.growing import grow
    from userllm.model import UserLLM

    if (arguments.out / "config.json").is_file():
        print(f"{arguments.out} holds a model; it is replaced", file=sys.stderr)
    model, growth = grow(UserLLM.from_pretrained(folder, arguments.lm), dataset.items)
    model.save_pretrained(arguments.out)
    print(f"{arguments.out}: {growth}")
