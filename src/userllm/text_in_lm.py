"""Texts of several users inside a contextualised language model, read on token by token: what decoding works on."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from userllm.fusion.attach import UserContext
from userllm.fusion.source import Source, copied_cache, new_cache

if TYPE_CHECKING:
    from userllm.contextual import ContextualLM


class TextInLM:
    """The texts of B users, k rows each, inside the LM: key-value cache, and replayed lower states where stored.

    context: the users themselves, needed where something of theirs stands before the prompt.
    """

    def __init__(
        self,
        model: ContextualLM,
        users: int,
        task: str,
        replay: bool = True,
        context: UserContext | None = None,
    ):
        self.model = model
        self.users = users
        self.task = task
        self.context = context
        self.lower = model._lower.get(task) if replay else None
        self.cache = new_cache(model.lm)
        self.mask: Tensor | None = None
        self.source: Source | None = None

    def start(self, prompt_ids: Tensor) -> Tensor:
        """Read the prompt for every user: [B, D]."""
        states = None
        if self.lower is not None:
            states = torch.cat([self.lower.prompt, self.lower.nodes[self.lower.row[0]][None]])
            states = states.expand(self.users, -1, -1)
        ids = prompt_ids.expand(self.users, -1)
        if self.model.has_encoder:
            self.source = self.model.source_of(self.task, self.context, self.users)
            return self._read(ids, None)
        if self.context is not None and self.context.prefix is not None:
            self.cache, self.mask = self.model.read_prompt(ids[:, :-1], self.context)
            ids = ids[:, -1:]
        elif self.model.reads_ahead and len(prompt_ids) > 1:
            self.cache = self.model.prompt_cache(self.task, self.users, states is not None)
            ids, states = ids[:, -1:], None if states is None else states[:, -1:]
        return self._read(ids, states)

    def advance(self, tokens: Tensor, nodes: Tensor, parents: Tensor) -> Tensor:
        """One more token for rows that continue ``parents``: [R, D]."""
        self.cache.batch_select_indices(parents)
        self.mask = None if self.mask is None else self.mask[parents]
        self.source = None if self.source is None else self.source.select(parents)
        states = None if self.lower is None else self.lower.nodes[self.lower.row[nodes]][:, None]
        return self._read(tokens[:, None], states)

    def fork(self) -> TextInLM:
        """The same texts once more, to be continued in another way."""
        other = copy.copy(self)
        other.cache = copied_cache(self.cache)
        return other

    def _read(self, input_ids: Tensor, states: Tensor | None) -> Tensor:
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(input_ids, dtype=torch.bool)], dim=1)
        hidden = self.model._hidden(input_ids, states, self.cache, self.mask, self.source)
        if states is not None and isinstance(self.cache, DynamicCache):
            # skipped layers cache nothing; the LM reads its text length off the first layer, so leave a stand-in there
            stand_in = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1, device=hidden.device)
            for layer in self.cache.layers[: self.model.attachment.first]:
                assert isinstance(layer, DynamicLayer)
                layer.update(stand_in, stand_in)
        return hidden[:, -1]
