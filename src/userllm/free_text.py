"""Free text inside a contextualised language model: how likely a given text is for a user, and new ones.

    [ padding | the user's prefix | prompt ]  then  target, end of text, padding

Prompts differ from example to example. What is padded before the target stands on the left of everything, as in
``fusion.prefix``; behind the target no position sees it. Which part attends to user tokens is what ``fusion.attend``
says: all of it, or the prompt's last token and what follows. ``fusion.catalogue`` has nothing to say here: it speaks
only where an item is being named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache

from userllm.decoding.next_token import TextDecoding
from userllm.errors import UserError
from userllm.fusion.attach import UserContext
from userllm.fusion.prefix import Prefix
from userllm.fusion.source import Source, decoder_start, new_cache, read_source

if TYPE_CHECKING:
    from userllm.contextual import ContextualLM

_ROWS = 1024
"""Rows of logits [rows, V] computed at once."""


def text_losses(
    model: ContextualLM,
    prompts: Sequence[str],
    targets: Sequence[str],
    users: UserContext | None,
    most: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [E], in nats, of targets behind their prompts, and the targets' tokens [E].

    users: one per text, one for all, or None for the base LM. The softmax runs over the whole vocabulary. A target
    begins as a word behind others and ends with the end of text; of a longer one the first ``most`` tokens count,
    without its end.
    """
    _one_or_each(users, prompts)
    ids, real = _targets(model, targets, most)
    prompt, source = _prompts(model, prompts, users)
    body = torch.cat([prompt.embeddings[:, -1:], model._embed(ids[:, :-1])], dim=1)
    read = prompt.embeddings[:, :-1]
    mask = torch.cat([prompt.mask[:, :-1], torch.ones_like(real)], dim=1)
    cache = None
    if model.reads_ahead and read.shape[1] > 0:
        cache = _read(model, read, prompt.mask[:, :-1], None)
    else:
        body = torch.cat([read, body], dim=1)
    with model.conditioned_or_not(users):
        hidden = model.hidden(body, None, cache, mask, source)[:, -ids.shape[1] :]
    row, place = torch.nonzero(real, as_tuple=True)
    nll = torch.zeros(len(ids), device=ids.device)
    for some in torch.arange(len(row), device=ids.device).split(_ROWS):
        logits = model.head(hidden[row[some], place[some]]).float()
        losses = F.cross_entropy(logits, ids[row[some], place[some]], reduction="none")
        nll = nll.index_add(0, row[some], losses)
    return nll, real.sum(1)


@dataclass
class _Writing:
    """The texts that are still being written: their row among all, the users, and what the LM has read of them."""

    rows: Tensor
    users: UserContext | None
    cache: DynamicCache | EncoderDecoderCache
    mask: Tensor
    source: Source | None

    def select(self, kept: Tensor) -> _Writing:
        self.cache.batch_select_indices(kept)
        users = None if self.users is None else self.users.select(kept)
        source = None if self.source is None else self.source.select(kept)
        return _Writing(self.rows[kept], users, self.cache, self.mask[kept], source)


@torch.no_grad()
def write_texts(
    model: ContextualLM,
    prompts: Sequence[str],
    users: UserContext | None,
    decoding: TextDecoding,
    numbers: Sequence[int] | None = None,
) -> list[str]:
    """One text behind each prompt, without its leading space.

    users: one per prompt, one for all, or None for the base LM. numbers: of the texts, by which each has draws of its
    own (by default their places).
    """
    decoding.check()
    _one_or_each(users, prompts)
    if not prompts:
        return []
    if users is not None and len(users) != len(prompts):
        users = users.select(torch.zeros(len(prompts), dtype=torch.long, device=users.tokens.device))
    prompt, source = _prompts(model, prompts, users)
    everyone = torch.arange(len(prompts), device=prompt.mask.device)
    draws = decoding.draws(numbers if numbers is not None else range(len(prompts))).to(everyone.device)
    cache = _read(model, prompt.embeddings[:, :-1], prompt.mask[:, :-1], None if model.reads_ahead else users)
    writing = _Writing(everyone, users, cache, prompt.mask, source)
    tokens = torch.full((len(prompts), decoding.max_new_tokens), -1, device=everyone.device)
    new, end = prompt.embeddings[:, -1:], _end_of_text(model)
    for step in range(decoding.max_new_tokens):
        with model.conditioned_or_not(writing.users):
            hidden = model.hidden(new, None, writing.cache, writing.mask, writing.source)
        logits = decoding.allowed(model.head(hidden[:, -1]).float(), tokens[writing.rows, :step], end)
        chosen = decoding.choose(logits, draws[writing.rows, step])
        over = tokens[writing.rows, step - 1] == end if step else torch.zeros_like(chosen, dtype=torch.bool)
        tokens[writing.rows, step] = torch.where(over, end, chosen)
        going = torch.nonzero(tokens[writing.rows, step] != end)[:, 0]
        if len(going) == 0:
            break
        if 2 * len(going) <= len(chosen):  # texts that have ended are read on until they are half of all
            writing, chosen = writing.select(going), chosen[going]
        new = model._embed(chosen[:, None])
        writing.mask = torch.cat([writing.mask, torch.ones_like(writing.mask[:, :1])], dim=1)
    return [_text(model, row, end) for row in tokens.tolist()]


def _one_or_each(users: UserContext | None, prompts: Sequence[str]) -> None:
    if users is not None and len(users) not in (1, len(prompts)):
        raise ValueError(f"{len(users)} users for {len(prompts)} prompts; give one for each, or one for all")


def _text(model: ContextualLM, tokens: list[int], end: int) -> str:
    kept = [token for token in tokens if token not in (-1, end)]
    return str(model.tokenizer.decode(kept, skip_special_tokens=True)).strip()


def _prompts(
    model: ContextualLM, prompts: Sequence[str], users: UserContext | None
) -> tuple[Prefix, Source | None]:
    """What is read before the first new token, the users' own prefix included, padded on the left of everything.

    Of an encoder-decoder LM all of that is the source, and the decoder's start token is what is read.
    """
    encoded = [
        torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
        for text in prompts
    ]
    if empty := [n for n, ids in enumerate(encoded) if len(ids) == 0]:
        raise UserError(f"prompt {empty[0]} is empty; the language model needs at least one token")
    encoded = [torch.cat([one, model.closing.cpu()]) for one in encoded]
    device = model.lm.device
    ids = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_side="left").to(device)
    lengths = torch.tensor([len(one) for one in encoded], device=device)
    real = torch.arange(ids.shape[1], device=device) >= (ids.shape[1] - lengths)[:, None]
    before = None if users is None else users.prefix
    if before is None:
        opening = model._embed(model.opening).expand(len(ids), -1, -1)
        before = Prefix(opening, torch.ones(opening.shape[:2], dtype=torch.bool, device=device))
    before, words = before.repeated(len(ids)), model._embed(ids)
    whole = Prefix.of([(before.embeddings.to(words.dtype), before.mask), (words, real)])
    if not model.has_encoder:
        return whole, None
    start = model._embed(torch.full((len(ids), 1), decoder_start(model.lm), device=device))
    return Prefix(start, torch.ones_like(real[:, :1])), read_source(model.lm, whole)


def _targets(model: ContextualLM, targets: Sequence[str], most: int | None) -> tuple[Tensor, Tensor]:
    """Token ids [E, T] of the targets, padded on the right, and which are real [E, T]."""
    end = _end_of_text(model)
    encoded = [
        torch.tensor(
            [*model.tokenizer(model.lead + text, add_special_tokens=False, verbose=False)["input_ids"], end][
                :most
            ]
        )
        for text in targets
    ]
    ids = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=-1).to(model.lm.device)
    return ids.clamp_min(0), ids >= 0


def _end_of_text(model: ContextualLM) -> int:
    end = model.tokenizer.eos_token_id
    if end is None:
        raise UserError(
            f"the tokenizer of {model.tokenizer.name_or_path} has no end-of-text token: texts could not end"
        )
    return int(end)  # type: ignore[arg-type]


def _read(
    model: ContextualLM, text: Tensor, mask: Tensor, users: UserContext | None
) -> DynamicCache | EncoderDecoderCache:
    """Keys and values of embeddings [R, T, D], T possibly 0."""
    cache = new_cache(model.lm)
    if text.shape[1] > 0:
        with model.conditioned_or_not(users):
            model.hidden(text, None, cache, mask)
    return cache
