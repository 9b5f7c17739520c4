"""How a text is turned into tokens by itself that will stand behind another one."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to put before a text so that its first word is read as a word behind others: a space, or nothing.

    Nothing where the tokenizer marks every text's beginning as that of a word (Llama 2, Mistral 7B v0.1, T5): of most
    of these, a space of ours would become a token of its own.
    """
    first, second, both = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("x", "y", "x y")
    )
    return "" if both == [*first, *second] else " "  # type: ignore[misc]
