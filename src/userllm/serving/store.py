"""Records of users on disk: memory-mapped, one file per block of users, each there whole or not at all.

    card.json                       which model and dataset, what is kept, how exactly
    000001-3f2a9c0d.safetensors     the records of some users; of a user who is in several files the last counts

A file holds every column of its records one user after the other, and beside a column where each user begins. So
reading a user reads their rows alone, adding users writes one new file, and whoever is killed loses a block at most.
Processes may add to one store at the same time as long as no two add the same user.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
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
"""A file with fewer users than this is put together with others, once there are as many such files."""


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
        for file in sorted(folder.glob("*.safetensors")):
            self._take_in(file)

    @classmethod
    def open(cls, folder: Path | str, card: StoreCard) -> UserStore:
        """The store that ``card`` describes, made where there is none.

        Raises UserError where the folder holds something else, or a store of another model or another dataset, or one
        that keeps other things.
        """
        folder = Path(folder)
        if not (folder / "card.json").is_file():
            if folder.exists() and any(folder.iterdir()):
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

    def write_card(self) -> None:
        """Put ``card`` on the disk."""
        write_text(self.folder / "card.json", json.dumps(asdict(self.card), indent=1) + "\n")

    def _take_in(self, file: Path) -> None:
        block = _Block(file)
        self._blocks[file] = block
        self._place |= {user: (file, row) for row, user in enumerate(block.users)}

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
        if not records:
            return
        # others may have written since this store was opened, and the latest record of a user is to count
        latest = max((int(file.name.split("-")[0]) for file in self.folder.glob("*.safetensors")), default=0)
        file = self.folder / f"{latest + 1:06d}-{secrets.token_hex(4)}.safetensors"
        tensors = _one_after_the_other([record.columns() for record in records])
        floats = getattr(torch, self.card.dtype)
        tensors = {name: t.to(floats) if t.is_floating_point() else t for name, t in tensors.items()}
        users = [record.user for record in records]
        if None in users:
            raise ValueError("a record in a store needs its user's name")
        save_tensors(tensors, file, {"users": json.dumps(users, ensure_ascii=False)})
        self._take_in(file)

    def put_all(self, records: Iterable[UserRecord]) -> Iterator[int]:
        """The same for as many as there are, file by file; yields how many users each file holds, once it is there."""
        waiting: list[UserRecord] = []
        size = 0
        for record in records:
            waiting.append(record)
            size += sum(column.nbytes for column in record.columns().values())
            if len(waiting) == BLOCK_USERS or size >= BLOCK_BYTES:
                self.put(waiting)
                yield len(waiting)
                waiting, size = [], 0
        self.put(waiting)
        yield len(waiting)

    def compact(self) -> None:
        """Put files together that few users are in, or mostly users of whom there are newer records; remove what an
        interruption has left half written, an hour ago or earlier: what is younger, another process may be writing.
        """
        for leftover in self.folder.glob(".*.partial"):
            with suppress(FileNotFoundError):  # another process tidies up, too
                if time.time() - leftover.stat().st_mtime > LEFT_BEHIND:
                    leftover.unlink()
        live: dict[Path, list[str]] = {file: [] for file in self._blocks}
        for user, (file, _) in self._place.items():
            live[file].append(user)
        worn = [file for file, own in live.items() if 2 * len(own) <= len(self._blocks[file].users)]
        few = [file for file, own in live.items() if len(own) < FEW_USERS and file not in worn]
        old = worn + (few if len(few) >= FEW_USERS else [])
        moved = sum(self.put_all(self[user] for file in old for user in live[file]))
        assert moved == sum(len(live[file]) for file in old)
        for file in old:
            del self._blocks[file]
            file.unlink(missing_ok=True)


class _Block:
    """One file, memory-mapped."""

    def __init__(self, file: Path):
        try:
            self._open: Any = safe_open(file, framework="pt")
            self.users: list[str] = json.loads(self._open.metadata()["users"])
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
