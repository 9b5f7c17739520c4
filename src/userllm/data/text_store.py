"""Sentence embeddings of texts, each distinct text once: a memory-mapped float16 table on disk.

    card.json       which encoder made it
    texts.jsonl     one text per line, as a JSON string; line n is row n
    vectors.f16     [rows, s] float16

Both long files only ever grow at their end, so an interrupted encoding goes on where it stopped: what one of them has
and the other lacks is cut off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from userllm.errors import UserError
from userllm.whole_file import write_text

FORMAT_VERSION = 1
_BLOCK = 1024  # texts between two writes: what an interruption can cost

Encode = Callable[[Sequence[str]], np.ndarray]
"""Texts [n] -> vectors [n, s]."""


@dataclass(frozen=True)
class SentenceEncoderCard:
    """Which sentence encoder a store is of: its name, a hash of its weights and settings, its width s."""

    name: str
    sha256: str
    width: int


class TextStore:
    """The store in ``folder``. Make one with ``open`` (to add texts) or ``read`` (as it is)."""

    def __init__(self, folder: Path, encoder: SentenceEncoderCard):
        self.folder = folder
        self.encoder = encoder
        self._row: dict[str, int] = {}
        self._recover()

    @classmethod
    def open(cls, folder: Path, encoder: SentenceEncoderCard) -> TextStore:
        """The store of this encoder, made where there is none. Raises UserError for one that another encoder made."""
        if not (folder / "card.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            card = json.dumps({"format_version": FORMAT_VERSION, **asdict(encoder)}, indent=1)
            write_text(folder / "card.json", card + "\n")
        store = cls.read(folder)
        made = store.encoder
        if (made.sha256, made.width) != (encoder.sha256, encoder.width):
            raise UserError(
                f"{folder}: these embeddings were made by {made.name} (sha256 {made.sha256[:12]}, width {made.width}), "
                f"not by {encoder.name} (sha256 {encoder.sha256[:12]}, width {encoder.width}); vectors of two encoders "
                "cannot be mixed: remove the folder, or name the encoder that made it"
            )
        return store

    @classmethod
    def read(cls, folder: Path) -> TextStore:
        """The store in a folder. Raises UserError where there is none."""
        file = folder / "card.json"
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            version = raw.pop("format_version")
            encoder = SentenceEncoderCard(**raw)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file}: not the card of a text store ({error}); encode the texts again"
            ) from error
        if version != FORMAT_VERSION:
            raise UserError(f"{file}: format_version is {version}, this userllm reads {FORMAT_VERSION}")
        return cls(folder, encoder)

    def _recover(self) -> None:
        """Read the texts; of a cut-off writing only whole lines that have a vector count."""
        lines = self._texts.read_bytes().split(b"\n")[:-1] if self._texts.exists() else []
        whole = self._vectors.stat().st_size // self._row_bytes if self._vectors.exists() else 0
        try:
            texts = [json.loads(line) for line in lines[:whole]]
        except ValueError as error:
            raise UserError(
                f"{self._texts}: damaged ({error}); remove {self.folder} and run again"
            ) from error
        self._row = {text: row for row, text in enumerate(texts)}
        self._bytes = sum(len(line) + 1 for line in lines[:whole])

    @property
    def _texts(self) -> Path:
        return self.folder / "texts.jsonl"

    @property
    def _vectors(self) -> Path:
        return self.folder / "vectors.f16"

    @property
    def _row_bytes(self) -> int:
        return 2 * self.encoder.width

    def __len__(self) -> int:
        return len(self._row)

    @property
    def vectors(self) -> np.ndarray:
        """[rows, s] float16, memory-mapped: what is not looked at is not read. Changes stay in memory."""
        shape = (len(self), self.encoder.width)
        if not len(self):
            return np.zeros(shape, dtype=np.float16)
        return np.memmap(self._vectors, dtype=np.float16, mode="c", shape=shape)

    def missing(self, texts: Iterable[str | None]) -> list[str]:
        """The distinct texts that have no vector yet, shortest first (alike lengths are encoded together)."""
        return sorted({text for text in texts if text is not None and text not in self._row}, key=len)

    def add(
        self,
        texts: Iterable[str | None],
        encode: Encode,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> int:
        """Encode what is missing and write it; returns how many texts that were.

        progress: called with the texts encoded and their number, after each block. One process at a time may add.
        """
        missing = self.missing(texts)
        if not missing:
            return 0
        with open(self._texts, "ab") as lines, open(self._vectors, "ab") as table:
            lines.truncate(self._bytes)
            table.truncate(len(self) * self._row_bytes)
            for start in range(0, len(missing), _BLOCK):
                block = missing[start : start + _BLOCK]
                vectors = np.ascontiguousarray(encode(block), dtype="<f2")
                if vectors.shape != (len(block), self.encoder.width):
                    raise ValueError(
                        f"the encoder gave {vectors.shape}, not {(len(block), self.encoder.width)}"
                    )
                self._append(lines, table, block, vectors)
                progress(start + len(block), len(missing))
        return len(missing)

    def _append(self, lines, table, texts: list[str], vectors: np.ndarray) -> None:
        written = "".join(f"{json.dumps(text, ensure_ascii=False)}\n" for text in texts).encode()
        table.write(vectors.tobytes())
        table.flush()
        lines.write(written)
        lines.flush()
        self._bytes += len(written)
        self._row |= {text: row for row, text in enumerate(texts, len(self._row))}

    def rows(self, texts: Sequence[str | None]) -> np.ndarray:
        """Row of each text [n], int64; -1 for None. Raises UserError for a text that has no vector."""
        try:
            return np.array([-1 if text is None else self._row[text] for text in texts], dtype=np.int64)
        except KeyError as error:
            shown = str(error.args[0])[:60]
            raise UserError(
                f"{self.folder}: no embedding of the text {shown!r}; encode the texts again"
            ) from error

    def copy(self, folder: Path, texts: Iterable[str | None]) -> TextStore:
        """A new store in ``folder`` with these texts alone."""
        kept = list(dict.fromkeys(text for text in texts if text is not None))
        table = self.vectors
        row_of = {text: self._row[text] for text in kept if text in self._row}
        self.rows(kept)
        other = TextStore.open(folder, self.encoder)
        other.add(kept, lambda block: np.asarray(table[[row_of[text] for text in block]]))
        return other
