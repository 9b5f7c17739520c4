"""What the decoder of an encoder-decoder language model reads from: [ task prompt | user | text ] behind its encoder.

A causal model continues its prompt; a T5 writes a text of its own beside it. So everything that stands before the
answer (soft prompts, history as text, the prompt) goes through the encoder once, and the decoder begins with a start
token. Cross-attention blocks, where there are any, sit in the decoder.

Only models with relative positions (the T5 family) are taken: padding on the left must not move a text.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from userllm.errors import UserError
from userllm.fusion.prefix import Prefix


@dataclass
class Source:
    """Encoder states [R, L, D] and their mask [R, L]."""

    states: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    def select(self, rows: Tensor) -> Source:
        """The sources of some of the texts, in the order given."""
        return Source(self.states[rows], self.mask[rows])

    def repeated(self, rows: int) -> Source:
        """For ``rows`` texts, a multiple of the sources: each source as often, adjacent."""
        if rows == len(self):
            return self
        copies = rows // len(self)
        return Source(self.states.repeat_interleave(copies, 0), self.mask.repeat_interleave(copies, 0))


def has_encoder(lm: PreTrainedModel) -> bool:
    """Whether the LM is an encoder and a decoder. Raises UserError for one whose positions are not relative."""
    if not getattr(lm.config, "is_encoder_decoder", False):
        return False
    if not hasattr(lm.config, "relative_attention_num_buckets"):
        raise UserError(
            f"{type(lm).__name__}: of encoder-decoder models only the T5 family can be used (relative positions)"
        )
    return True


def decoder_start(lm: PreTrainedModel) -> int:
    """The token a decoder begins with. Raises UserError where the LM names none."""
    for config in (lm.config, lm.generation_config):
        if (start := getattr(config, "decoder_start_token_id", None)) is not None:
            return int(start)
    raise UserError(f"{type(lm).__name__}: its configuration names no decoder_start_token_id")


def read_source(lm: PreTrainedModel, text: Prefix) -> Source:
    """Encode what stands before the answer: embeddings [R, L, D], padded on the left."""
    encoder: nn.Module = lm.get_encoder()
    output = encoder(inputs_embeds=text.embeddings, attention_mask=text.mask.long(), return_dict=True)
    return Source(output.last_hidden_state, text.mask)


def new_cache(lm: PreTrainedModel) -> DynamicCache | EncoderDecoderCache:
    """An empty cache of keys and values, of the kind the LM takes."""
    config = lm.config
    if not getattr(config, "is_encoder_decoder", False):
        return DynamicCache(config=config)
    # one layer more or less than the encoder has would be wrong: the decoder's own configuration says how many
    own = lm.get_decoder().config
    return EncoderDecoderCache(DynamicCache(config=own), DynamicCache(config=own))


def copied_cache(cache: Any) -> Any:
    """The same keys and values; to add to one of the two leaves the other as it is."""
    other = copy.copy(cache)
    if isinstance(other, EncoderDecoderCache):
        other.self_attention_cache = copied_cache(other.self_attention_cache)
        other.cross_attention_cache = copied_cache(other.cross_attention_cache)
        other.is_updated = dict(other.is_updated)
    else:
        other.layers = [copy.copy(layer) for layer in other.layers]
    return other


def no_prefix(opening: Tensor, rows: int) -> Prefix:
    """The prefix of nobody: a tokenizer's opening tokens [O, D] alone, ``rows`` times."""
    mask = torch.ones(rows, len(opening), dtype=torch.bool, device=opening.device)
    return Prefix(opening.expand(rows, -1, -1), mask)
