"""How user embeddings, and a history as text, enter the language model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from userllm.errors import UserError
from userllm.fusion.catalogue import CatalogueConfig
from userllm.fusion.cross_attention import CrossAttentionConfig
from userllm.fusion.history_text import HistoryTextConfig
from userllm.fusion.perceiver import PerceiverConfig
from userllm.fusion.soft_prompt import SoftPromptConfig
from userllm.ranges import PositiveInt, check_ranges


@dataclass
class FusionConfig:
    """How user embeddings enter the language model."""

    kind: Literal["cross_attention", "soft_prompt", "none"] = "cross_attention"
    """"cross_attention" between layers or "soft_prompt" before the text (both: paper); "none": no user embeddings,
    which with ``text.events`` is the papers' Text Prompt baseline."""
    layers: str = "all"
    """Fused layers: "all", "every:K" (every K-th, counted from the top) or "last:K" (paper: 18 gated layers)."""
    attend: Literal["text", "answer"] = "text"
    """Which text attends to the user. "text": every token (paper). "answer" (ours): the prompt's last token and all
    that follow; the rest of the prompt is read once for everybody, which saves most of the work on short answers.
    Only for cross-attention: whatever follows a soft prompt attends to it."""
    events: PositiveInt = 50
    """Latest events whose embeddings the LM attends to (paper: 50, 100, 200)."""
    projection: Literal["linear", "mlp"] = "linear"
    """How a user token gets to where the LM reads it. "linear": the key and value maps of cross-attention themselves
    (paper), one map to the LM's width for soft prompts. "mlp" (ours): two layers with a GELU, before the keys and
    values or in the place of the one map."""
    cross_attention: CrossAttentionConfig = field(default_factory=CrossAttentionConfig)
    """Shape of the cross-attention blocks."""
    soft_prompt: SoftPromptConfig = field(default_factory=SoftPromptConfig)
    """Shape of the soft prompt."""
    perceiver: PerceiverConfig | None = None
    """Perceiver between encoder and projection (paper's variant: 6 layers, 16 latents); none by default."""
    catalogue: CatalogueConfig | None = None
    """The encoder's own ranking is heard wherever an item is being named (ours); not by default."""
    text: HistoryTextConfig = field(default_factory=HistoryTextConfig)
    """Latest events written out in the prompt, besides or instead of the embeddings."""

    @property
    def has_prefix(self) -> bool:
        """Whether something that depends on the user stands before the prompt."""
        return self.kind == "soft_prompt" or self.text.events > 0

    @property
    def block(self) -> CrossAttentionConfig:
        """The shape of a cross-attention block."""
        shape = self.cross_attention
        return shape if self.tokens_have_age else replace(shape, recency=False)

    @property
    def tokens_have_age(self) -> bool:
        """Whether user tokens stand from oldest to latest; a Perceiver's latents do only if they start that way."""
        return self.perceiver is None or self.perceiver.start == "stretches"

    def check(self) -> None:
        """Raise UserError for settings out of range, or that contradict each other."""
        check_ranges(self, "fusion.")
        if self.kind == "none" and self.text.events < 1:
            raise UserError("fusion.kind none leaves the user out; set fusion.text.events for a text prompt")
        if self.catalogue is not None and self.kind == "none":
            raise UserError("fusion.catalogue hears the encoder, which fusion.kind none leaves out")
        if self.text.summary is not None and self.text.events < 1:
            raise UserError(
                "fusion.text.summary: set fusion.text.events, how many of the latest are summarised"
            )

    def layer_indices(self, count: int) -> list[int]:
        """Indices of the fused layers in an LM of ``count`` layers. Raises UserError for an unusable setting."""
        if self.kind != "cross_attention":
            return []
        if self.layers == "all":
            return list(range(count))
        setting = re.fullmatch(r"(every|last):([0-9]+)", self.layers)
        if setting and 1 <= (step := int(setting[2])) <= count:
            every = setting[1] == "every"
            return list(range(count - 1, -1, -step))[::-1] if every else list(range(count - step, count))
        raise UserError(
            f'fusion.layers: {self.layers!r} is not "all", "every:K" or "last:K" with K in 1..{count}'
        )
