"""Records of users on disk: memory-mapped, one file per block of users, each there whole or not at all.

    card.json                       which model and dataset, what is kept, how exactly
    000001-3f2a9c0d.safetensors     the records of some users; of a user who is in several files the last counts

A file holds every column of its records one user after the other, and beside a column where each user begins. So
reading a user reads their rows alone, adding users writes one new file, and whoever is killed loses a block at most.
Processes may add to one store at the same time: they write one after the other, and of a user whom two of them add the
record that was written last counts.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from userllm.data.commit import created_by
from userllm.errors import UserError
from userllm.fusion.attach import UserContext
from userllm.serving.record import Kept, UserRecord, context_of
from userllm.serving.user_side import UserSide
from userllm.tensor_file import save_tensors
from userllm.whole_file import write_text

if TYPE_CHECKING:
    from userllm.model import UserLLM

FORMAT_VERSION = 1
AGAIN = "run `userllm embed` again"
_NO_STORE = "no store of users; `userllm embed MODEL --out STORE` makes one"
BLOCK_USERS, BLOCK_BYTES = 1024, 1 << 26
"""Users and bytes of a file at most (at least one user): what an interruption can cost."""
LEFT_BEHIND = 3600.0
"""Seconds after which nobody is writing a half-written file any more."""
FEW_USERS = 64
"""A file with fewer users than this, and less than half full, is put together with others, once there are as many of
them."""
_ATTEMPTS = 10


@dataclass(frozen=True)
class StoreCard:
    """What card.json says.

    model: ``UserSide.version`` of the model. dtype: of the floats in the files.
    dataset, fingerprint: whose users these are, and the state it was in when every user asked for had last been
    looked at; None where that never was, or the records are of histories from elsewhere.
    """

    model: dict[str, str]
    dtype: Literal["float32", "float16"] = "float32"
    keys_values: bool = False
    state: bool = False
    dataset: str | None = None
    fingerprint: str | None = None
    format_version: int = FORMAT_VERSION
    created_by: str = ""

    @property
    def kept(self) -> Kept:
        return Kept(self.keys_values, self.state)


class UserStore:
    """The store in ``folder``. Make one with ``open`` (to add to it) or ``read`` (to answer from it).

    ``store[user]`` is a ``UserRecord``, which ``UserLLM`` takes wherever it takes a history.
    """

    def __init__(self, folder: Path, card: StoreCard):
        self.folder = folder
        self.card = card
        self._blocks: dict[Path, _Block] = {}
        self._place: dict[str, tuple[Path, int]] = {}
        self.refresh()

    @classmethod
    def open(cls, folder: Path | str, card: StoreCard) -> UserStore:
        """The store that ``card`` describes, made where there is none.

        Raises UserError where the folder holds something else, or a store of another model or another dataset, or one
        that keeps other things.
        """
        folder = Path(folder)
        if not (folder / "card.json").is_file():
            if folder.exists() and any(one.name[0] != "." for one in folder.iterdir()):
                raise UserError(
                    f"{folder}: exists and is no store of users; choose another folder or remove it"
                )
            folder.mkdir(parents=True, exist_ok=True)
            store = cls(folder, replace(card, created_by=created_by()))
            store.write_card()
            return store
        store = cls.read(folder)
        store.check(card.model)
        for name in ("dataset", "dtype", "keys_values", "state"):
            have, asked = getattr(store.card, name), getattr(card, name)
            if have != asked:
                raise UserError(
                    f"{folder}: this store's {name} is {have}, not {asked}; give another folder, or remove this one"
                )
        return store

    @classmethod
    def read(cls, folder: Path | str, model: UserLLM | None = None) -> UserStore:
        """The store in a folder. model: which will answer. Raises UserError where another one made the store."""
        file = Path(folder) / "card.json"
        if not file.is_file():
            raise UserError(f"{folder}: {_NO_STORE}")
        try:
            raw: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if "tie_rule" in raw:
                raise UserError(f"{folder}: a dataset, {_NO_STORE}")
            version = raw["format_version"]
            card = StoreCard(**raw) if version == FORMAT_VERSION else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: not the card of a store of users ({error}); {AGAIN}") from error
        if card is None:
            raise UserError(
                f"{file}: format_version is {version}, this userllm reads {FORMAT_VERSION}; {AGAIN}"
            )
        store = cls(Path(folder), card)
        if model is not None:
            store.check(UserSide.of(model).version())
        return store

    def check(self, model: dict[str, str]) -> None:
        """Raise UserError, naming the part, where another model than this ``UserSide.version`` made the store."""
        for part in dict.fromkeys([*self.card.model, *model]):
            made, here = self.card.model.get(part, "none"), model.get(part, "none")
            if made != here:
                raise UserError(
                    f"{self.folder}: another model computed these users: its {part} has sha256 {made[:12]}, this "
                    f"model's {here[:12]}; compute them again into another folder, or load the model that made them"
                )

    def refresh(self) -> None:
        """Take in what others have written since, and leave what they have put together or removed."""
        self._blocks = self._on_disk()
        self._place = {
            user: (file, row) for file, block in self._blocks.items() for row, user in enumerate(block.users)
        }

    def _on_disk(self) -> dict[Path, _Block]:
        """The store's files, the oldest first."""
        for _ in range(_ATTEMPTS):
            files = _files(self.folder)
            with suppress(FileNotFoundError):  # another process has put one together with others
                return {file: self._blocks.get(file) or _Block(file) for file in files}
        raise UserError(f"{self.folder}: its files come and go; try again when others are done with them")

    def write_card(self) -> None:
        """Put ``card`` on the disk."""
        write_text(self.folder / "card.json", json.dumps(asdict(self.card), indent=1) + "\n")

    def __len__(self) -> int:
        return len(self._place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __contains__(self, user: object) -> bool:
        return user in self._place

    def __getitem__(self, user: str) -> UserRecord:
        """Raises UserError for a user who is not there."""
        return UserRecord.from_columns(user, self._columns(user))

    def column(self, user: str, name: str) -> Tensor:
        """One column of a user's record; the others are not read. Raises UserError for a user who is not there."""
        return self._columns(user, name)[name]

    def _columns(self, user: str, only: str | None = None) -> dict[str, Tensor]:
        try:
            file, row = self._place[user]
        except KeyError as error:
            example = f"; users look like {next(iter(self))!r}" if len(self) else ""
            raise UserError(f"{self.folder}: no user {user!r}{example}") from error
        return self._blocks[file].columns(row, only)

    def context(self, users: Sequence[str], model: UserLLM) -> UserContext:
        """What ``model.conditioned`` takes, of these users."""
        return context_of(model, [self[user] for user in users])

    def put(self, records: Sequence[UserRecord]) -> None:
        """Add users, or put newer records of them in the place of older ones, as one file."""
        with self._lock():
            self._write(records)

    def put_all(self, records: Iterable[UserRecord]) -> Iterator[int]:
        """The same for as many as there are, file by file; yields how many users each file holds, once it is there."""
        for some in _of_a_file(records):
            self.put(some)
            yield len(some)

    def compact(self) -> None:
        """Put files together that few users are in, or mostly users of whom there are newer records; remove what an
        interruption has left half written, an hour ago or earlier: what is younger, another process may be writing.
        """
        for leftover in self.folder.glob(".*.partial"):
            with suppress(FileNotFoundError):  # another process tidies up, too
                if time.time() - leftover.stat().st_mtime > LEFT_BEHIND:
                    leftover.unlink()
        with self._alone():
            live = Counter(file for file, _ in self._place.values())
            worn = [file for file in self._blocks if 2 * live[file] <= len(self._blocks[file].users)]
            few = [
                file
                for file in self._blocks
                if file not in worn and live[file] < FEW_USERS and file.stat().st_size < BLOCK_BYTES / 2
            ]
            self._replace(worn + (few if len(few) >= FEW_USERS else []))

    def remove(self, users: Iterable[str], missing_ok: bool = False) -> None:
        """Take users out, older records of theirs included. Raises UserError for one who is not there, unless that does
        not matter."""
        with self._alone():
            gone = {users} if isinstance(users, str) else set(users)
            for user in () if missing_ok else gone - self._place.keys():
                self._columns(user)  # says so
            for user in gone:
                self._place.pop(user, None)
            self._replace([file for file, block in self._blocks.items() if gone.intersection(block.users)])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While files are replaced: as they are now, and nobody else writes."""
        with self._lock():
            self.refresh()
            yield

    def _lock(self) -> FileLock:
        """Whoever writes files has it: of two records of a user the one in the later file counts."""
        return FileLock(self.folder / ".lock")

    def _replace(self, old: Sequence[Path]) -> None:
        """Write the users who live in these files into others, and remove these."""
        live: dict[Path, list[str]] = {file: [] for file in old}
        for user, (file, _) in self._place.items():
            if file in live:
                live[file].append(user)
        for some in _of_a_file(self[user] for file in old for user in live[file]):
            self._write(some)
        # the oldest first: whoever is interrupted leaves no older record as the last of a user who is removed
        for file in [file for file in self._blocks if file in live]:
            del self._blocks[file]
            file.unlink(missing_ok=True)

    def _write(self, records: Sequence[UserRecord]) -> None:
        """Records as one file, the latest of all."""
        if not records:
            return
        users = [record.user for record in records]
        if None in users:
            raise ValueError("a record in a store needs its user's name")
        tensors = _one_after_the_other([record.columns() for record in records])
        floats = getattr(torch, self.card.dtype)
        tensors = {name: t.to(floats) if t.is_floating_point() else t for name, t in tensors.items()}
        file = self.folder / f"{_latest(self.folder) + 1:06d}-{secrets.token_hex(4)}.safetensors"
        save_tensors(tensors, file, {"users": json.dumps(users, ensure_ascii=False)})
        block = self._blocks[file] = _Block(file)
        self._place |= {user: (file, row) for row, user in enumerate(block.users)}


class _Block:
    """One file, memory-mapped."""

    def __init__(self, file: Path):
        try:
            self._open: Any = safe_open(file, framework="pt")
            self.users: list[str] = json.loads(self._open.metadata()["users"])
        except FileNotFoundError:
            raise
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: cannot be read ({error}); remove it, and {AGAIN}") from error
        self._names = [name for name in self._open.keys() if not name.endswith(".at")]  # noqa: SIM118
        self._at: dict[str, list[int]] = {}

    def columns(self, row: int, only: str | None = None) -> dict[str, Tensor]:
        """What the user in this row has, by column."""
        found = {}
        for name in self._names if only is None else [only]:
            if name not in self._at:
                self._at[name] = self._open.get_tensor(f"{name}.at").tolist()
            at = self._at[name]
            found[name] = self._open.get_slice(name)[at[row] : at[row + 1]]
        return found


def _files(folder: Path) -> list[Path]:
    """A store's files, the oldest first."""
    numbered = [file for file in folder.glob("*-*.safetensors") if _number(file) >= 0]
    return sorted(numbered, key=lambda file: (_number(file), file.name))


def _number(file: Path) -> int:
    """The number that a file's name begins with; -1 of one that is none of ours."""
    number = file.name.split("-")[0]
    return int(number) if number.isascii() and number.isdecimal() else -1


def _latest(folder: Path) -> int:
    """The number of the latest file; 0 where there is none."""
    return max(map(_number, _files(folder)), default=0)


def _of_a_file(records: Iterable[UserRecord]) -> Iterator[list[UserRecord]]:
    """As many as go into one file, again and again."""
    waiting: list[UserRecord] = []
    size = 0
    for record in records:
        waiting.append(record)
        size += sum(column.nbytes for column in record.columns().values())
        if len(waiting) == BLOCK_USERS or size >= BLOCK_BYTES:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def _one_after_the_other(records: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Columns of all users; beside each, under NAME.at, where every user begins and the last one ends."""
    shapes = {name: part[:0] for columns in records for name, part in columns.items()}
    together = {}
    for name, nothing in shapes.items():
        parts = [columns.get(name, nothing).cpu() for columns in records]
        together[name] = torch.cat(parts)
        lengths = torch.tensor([0, *(len(part) for part in parts)])
        together[f"{name}.at"] = lengths.cumsum(0)
    return together
