"""A stack of torch's own Transformer layers, for the encoders that are not the autoregressive one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from userllm.errors import UserError


class Transformer(nn.Module):
    """Pre-norm self-attention layers with GELU, and a norm at the end.

    ``torch.nn.TransformerEncoder`` starts all its layers with the very same weights; here each has its own.
    Raises UserError where the width is not a multiple of the heads.
    """

    def __init__(
        self, layers: int, width: int, heads: int, feed_forward: int, dropout: float, name: str = "width"
    ):
        super().__init__()
        if width % heads:
            raise UserError(f"encoder.{name} {width} is not a multiple of encoder.heads {heads}")
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, feed_forward, dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x [B, S, width] -> the same shape; mask [B, S]: what may be attended to (everything by None)."""
        length = x.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1) if causal else None
        for layer in self.layers:
            x = layer(
                x,
                src_mask=future,
                src_key_padding_mask=None if mask is None else ~mask,
                is_causal=causal,
            )
        return self.norm(x)
