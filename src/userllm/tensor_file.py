"""Tensors as one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from userllm.errors import UserError


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write one file, whole or not at all, with the rights of any new file. Raises UserError where there is no room."""
    partial = file.with_name(f".{file.name}.partial")
    partial.touch()
    as_usual = partial.stat().st_mode
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{file}: cannot be written ({error}); make room there, or choose another place"
        ) from error
    os.chmod(partial, as_usual)  # safetensors makes files that their owner alone can read
    os.replace(partial, file)


def give_usual_rights(folder: Path, like: Path) -> None:
    """Of the safetensors files below a folder that other libraries wrote: those of the file ``like``."""
    for file in folder.rglob("*.safetensors"):
        os.chmod(file, like.stat().st_mode)
