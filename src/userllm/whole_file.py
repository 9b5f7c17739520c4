"""Files that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Inside, where to write; afterwards that takes the place of ``file``, if nothing was raised."""
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")  # two writers do not meet there
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """A text in UTF-8 as a file."""
    with whole(file) as partial:
        partial.write_text(text, encoding="utf-8")
