"""Attaching cross-attention to any Hugging Face causal language model, and taking it off again.

        layer 0 .. first-1      |  layer i (fused)
        [ReplayLayer: layer]    |  [FusedLayer: block -> layer]

``attach`` replaces decoder layers in place by wrappers; ``detach`` puts the very same layers back. The wrappers read
the current user from one shared ``Slot``. A fused LM that is called while the slot is empty raises, so that no
measurement is ever made without a user by mistake; ``without_user`` says so on purpose.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from userllm.errors import UserError
from userllm.fusion.catalogue import LikelyItems
from userllm.fusion.cross_attention import CrossAttentionBlock
from userllm.fusion.prefix import Prefix


@dataclass
class UserContext:
    """The users a fused LM is talking to: a value, made once and passed around.

    tokens [B, M, U], mask [B, M]. Keys and values are projected at most once per block and live here, so that they go
    when the context goes. ``prefix`` stands before the prompt; ``likely`` is what the encoder says of the
    catalogue's items, for ``CatalogueWeights``.
    ``recorded`` collects attention weights per layer where a list is given.
    """

    tokens: Tensor
    mask: Tensor
    prefix: Prefix | None = None
    likely: LikelyItems | None = None
    keys_values: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    recorded: dict[int, list[Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def for_block(self, index: int, block: CrossAttentionBlock) -> tuple[Tensor, Tensor]:
        """Keys and values of one block."""
        if index not in self.keys_values:
            self.keys_values[index] = block.project_users(self.tokens)
        return self.keys_values[index]

    def select(self, users: Tensor) -> UserContext:
        """The context of some of the users, in the order given; projected keys and values are kept."""
        kept = {i: (k[users], v[users]) for i, (k, v) in self.keys_values.items()}
        prefix = None if self.prefix is None else self.prefix.select(users)
        likely = None if self.likely is None else self.likely.select(users)
        return UserContext(self.tokens[users], self.mask[users], prefix, likely, kept)


@dataclass
class Slot:
    """What the wrappers of one LM share: the current user, and states to replay below the first fused layer."""

    context: UserContext | None = None
    without_user: bool = False
    replay: Tensor | None = None


class Turn:
    """One thread at a time: a fused LM has one slot for its user. Taken again by the thread that has it. A copy of the
    model has one of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


class FusedLayer(nn.Module):
    """Cross-attention to the user, then the language model's own layer. Unknown attributes are the layer's."""

    def __init__(self, block: CrossAttentionBlock, layer: nn.Module, index: int, slot: Slot):
        super().__init__()
        self.user_block = block
        self.layer = layer
        self.index = index
        self.slot = slot

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        slot = self.slot
        if slot.context is not None:
            keys, values = slot.context.for_block(self.index, self.user_block)
            if slot.context.recorded is not None:
                weights = self.user_block.attention(hidden_states, keys, slot.context.mask)
                slot.context.recorded.setdefault(self.index, []).append(weights.detach())
            hidden_states = self.user_block(hidden_states, keys, values, slot.context.mask)
        elif not slot.without_user:
            raise RuntimeError(
                "this language model is fused with user cross-attention: call it inside model.conditioned(users), "
                "or inside model.without_user() to leave the user out on purpose"
            )
        return self.layer(hidden_states, *args, **kwargs)


class ReplayLayer(nn.Module):
    """A layer below the first fused one: its output cannot depend on the user, so it can be replayed from a store."""

    def __init__(self, layer: nn.Module, index: int, slot: Slot):
        super().__init__()
        self.layer = layer
        self.index = index
        self.slot = slot
        self.returns_tuple = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.slot.replay is None:
            output = self.layer(hidden_states, *args, **kwargs)
            self.returns_tuple = isinstance(output, tuple)
            return output
        # the first layer swaps the embeddings for the stored states, the others hand them on
        states = self.slot.replay if self.index == 0 else hidden_states
        return (
            (states,) if self.returns_tuple else states
        )  # as the layer itself did when the states were stored


def find_layers(lm: nn.Module) -> nn.ModuleList:
    """The LM's decoder layers, found by structure: the one ModuleList as long as ``num_hidden_layers``.

    Lists inside its layers do not count. Raises UserError where there is none or more than one.
    """
    if getattr(lm.config, "is_encoder_decoder", False):
        lm = lm.get_decoder()  # type: ignore[operator]
    text_config = lm.config.get_text_config()  # type: ignore[union-attr, operator]
    count = text_config.num_hidden_layers
    lists = {n: m for n, m in lm.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    found = [m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)]
    if len(found) != 1:
        raise UserError(
            f"{type(lm).__name__}: expected one list of {count} decoder layers, found {len(found)}; "
            "this architecture cannot be fused"
        )
    return found[0]


class Attachment:
    """Cross-attention blocks attached to a language model.

    ``blocks`` maps the index of each fused layer to its block; without any, nothing is attached. The language model
    must have its LoRA adapters, if any, before it is attached.
    """

    def __init__(self, lm: PreTrainedModel, blocks: dict[int, CrossAttentionBlock]):
        self.slot = Slot()
        self.turn = Turn()
        self.layers = find_layers(lm)
        self.blocks = dict(sorted(blocks.items()))
        if not all(0 <= i < len(self.layers) for i in blocks):
            raise UserError(
                f"fused layers {sorted(blocks)} do not fit a language model of {len(self.layers)} layers"
            )
        self.first = min(blocks, default=0)
        self.attached = False
        self.attach()

    def attach(self) -> None:
        """Put the wrappers in place."""
        if self.attached:
            raise RuntimeError("already attached")
        for index, layer in enumerate(list(self.layers)):
            if index in self.blocks:
                self.layers[index] = FusedLayer(self.blocks[index], layer, index, self.slot)
            elif index < self.first:
                self.layers[index] = ReplayLayer(layer, index, self.slot)
        self.attached = True

    def detach(self) -> None:
        """Put the LM's own layers back; the blocks stay here."""
        for index, layer in enumerate(list(self.layers)):
            if isinstance(layer, FusedLayer | ReplayLayer):
                self.layers[index] = layer.layer
        self.attached = False

    @contextmanager
    def detached(self) -> Iterator[None]:
        """The plain language model for the length of a ``with`` block (to save it, for instance)."""
        with self.turn:
            self.detach()
            try:
                yield
            finally:
                self.attach()

    @contextmanager
    def conditioned(self, context: UserContext) -> Iterator[UserContext]:
        """Calls inside the ``with`` block attend to these users; another thread's wait until it ends."""
        with self._set(context=context, without_user=False):
            yield context

    @contextmanager
    def without_user(self) -> Iterator[None]:
        """Calls inside the ``with`` block skip every cross-attention block."""
        with self._set(context=None, without_user=True):
            yield

    @contextmanager
    def replaying(self, states: Tensor | None) -> Iterator[None]:
        """Calls inside take ``states`` [R, T, D] as the output of the layers below the first fused one."""
        with self._set(replay=states):
            yield

    @contextmanager
    def _set(self, **values: Any) -> Iterator[None]:
        with self.turn:
            before = {name: getattr(self.slot, name) for name in values}
            for name, value in values.items():
                setattr(self.slot, name, value)
            try:
                yield
            finally:
                for name, value in before.items():
                    setattr(self.slot, name, value)

    @torch.no_grad()
    def lower_states(self, lm: PreTrainedModel, input_ids: Tensor) -> Tensor:
        """Hidden states [R, T, D] that enter the first fused layer, for texts [R, T] padded on the right."""
        if self.first == 0:
            raise ValueError("no layer lies below the first fused one: there are no states to store")
        captured: list[Tensor] = []

        def capture(_module: nn.Module, args: tuple[Any, ...]) -> None:
            captured.append(args[0])
            raise _StopForward

        with self.without_user():  # no other thread may meet the hook
            handle = self.layers[self.first].register_forward_pre_hook(capture)
            try:
                lm.get_decoder()(input_ids=input_ids, use_cache=False)
            except _StopForward:
                pass  # the layers above are not needed
            finally:
                handle.remove()
        return captured[0]


class _StopForward(Exception):
    """Ends a forward pass at the first fused layer."""
