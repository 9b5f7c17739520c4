"""userllm's commands on a pretended accelerator: CPU tensors that say they are elsewhere, and refuse what a GPU does.

    python tests/accelerator/pretend.py 'run demo.yaml' 'recommend runs/demo --user 8'

A tensor there may not be mixed with one that is here (other than a number, or indices into it), and has no numpy view.
torch takes it for its accelerator, so that whatever asks for one finds it. Its kernels are the CPU's: it shows that
tensors are where they have to be, not what a GPU's own kernels compute. Once registered it stays for as long as the
process lives, so tests start this file.
"""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

import safetensors.torch
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

KIND = "pretend"
aten = torch.ops.aten
MOVES = (aten.copy_.default, aten._to_copy.default)
TAKES_INDICES = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
NEEDS_STORAGE = (
    torch.Tensor.untyped_storage,
    torch.Tensor.storage,
    torch.Tensor._typed_storage,
    torch.Tensor.data_ptr,
)

kernels = 0
"""How many ran there."""


class Elsewhere(torch.Tensor):
    """A tensor of the pretended accelerator, around one of the CPU."""

    value: torch.Tensor

    @staticmethod
    def __new__(cls, value: torch.Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=torch.device(KIND),
            requires_grad=value.requires_grad,
        )
        return made

    def __init__(self, value: torch.Tensor):
        self.value = value

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.value!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kernel(func, args, kwargs or {})


def here(value: Any) -> Any:
    """The CPU's tensor of one that is elsewhere; anything else as it is."""
    return value.value if isinstance(value, Elsewhere) else value


def kernel(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, where its tensors are."""
    global kernels
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    astray = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim() > 0]
    if there and astray and func not in (*MOVES, *TAKES_INDICES):
        shapes = [(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]
        raise RuntimeError(f"{func}: tensors on two devices: {shapes}")
    stays = bool(there)
    args_here, kwargs_here = tree_map(here, args), tree_map(here, kwargs)
    if (device := kwargs.get("device")) is not None:
        stays = torch.device(device).type == KIND
        if stays:
            kwargs_here["device"] = torch.device("cpu")
    kernels += stays
    found = func(*args_here, **kwargs_here)
    if func is aten.copy_.default:
        return args[0]
    if func is aten._to_copy.default and found is args_here[0]:
        found = found.clone()
    if not stays:
        return found
    found = tree_map(lambda value: Elsewhere(value) if isinstance(value, torch.Tensor) else value, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if there else found


class Kernels(TorchDispatchMode):
    """Also operations that no tensor of the accelerator goes into: they may make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kernel(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What torch does by itself for an accelerator, and does not for tensors made in Python."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Elsewhere):
            if func is torch.Tensor.numpy:
                raise TypeError("a tensor of an accelerator has no numpy view; move it to the CPU first")
            if func is torch.Tensor.tolist or func in NEEDS_STORAGE:
                return func(args[0].detach().value)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def main(commands: list[str]) -> None:
    """Run each command; say how many kernels ran there."""
    _setup_privateuseone_for_python_backend(KIND)
    os.environ["ACCELERATE_TORCH_DEVICE"] = KIND  # the Trainer's
    torch.autograd.set_multithreading_enabled(False)  # the engine has no thread for it
    write = safetensors.torch._flatten_as_ptr

    def write_from_here(tensors: dict[str, torch.Tensor], *rest: Any) -> Any:
        return write({name: value.cpu() for name, value in tensors.items()}, *rest)

    safetensors.torch._flatten_as_ptr = write_from_here
    from userllm.cli import main as userllm

    with Functions(), Kernels():
        for command in commands:
            if userllm(shlex.split(command)) != 0:
                raise SystemExit(f"{command}: failed")
    print(f"kernels on {KIND}: {kernels}")


if __name__ == "__main__":
    main(sys.argv[1:])
