"""The tokens with which a language model ends what it writes."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_tokens(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-text, and what ends a turn of a chat: a tokenizer names one token, a ``generation_config`` may name more.

    For texts in a chat template: Gemma and Phi-3 end an answer with a token that is not their tokenizer's end-of-text.
    """
    shipped: int | list[int] | None = getattr(lm.generation_config, "eos_token_id", None)
    own: int | None = tokenizer.eos_token_id  # type: ignore[assignment]
    named = shipped if isinstance(shipped, list) else [shipped]
    return list(dict.fromkeys(one for one in (own, *named) if one is not None))
