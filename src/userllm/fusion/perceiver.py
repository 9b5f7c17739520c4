"""Perceiver resampler in the projection: M events -> a fixed number of user tokens (User-LLM sections 3.2, 4.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from userllm.errors import UserError
from userllm.ranges import PositiveInt


@dataclass
class PerceiverConfig:
    """Sizes of the Perceiver; defaults are the paper's where it states them."""

    latents: PositiveInt = 16
    """User tokens that come out (paper: 16)."""
    layers: PositiveInt = 6
    """Cross-attention layers (paper: 6)."""
    heads: PositiveInt = 8
    """Attention heads (ours)."""
    start: Literal["learned", "stretches"] = "learned"
    """What the latents are before they attend. "learned": the same vectors for every user (paper). "stretches" (ours):
    besides, the mean of one stretch of the user's events each, oldest first; the latest events have one to themselves.
    The layers then begin by adding nothing."""


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

    def add_nothing(self) -> None:
        """Let latents pass as they are, until training says otherwise."""
        last = self.feed_forward[-1]
        assert isinstance(last, nn.Linear)
        for zeroed in (self.out.weight, last.weight, last.bias):
            nn.init.zeros_(zeroed)

    def forward(self, latents: Tensor, tokens: Tensor, allowed: Tensor) -> Tensor:
        batch, count, width = latents.shape
        q = self.query(self.latent_norm(latents)).view(batch, count, self.heads, -1).transpose(1, 2)
        kv = self.key_value(self.input_norm(tokens)).view(batch, -1, 2, self.heads, width // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        latents = latents + self.out(mixed.transpose(1, 2).reshape(batch, count, width))
        return latents + self.feed_forward(latents)


def stretches(events: int, latents: int) -> list[int]:
    """Which latent each of so many events belongs to, oldest event first, [events].

    Stretches grow geometrically with age, and hold at least one event: the last latent has the latest event.
    """
    firsts = [max(number, round((events + 1) ** (number / latents) - 1)) for number in range(latents)]
    newest_first = [sum(first <= age for first in firsts) - 1 for age in range(events)]
    return [latents - 1 - stretch for stretch in reversed(newest_first)]


class Perceiver(nn.Module):
    """Latents that attend to the user embeddings, layer by layer.

    [B, M, U] and mask [B, M] -> tokens [B, latents, U] and mask [B, latents]: False where there is nothing of the user
    in a token, which with ``start="learned"`` is a user without events. Source: User-LLM sections 3.2 and 4.4.
    """

    stretch: Tensor | None
    """[M, latents]: 1 where an event belongs to a latent's stretch"""

    def __init__(self, config: PerceiverConfig, width: int, events: int):
        super().__init__()
        if width % config.heads:
            raise UserError(
                f"fusion.perceiver.heads {config.heads} does not divide the user embeddings' width {width}"
            )
        self.latents = nn.Parameter(torch.randn(config.latents, width) * 0.02)
        self.layers = nn.ModuleList(_PerceiverLayer(width, config.heads) for _ in range(config.layers))
        self.register_buffer("stretch", None, persistent=False)
        if config.start == "stretches":
            of_event = torch.tensor(stretches(events, config.latents))
            self.stretch = F.one_hot(of_event, config.latents).float()
            for layer in self.layers:
                assert isinstance(layer, _PerceiverLayer)
                layer.add_nothing()

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        somebody = mask.any(dim=1, keepdim=True)
        latents = self.latents.expand(tokens.shape[0], -1, -1)
        filled = somebody.expand(-1, latents.shape[1])
        if self.stretch is not None:
            real = mask.to(tokens) @ self.stretch  # events of each stretch
            filled = real > 0
            sums = torch.einsum("bmu,ml->blu", tokens, self.stretch)
            latents = latents + sums / real.clamp_min(1)[..., None]
        allowed = (mask | ~somebody)[:, None, None, :]
        for layer in self.layers:
            latents = layer(latents, tokens, allowed)
        return latents, filled
