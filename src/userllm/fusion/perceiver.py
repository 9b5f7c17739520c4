"""Perceiver resampler in the projection: M events -> a fixed number of user tokens (User-LLM sections 3.2, 4.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from userllm.errors import UserError


@dataclass
class PerceiverConfig:
    """Sizes of the Perceiver; defaults are the paper's where it states them."""

    latents: int = 16
    """User tokens that come out (paper: 16)."""
    layers: int = 6
    """Cross-attention layers (paper: 6)."""
    heads: int = 8
    """Attention heads (ours)."""


class _PerceiverLayer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.latent_norm = nn.LayerNorm(width)
        self.input_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, latents: Tensor, tokens: Tensor, allowed: Tensor) -> Tensor:
        batch, count, width = latents.shape
        q = self.query(self.latent_norm(latents)).view(batch, count, self.heads, -1).transpose(1, 2)
        kv = self.key_value(self.input_norm(tokens)).view(batch, -1, 2, self.heads, width // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        latents = latents + self.out(mixed.transpose(1, 2).reshape(batch, count, width))
        return latents + self.feed_forward(latents)


class Perceiver(nn.Module):
    """Latents that attend to the user embeddings, layer by layer: [B, M, U] and mask [B, M] -> [B, latents, U].

    A user without events yields tokens that depend on nothing; their mask is False (see ``UserTokens``).
    """

    def __init__(self, config: PerceiverConfig, width: int):
        super().__init__()
        if width % config.heads:
            raise UserError(
                f"fusion.perceiver.heads {config.heads} does not divide the user embeddings' width {width}"
            )
        self.latents = nn.Parameter(torch.randn(config.latents, width) * 0.02)
        self.layers = nn.ModuleList(_PerceiverLayer(width, config.heads) for _ in range(config.layers))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See the class."""
        allowed = (mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :]
        latents = self.latents.expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, tokens, allowed)
        return latents
