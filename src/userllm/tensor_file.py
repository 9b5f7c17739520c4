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
    """Write one file, whole or not at all, with the rights of any new file. Raises UserError where there is no room.

    Tensors that share memory (tied weights) are written each by itself.
    """
    own: dict[str, Tensor] = {}
    taken: set[int] = set()  # of memory
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    partial = file.with_name(f".{file.name}.partial")
    partial.touch()
    as_usual = partial.stat().st_mode
    try:
        save_file(own, partial, metadata)
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
