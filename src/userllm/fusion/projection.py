"""User embeddings -> user tokens: recency, and the Perceiver or an MLP where one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from userllm.fusion.perceiver import Perceiver, PerceiverConfig
from userllm.fusion.soft_prompt import projection

if TYPE_CHECKING:
    from userllm.fusion.config import FusionConfig


class UserTokens(nn.Module):
    """The latest ``events`` user embeddings of a history, as tokens a language model can attend to.

    Each token gets a learned vector for its recency (0 = the latest event) before anything else (ours: without it the
    language model cannot tell the last event from the first, since attention over tokens has no order).
    between: "mlp" puts two layers between the tokens and the language model; "linear" nothing, its own maps are linear.
    """

    def __init__(
        self,
        width: int,
        events: int,
        perceiver: PerceiverConfig | None = None,
        between: Literal["linear", "mlp"] = "linear",
    ):
        super().__init__()
        self.events = events
        self.recency = nn.Embedding(events, width)
        nn.init.normal_(self.recency.weight, std=0.02)
        self.perceiver = Perceiver(perceiver, width, events) if perceiver is not None else None
        self.mlp = projection("mlp", width, width) if between == "mlp" else None

    @classmethod
    def of(cls, fusion: FusionConfig, width: int) -> UserTokens:
        """Those of a fusion, for user embeddings of a width."""
        between = fusion.projection if fusion.kind == "cross_attention" else "linear"
        return cls(width, fusion.events, fusion.perceiver, between)

    @property
    def cheap(self) -> bool:
        """Whether tokens are hardly more than the embeddings themselves: not worth keeping beside them."""
        return self.perceiver is None and self.mlp is None

    def forward(self, embeddings: Tensor, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """embeddings [B, S, U]; for each of E examples its row in B and how many events it may see, both [E].

        Returns tokens [E, M, U] with the latest event last, and their mask [E, M].
        """
        back = torch.arange(self.events - 1, -1, -1, device=embeddings.device)
        index = ends[:, None] - 1 - back  # [E, events]
        mask = index >= 0
        picked = embeddings[rows[:, None], index.clamp_min(0)]
        tokens = picked + self.recency(back)
        # padding must hold no value at all: 0 * NaN would otherwise reach real tokens
        tokens = torch.where(mask[..., None], tokens, torch.zeros((), dtype=tokens.dtype))
        if self.perceiver is not None:
            tokens, mask = self.perceiver(tokens, mask)
        return tokens if self.mlp is None else self.mlp(tokens), mask
