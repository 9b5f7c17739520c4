"""FSDP2: a model's weights, gradients and optimiser state spread over the processes, by torch's ``fully_shard``.

The design's rule: each decoder layer of the language model is a unit, the cross-attention block before it another; a
unit's weights are whole only while it works. All else, the user encoder and the (tied) embeddings of the language model
among it, is one group, whole from the beginning of a forward pass to the end of its backward pass.

Checkpoints hold whole tensors: what several processes wrote another number of them can read, sharded or not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from userllm import processes
from userllm.contextual import ContextualLM
from userllm.errors import UserError
from userllm.fusion.attach import FusedLayer, ReplayLayer
from userllm.fusion.cross_attention import CrossAttentionBlock


def units_of(model: ContextualLM) -> list[nn.Module]:
    """What is sharded by itself: the cross-attention blocks, and the LM's layers, those of its encoder included."""
    decoder = model.attachment.layers
    kinds = {type(x.layer if isinstance(x, FusedLayer | ReplayLayer) else x) for x in decoder}
    layers = [module for module in model.lm.modules() if type(module) in kinds]
    return [*model.attachment.blocks.values(), *layers]


def shard(model: nn.Module, units: Iterable[nn.Module]) -> None:
    """Spread the weights of ``model``, in place, over all processes: those of each of the units, then the others.

    Raises UserError where there is one process, or trainable weights of one group differ in precision.
    """
    if processes.count() < 2:
        raise UserError(
            "FSDP spreads a model over several processes; start them with torchrun or accelerate launch"
        )
    # users' keys and values are views, and nothing is changed in place
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    units = list(units)
    mesh = init_device_mesh(processes.device().type, (processes.count(),))
    for unit in units:
        fully_shard(unit, mesh=mesh)
        if isinstance(unit, CrossAttentionBlock):
            register_fsdp_forward_method(unit, "project_users")
    inside = {id(weight) for unit in units for weight in unit.parameters()}
    kinds = {w.dtype for w in model.parameters() if w.requires_grad and id(w) not in inside}
    if len(kinds) > 1:
        raise UserError(
            "FSDP: the language model's embeddings and the user encoder are trained together, so both have to be "
            "float32; set lm.dtype to it"
        )
    fully_shard(model, mesh=mesh)
    # to the Trainer's libraries: it is where it belongs and needs no wrapper
    model._is_accelerate_prepared = True  # type: ignore[assignment]


def is_sharded(model: nn.Module) -> bool:
    """Whether ``shard`` was called."""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, parts of ``model`` that are no units can be called by themselves, not only by its forward pass."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    yield
    model.reshard()


def whole(weight: Tensor) -> Tensor:
    """All of a weight, of which this process may hold a share; then every process has to ask for it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def kept(value: Tensor) -> Tensor:
    """A whole tensor as the main process keeps it to write it; the others do not."""
    return value.contiguous().cpu() if processes.is_main() else value.new_empty(0)


def share_like(value: Tensor, weight: Tensor) -> Tensor:
    """This process's share of ``value``, the same whole tensor in all processes, spread as ``weight`` is."""
    if not isinstance(weight, DTensor):
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)


def keep_whole_states(optimizer: torch.optim.Optimizer) -> None:
    """State dicts of the optimiser of a sharded model hold whole tensors from now on, in the main process."""

    def gather(_: Any, said: dict[str, Any]) -> dict[str, Any]:
        state = {
            place: {n: kept(whole(value)) if isinstance(value, Tensor) else value for n, value in one.items()}
            for place, one in said["state"].items()
        }
        return said | {"state": state}

    def spread(_: Any, said: dict[str, Any]) -> dict[str, Any]:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        state = {
            place: {
                # a count of steps is everybody's
                name: share_like(value, weights[place]) if value.shape == weights[place].shape else value
                for name, value in one.items()
            }
            for place, one in said["state"].items()
        }
        return said | {"state": state}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(spread)
