"""How a dataset folder changes: by one rename. Whoever is killed on the way leaves the old dataset or the new one.

A new folder is made beside its place and renamed. In an old one the new files lie beside the old ones until card.json,
which names the files that count, is replaced; the old files go afterwards. One command at a time writes a dataset.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from importlib import metadata
from io import TextIOWrapper
from pathlib import Path

from userllm.data.card import DatasetCard
from userllm.errors import UserError

FORMAT_1_FILES = ("events.parquet", "items.parquet", "users.parquet")


def check_writable(folder: Path) -> None:
    """Raise UserError where ``folder`` holds something else than a prepared dataset, which must not be replaced."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not (folder / "card.json").is_file():
        raise UserError(f"{folder}: exists and is no prepared dataset; choose another folder or remove it")


class Scratch:
    """A temporary folder beside a dataset, from which files are renamed into their place; whoever has it may write.

    What commands that were killed have left there is removed. Raises UserError where another command has it.
    """

    def __init__(self, folder: Path):
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock_file = folder.with_name(f".{folder.name}.lock")
        self._lock = _locked(self._lock_file, folder)
        prefix = f".{folder.name}.unfinished-"
        for left in folder.parent.iterdir():
            if left.name.startswith(prefix):
                shutil.rmtree(left, ignore_errors=True)
        self._folder = tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=prefix, ignore_cleanup_errors=True
        )
        self.path = Path(self._folder.name)

    def close(self) -> None:
        """Remove the folder, and let others write."""
        self._folder.cleanup()
        if not self._lock.closed:
            self._lock_file.unlink(missing_ok=True)
            self._lock.close()


def _locked(file: Path, folder: Path) -> TextIOWrapper:
    """The lock on ``folder``. The system lets go of it when the process ends, however it ends."""
    while True:
        lock = open(file, "a", encoding="utf-8")  # noqa: SIM115 - open as long as it holds
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(file), os.fstat(lock.fileno())):
                return lock
        except BlockingIOError as error:
            lock.close()
            raise UserError(
                f"{folder}: another command is writing it; wait until that one is done"
            ) from error
        except FileNotFoundError:
            pass  # whoever had it has just removed it: take it anew
        lock.close()


def files_name() -> str:
    """A name for a dataset's files that no earlier ones had."""
    return f"data-{secrets.token_hex(4)}"


def created_by() -> str:
    """The version of userllm that writes."""
    try:
        return f"userllm {metadata.version('userllm')}"
    except metadata.PackageNotFoundError:
        return "userllm (from a source folder)"


def check_unchanged(folder: Path, card: DatasetCard) -> None:
    """Raise UserError where somebody replaced a dataset while it was being added to."""
    file = folder / "card.json"
    if not file.is_file() or DatasetCard.from_json(file.read_text(encoding="utf-8"), file) != card:
        raise UserError(f"{folder}: was changed meanwhile by another command; append again")


def put_in_place(folder: Path, scratch: Path, files: Path, card: DatasetCard) -> None:
    """Make ``files``, a folder inside ``scratch``, the data of the dataset in ``folder``."""
    new = scratch / "dataset"
    new.mkdir()
    (new / "card.json").write_text(card.to_json(), encoding="utf-8")
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(files, new / card.files)
        os.replace(new, folder)
        return
    os.replace(files, folder / card.files)
    os.replace(new / "card.json", folder / "card.json")
    for old in folder.iterdir():
        if old.name.startswith("data-") and old.name != card.files:
            shutil.rmtree(old, ignore_errors=True)
        elif old.name in FORMAT_1_FILES:
            old.unlink()
