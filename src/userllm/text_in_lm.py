"""Texts of several users inside a contextualised language model, read on token by token: what decoding works on.

    TextInLM      a row of the LM's batch per text; keys and values are copied to the rows that go on from them
    TextTreeInLM  a row per user, which holds all their texts as branches behind the prompt; nothing is copied

A user's beams share what stands before the answer. As rows of their own, each of them carries keys and values of a
history of hundreds of tokens along, copied anew at every step; as branches they share one.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from userllm.fusion.attach import UserContext
from userllm.fusion.source import Source, copied_cache, new_cache
from userllm.language_models.products import products_are_rounded

if TYPE_CHECKING:
    from userllm.contextual import ContextualLM


def reads_trees(model: ContextualLM) -> bool:
    """Whether the LM reads texts side by side as it reads each alone, told what each token sees and where it stands.

    It is tried on a few tokens. LMs whose layers forget (sliding windows; GPT-Neo's, which no cache tells of) or that
    count their tokens themselves do not, and an encoder-decoder is not asked.
    """
    lm, text_config = model.lm, model.lm.config.get_text_config()
    if (
        model.has_encoder
        or "local" in getattr(text_config, "attention_layers", ())
        or any(
            isinstance(layer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=lm.config).layers
        )
        or text_config._attn_implementation not in ("sdpa", "eager")  # others take no mask of one's own
        or "position_ids" not in inspect.signature(lm.get_decoder().forward).parameters
    ):
        return False
    prompt, branch, other, further = (
        torch.arange(4, device=lm.device)[:, None, None] * 7919 % text_config.vocab_size
    )
    training = lm.training
    lm.eval()
    with torch.no_grad(), model.without_user():
        alone = model.hidden(torch.cat([prompt, other, further], dim=1))[:, -1]
        cache = DynamicCache(config=lm.config)
        model.hidden(prompt, None, cache)
        sees = torch.tensor([[[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]], dtype=torch.bool, device=lm.device)
        positions = torch.tensor([[1, 1, 2]], device=lm.device)
        text = torch.cat([branch, other, further], dim=1)
        beside = model.hidden(text, None, cache, sees, positions=positions)[:, -1]
    lm.train(training)
    off = float((alone - beside).float().norm() / alone.float().norm())
    rounds = lm.dtype not in (torch.float32, torch.float64) or products_are_rounded(lm)
    return off < (5e-2 if rounds else 1e-3)  # another text is off by .3


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
        self.lower = model.lower.get(task) if replay else None
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
        """Read on, the same number of tokens in every row; the hidden states of the last one, [R, D]."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(input_ids, dtype=torch.bool)], dim=1)
        hidden = self.model.hidden(input_ids, states, self.cache, self.mask, self.source)
        self._stand_in(states)
        return hidden[:, -1]

    def _stand_in(self, states: Tensor | None) -> None:
        """Keep the length of layers that were skipped."""
        if states is not None and isinstance(self.cache, DynamicCache):
            # skipped layers cache nothing; the LM reads its text length off the first layer, so leave a stand-in there
            stand_in = torch.zeros(*states.shape[:1], 1, states.shape[1], 1, device=states.device)
            for layer in self.cache.layers[: self.model.attachment.first]:
                assert isinstance(layer, DynamicLayer)
                layer.update(stand_in, stand_in)


class TextTreeInLM(TextInLM):
    """The same, with all texts of a user in one row: see ``reads_trees`` for the LMs that can.

    Each step appends one token per text. A token sees the prompt and the tokens of its own text, and stands where it
    would stand in that text alone.
    """

    def start(self, prompt_ids: Tensor) -> Tensor:
        """Read the prompt for every user: [B, D]."""
        hidden = super().start(prompt_ids)
        before = self.cache.get_seq_length() if self.mask is None else self.mask.shape[1]
        self._before = (
            hidden.new_ones(self.users, before, dtype=torch.bool) if self.mask is None else self.mask
        )
        self._own = hidden.new_zeros(self.users, 1, 0, dtype=torch.bool)
        self._depth = 0
        return hidden

    def advance(self, tokens: Tensor, nodes: Tensor, parents: Tensor) -> Tensor:
        """One more token for texts that continue ``parents``: [R, D]."""
        users, before = len(self._own), self._own.shape[1]
        count = len(tokens) // users
        parents = parents.view(users, count) - before * torch.arange(users, device=parents.device)[:, None]
        own = self._own.gather(1, parents[..., None].expand(-1, -1, self._own.shape[2]))
        itself = torch.eye(count, dtype=torch.bool, device=own.device).expand(users, -1, -1)
        self._own = torch.cat([own, itself], dim=2)
        seen = torch.cat([self._before[:, None].expand(-1, count, -1), self._own], dim=2)
        positions = (self._before.sum(1) + self._depth)[:, None].expand(-1, count)
        self._depth += 1
        states = None
        if self.lower is not None:
            states = self.lower.nodes[self.lower.row[nodes]].view(users, count, -1)
        hidden = self.model.hidden(tokens.view(users, count), states, self.cache, seen, None, positions)
        self._stand_in(states)
        return hidden.flatten(0, 1)

    def fork(self) -> TextInLM:
        """Raises NotImplementedError: a tree is not copied."""
        raise NotImplementedError("a tree of texts is not forked; use TextInLM")
