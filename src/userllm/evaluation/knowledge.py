"""What a language model still knows after stage 2: its perplexity on a fixed general English text.

The text (general_english.txt, about 1,600 words, written for this package) has nothing to do with users or films. Three
readings of it: by the base LM as it was, by the contextualised LM without a user, and with a user attached. With a
frozen LM the first two are the same numbers, bit for bit. Ours: the papers measure nothing of the kind.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch

from userllm.fusion.attach import UserContext
from userllm.fusion.prefix import Prefix
from userllm.model import UserLLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reading:
    """How well an LM foresaw a text: mean negative log-likelihood in nats per token, over ``tokens`` tokens."""

    nats_per_token: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)

    def as_dict(self) -> dict[str, float]:
        """The form in metrics.json."""
        return {"perplexity": self.perplexity, "nats_per_token": self.nats_per_token}


def general_english() -> str:
    """The text."""
    return resources.files("userllm.evaluation").joinpath("general_english.txt").read_text(encoding="utf-8")


@torch.no_grad()
def read_text(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    tokens: int | None = None,
    window: int = 512,
    stride: int = 384,
    prefix: Prefix | None = None,
) -> Reading:
    """Read a text, or its first ``tokens`` tokens, in windows that begin ``stride`` tokens apart.

    Every token counts once and alike, in the first window that holds it; so a token past the first window is foreseen
    from at least ``window - stride`` others. Each window begins with what the tokenizer begins a text with; where that
    is nothing, the text's first token is not foreseen and does not count. Every window stands behind ``prefix`` (of one
    user), which begins as a text does. Raises ValueError where windows leave gaps or nothing is left to count.
    """
    begins = tokenizer("")["input_ids"]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    room = window - len(begins)  # type: ignore[arg-type]
    counted = 0 if begins else 1
    if not 0 < stride <= room - counted or len(ids) <= counted:
        raise ValueError(f"{len(ids)} tokens cannot be read in windows of {window}, {stride} apart")
    foreseen = len(ids) - counted
    nats = 0.0
    for first in range(0, len(ids), stride):
        part = torch.tensor([[*begins, *ids[first : first + room]]], device=lm.device)
        fresh = min(first + room, len(ids)) - counted
        given = {"input_ids": part}
        if prefix is not None:
            embedded = lm.get_input_embeddings()(part[:, len(begins) :])  # type: ignore[operator, arg-type]
            given = {"inputs_embeds": prefix.then(embedded).embeddings}
        log_p = torch.log_softmax(lm(**given).logits[0, -fresh - 1 : -1].float(), dim=-1)
        nats -= float(log_p.gather(1, part[0, -fresh:, None]).double().sum())
        counted += fresh
        if counted == len(ids):
            break
    return Reading(nats / foreseen, foreseen)


def knowledge_kept(
    model: UserLLM,
    users: UserContext,
    original: PreTrainedModel | None = None,
    tokens: int | None = None,
    window: int = 512,
    stride: int = 384,
) -> dict[str, Any]:
    """The entry "knowledge" of metrics.json: the text and the three readings of it. A causal LM's only.

    users: whom to read with, one after the other; the whole text attends to them, and the reading is the mean over
    users. original: the LM before stage 2, needed where all of it was trained (strategy "full").
    """
    model.eval()
    text = general_english()
    how = (model.tokenizer, text, tokens, window, stride)
    with _base_lm(model, original) as base:
        before = read_text(base, *how)
    with model.without_user():
        without_user = read_text(model.lm, *how)
    each = []
    for user in range(len(users)):
        alone = users.select(torch.tensor([user], device=users.tokens.device))
        with model.attending(alone):
            each.append(read_text(model.lm, *how, prefix=alone.prefix))
    with_users = Reading(sum(one.nats_per_token for one in each) / len(each), before.tokens)
    return {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": before.tokens,
        "window": window,
        "stride": stride,
        "users": len(each),
        "base": before.as_dict(),
        "without_user": without_user.as_dict(),
        "with_users": with_users.as_dict(),
    }


@contextmanager
def _base_lm(model: UserLLM, original: PreTrainedModel | None) -> Iterator[PreTrainedModel]:
    """The LM as it was before stage 2, for the length of a ``with`` block."""
    if model.strategy == "full":
        if original is None:
            raise ValueError("the whole LM was trained: give the original to compare with")
        yield original.eval()
    elif model.adapter is not None:
        with model.attachment.detached(), model.adapter.disabled():
            yield model.lm
    else:
        with model.attachment.detached():
            yield model.lm
