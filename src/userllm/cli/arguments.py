"""Arguments that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from userllm.errors import UserError
from userllm.json_file import read_object

if TYPE_CHECKING:
    from userllm.events import UserHistory
    from userllm.model import UserLLM
    from userllm.serving.record import UserRecord
    from userllm.serving.store import UserStore

CONFIG_NOTE = """\
CONFIG is a YAML file; a.b=c after it sets one value of it, for example
  lm.name=Qwen/Qwen3-0.6B  fusion.layers=last:8  evaluation.users=null
Results go to runs/<name>/ below the current folder. `userllm settings` lists them all.
"""
HISTORY_NOTE = """\
Whose history: either --user, a user of a prepared dataset (--data; for a run folder the run's own by default),
or --history, a JSON file of anyone's events:
  [{"item": "Heat (1995)", "rating": 5, "time": 978300760}, {"item": "Toy Story (1995)"}]
where item is an id or a title of the catalogue, and rating and time may be left out.
"""


def add_command(commands: Any, name: str, help_text: str, note: str = "") -> argparse.ArgumentParser:
    """A parser for one command, with its help text and a note below it."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=note,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """CONFIG [a.b=c ...]"""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a configuration, e.g. configs/demo.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=c", help="settings that differ from the file's"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="where run folders are (default: runs)"
    )
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help="of several processes: each trains with a share of the weights (FSDP2)",
    )
    parser.add_argument(
        "--ray",
        type=int,
        metavar="N",
        help="evaluate on N workers of a Ray cluster (started here if there is none)",
    )
    parser.add_argument(
        "--ray-gpus", type=float, default=0, metavar="G", help="GPUs of each Ray worker (default: 0)"
    )


def go_through(arguments: argparse.Namespace, last: str) -> None:
    """The stages of CONFIG [a.b=c ...] up to ``last``, together with the other processes where there are several."""
    from userllm import processes
    from userllm.cli.configuration import load_config
    from userllm.pipeline import Run

    config, plain = load_config(arguments.config, arguments.overrides)
    run = Run(config, plain, arguments.runs, arguments.fsdp or processes.fsdp_asked())
    if arguments.ray is not None:
        from userllm.scale_out import answering

        run.answering = answering(run, arguments.ray, arguments.ray_gpus)
    run.through(last)
    processes.stop()


def add_model(parser: argparse.ArgumentParser) -> None:
    """FOLDER, and whose history."""
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a run folder (runs/demo) or a saved model"
    )
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--user", metavar="ID", help="a user of the dataset, by the raw id")
    whose.add_argument("--history", type=Path, metavar="FILE.json", help="a history in a JSON file")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the prepared dataset that --user is in")
    parser.add_argument(
        "--store", type=Path, metavar="STORE", help="take --user from what `userllm embed` computed"
    )
    parser.add_argument("--lm", metavar="NAME", help="where the language model is, if not where it was")


def open_model(arguments: argparse.Namespace) -> tuple[UserLLM, UserHistory | UserRecord]:
    """The model in FOLDER and the user asked for: their history, or what a store keeps of them. The inputs are looked
    at before the model is loaded.
    """
    folder, file = model_folder(arguments.folder), arguments.history
    user = store = None
    if file is not None:
        for option in ("data", "store"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--{option} goes with --user; a history from --history needs no dataset")
    if arguments.store is not None:
        from userllm.serving.store import UserStore

        store = UserStore.read(arguments.store)
        user = store[arguments.user]
    elif file is None:
        user = _history_of_user(arguments)
    else:
        from userllm.data.history_file import read_history
        from userllm.data.vocabulary import Vocabulary
        from userllm.saved_model import read_description, saved_fusion

        fields = [
            field.name for field in Vocabulary.load(folder / "vocabulary.json") if field.level == "event"
        ]
        saved = read_description(folder)
        texts = saved_fusion(saved["fusion"]).text.texts
        user = read_history(file, [*(name for name in fields if name != "item"), *texts])

    from userllm import processes
    from userllm.model import UserLLM

    model = UserLLM.from_pretrained(folder, arguments.lm).to(processes.device())
    if store is not None:
        _check_store(arguments, store, model)
    return model, user


def _check_store(arguments: argparse.Namespace, store: UserStore, model: UserLLM) -> None:
    """Raise UserError where the store is another model's, or knows less of the user than the dataset.

    The dataset is the one that --data names, or the run's own if it is still there.
    """
    from userllm.data.store import Dataset
    from userllm.serving.embed import check_current
    from userllm.serving.user_side import UserSide

    side = UserSide.of(model)
    store.check(side.version())
    data = _dataset_of(arguments.folder, arguments.data)
    if data is None or (arguments.data is None and not data.exists()):
        print("whether the store knows the user's latest events was not checked: no --data", file=sys.stderr)
    else:
        check_current(store, arguments.user, side, Dataset.open(data))


def model_folder(folder: Path) -> Path:
    """The folder of the model itself, also where a run folder is given."""
    if (folder / "config.json").is_file():
        return folder
    if (folder / "config.yaml").is_file():
        model = folder / "contextualize" / "model"
        if not (model / "config.json").is_file():
            raise UserError(
                f"{folder}: this run has no model yet; finish it with `userllm run {folder}/config.yaml`"
            )
        return model
    raise UserError(f"{folder}: neither a run folder nor a saved model (no config.json)")


def dataset_folder(folder: Path, data: Path | None, option: str) -> Path:
    """The dataset that --data names, or the run's own. Raises UserError where neither is known."""
    found = _dataset_of(folder, data)
    if found is None:
        raise UserError(f"{option} needs --data DIR: {folder} does not say which dataset it used")
    return found


def _dataset_of(folder: Path, data: Path | None) -> Path | None:
    used = folder / "dataset.json"
    if data is not None or not used.is_file():
        return data
    return Path(read_object(used, "give --data DIR", "folder")["folder"])


def _history_of_user(arguments: argparse.Namespace) -> UserHistory:
    from userllm.data.store import Dataset

    dataset = Dataset.open(dataset_folder(arguments.folder, arguments.data, "--user"))
    return dataset.history(dataset.user_index(arguments.user))


def within(title: str, width: int) -> str:
    """A title as a cell of a table: on one line, its end cut off where it is longer."""
    title = " ".join(title.split())
    return title if len(title) <= width else title[: width - 1] + "…"
