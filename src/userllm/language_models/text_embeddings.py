"""A language model's own vectors of short texts: where the item embeddings may start (``encoder.item_start: text``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def text_embeddings(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    kind: Literal["input", "hidden"] = "input",
    batch: int = 64,
) -> Tensor:
    """One vector per text, [texts, D] float32 on the CPU: a mean over the text's tokens, without special ones.

    kind: "input", of the LM's input embeddings; "hidden", of its last hidden states. A text without tokens gives zeros.
    """
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    vectors = torch.zeros(len(ids), lm.config.get_text_config().hidden_size)
    order = sorted(
        (n for n in range(len(ids)) if ids[n]), key=lambda n: len(ids[n])
    )  # alike lengths together
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        lengths = torch.tensor([len(ids[n]) for n in part], device=lm.device)
        mask = torch.arange(int(lengths.max()), device=lm.device) < lengths[:, None]
        padded = torch.zeros(mask.shape, dtype=torch.long, device=lm.device)
        padded[mask] = torch.tensor([token for n in part for token in ids[n]], device=lm.device)
        if kind == "input":
            states = lm.get_input_embeddings()(padded)
        else:  # padded on the right, so no real token sees padding
            states = lm.get_decoder()(input_ids=padded, use_cache=False, return_dict=True).last_hidden_state
        vectors[part] = ((states.float() * mask[..., None]).sum(1) / lengths[:, None]).cpu()
    return vectors
