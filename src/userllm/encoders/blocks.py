"""The causal Transformer block, and three ways in which attention may know where an event stands."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from userllm.encoders.state import Reading
from userllm.events import UNKNOWN_TIME

TIME_BUCKETS = 64
"""Buckets of the seconds between two events: two per doubling, up to 2^31.5 (107 years); one more where unknown."""


class Block(nn.Module):
    """Causal self-attention and feed-forward, each with a residual connection and a LayerNorm.

    kind: "gelu" (down(gelu(up x))) or "swiglu" (down(silu(gate x) * up x), Shazeer 2020; ``up`` holds both matrices).
    norm: "pre" (x + f(norm x)) or "post" (norm(x + f x), the original Transformer). bias: adds to attention logits.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        feed_forward: int,
        dropout: float,
        kind: Literal["gelu", "swiglu"] = "gelu",
        norm: Literal["pre", "post"] = "pre",
        bias: RelativeTimeBias | None = None,
    ):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.kind, self.norm = kind, norm
        self.bias = bias
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, feed_forward if kind == "gelu" else 2 * feed_forward)
        self.down = nn.Linear(feed_forward, width)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None = None,
        apart: Tensor | None = None,
        reading: Reading | None = None,
    ) -> Tensor:
        """[B, S, U] -> [B, S, U]. rotation: see ``rotations``; apart: see ``time_apart``, for a block with a bias.

        reading: the events may go on from earlier ones, see ``Reading``; ``apart`` is then [B, S, past and new].
        """
        for f, norm in (
            (lambda x: self._attend(x, rotation, apart, reading), self.attention_norm),
            (self._feed, self.feed_forward_norm),
        ):
            if self.norm == "pre":
                x = x + F.dropout(f(norm(x)), self.dropout, self.training)
            else:
                x = norm(x + F.dropout(f(x), self.dropout, self.training))
        return x

    def _attend(
        self, x: Tensor, rotation: Tensor | None, apart: Tensor | None, reading: Reading | None
    ) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        mask, causal, distance = None, True, None
        if reading is not None:
            k, v = reading.join(k, v)
            mask, causal, distance = reading.mask, reading.causal, reading.distance
        if self.bias is not None:
            assert apart is not None
            mask, causal = self.bias(apart, distance), False
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))

    def _feed(self, x: Tensor) -> Tensor:
        if self.kind == "gelu":
            return self.down(F.gelu(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class RelativeTimeBias(nn.Module):
    """What is added to the attention logits of one block: by head, for how many events and how much time lie between.

    The idea of HSTU (Zhai et al. 2024), our form: one learned number per distance and one per bucket of the time
    between the two events, both starting at 0. HSTU measures time from the event that is asked for; we measure it from
    the event that attends, so that no output knows when the next event happens.
    """

    def __init__(self, heads: int, max_length: int):
        super().__init__()
        self.distance = nn.Embedding(max_length, heads)
        self.time = nn.Embedding(TIME_BUCKETS + 1, heads)
        nn.init.zeros_(self.distance.weight)
        nn.init.zeros_(self.time.weight)

    def forward(self, apart: Tensor, distance: Tensor | None = None) -> Tensor:
        """[B, heads, S, S] from ``time_apart``'s buckets [B, S, S]; minus infinity where j > i.

        distance [B, S, K]: how many events lie between event i and event j of K, where those are not the same S.
        """
        if distance is None:
            places = torch.arange(apart.shape[1], device=apart.device)
            distance = places[:, None] - places
        bias = self.time(apart) + self.distance(distance.clamp_min(0))
        return bias.masked_fill((distance < 0)[..., None], -torch.inf).permute(0, 3, 1, 2)


def time_apart(times: Tensor, since: Tensor | None = None) -> Tensor:
    """Buckets [B, S, S] of the seconds from event j to event i, from times [B, S]; ``TIME_BUCKETS`` where unknown.

    since [B, K]: the times of the events j, where those are others. An event j that is not before event i counts as
    simultaneous (it is masked, or the history is not quite in order).
    """
    since = times if since is None else since
    known = (times != UNKNOWN_TIME)[:, :, None] & (since != UNKNOWN_TIME)[:, None, :]
    seconds = (times[:, :, None] - since[:, None, :]).clamp_min(0)
    buckets = (2 * torch.log2(seconds.float() + 1)).long().clamp_max(TIME_BUCKETS - 1)
    return buckets.where(known, TIME_BUCKETS)


def rotations(length: int, head_width: int, device: torch.device) -> Tensor:
    """Cosines and sines [2, S, head_width / 2] of rotary position embeddings (Su et al. 2021), base 10,000."""
    rates = 10000.0 ** -(torch.arange(0, head_width, 2, device=device) / head_width)
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Queries or keys [B, heads, S, head_width], each turned by its position: products know relative positions only."""
    cos, sin = rotation.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
