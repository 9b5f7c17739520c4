"""A cross-attention-only block between two layers of a language model (User-LLM v2 eq. 4).

    text hidden states [B*k, T, D] --norm--> queries --+
                                                       +--> attention --> out --> * tanh(gate) --> added to the text
    user tokens        [B, M, U]  --norm--> keys, values (once per context, not per decoded token)

Differences from the paper, and what it leaves out ("ours"): the ungated form of the paper sits inside a layer, between
self-attention and feed-forward; here ``gate="none"`` sits at the same place as the gated form, between layers. Heads
and head width are ours. ``scale="residual"`` (ours, default) multiplies the block's output by the root mean square of
the text state it is added to: residual streams of pretrained LMs differ in size by orders of magnitude between layers
and models, and a block with random weights would first have to grow to that size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from userllm.ranges import PositiveInt


@dataclass
class CrossAttentionConfig:
    """Shape of every cross-attention block."""

    heads: PositiveInt = 8
    """Attention heads (ours: the paper is silent)."""
    head_width: PositiveInt = 64
    """Width of a head (ours)."""
    gate: Literal["tanh", "none"] = "tanh"
    """"tanh": output scaled by tanh(alpha), alpha one trainable scalar starting at 0 (paper eq. 4); "none": no gate."""
    recency: bool = True
    """Whether heads look back to different depths (ours): a head's attention to an event falls by a fixed slope per
    event since, from none at all to the latest event only. Not used behind a Perceiver: latents have no order."""
    scale: Literal["residual", "none"] = "residual"
    """Whether the output is brought to the size of the text state it is added to (ours), or left as it is (paper)."""


class CrossAttentionBlock(GradientCheckpointingLayer):
    """Adds to text hidden states what they find in the user tokens.

    ``lm_width`` is D, ``user_width`` the width U of the user tokens: keys and values are projected straight from it.
    """

    def __init__(self, config: CrossAttentionConfig, lm_width: int, user_width: int):
        super().__init__()
        self.config = config
        inner = config.heads * config.head_width
        self.text_norm = nn.LayerNorm(lm_width)
        self.user_norm = nn.LayerNorm(user_width)
        self.query = nn.Linear(lm_width, inner, bias=False)
        self.key = nn.Linear(user_width, inner, bias=False)
        self.value = nn.Linear(user_width, inner, bias=False)
        self.out = nn.Linear(inner, lm_width, bias=False)
        # slopes 0, 2^-5 .. 2^1: the first head sees all events alike, the last one hardly more than the latest
        steps = torch.linspace(-5, 1, max(config.heads - 1, 1))[: config.heads - 1]
        slopes = torch.cat([torch.zeros(1), 2.0**steps]) if config.recency else torch.zeros(config.heads)
        self.register_buffer("slopes", slopes, persistent=False)
        self.gate = nn.Parameter(torch.zeros(1)) if config.gate == "tanh" else None
        if self.gate is None:  # starts as the base LM too, by the output projection instead of the gate
            nn.init.zeros_(self.out.weight)

    def project_users(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """User tokens [B, M, U] -> keys and values, each [B, H, M, head width]."""
        normed = self.user_norm(tokens)
        batch, count, _ = tokens.shape
        shape = (batch, count, self.config.heads, self.config.head_width)
        return self.key(normed).view(shape).transpose(1, 2), self.value(normed).view(shape).transpose(1, 2)

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """hidden [B*k, T, D] (k rows per user, adjacent), keys and values of B users, mask [B, M] -> hidden, updated.

        A user without tokens (mask all False) leaves the text as it is.
        """
        users = keys.shape[0]
        queries = self._queries(hidden, users)
        # attention over nothing is NaN by softmax's definition, so let it see padding and then drop the result
        has_tokens = mask.any(dim=1)
        bias = self._bias(mask | ~has_tokens[:, None]).to(queries.dtype)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        mixed = mixed * has_tokens[:, None, None, None].to(mixed.dtype)
        update = self.out(mixed.transpose(1, 2).reshape(*hidden.shape[:2], -1))
        if self.config.scale == "residual":
            update = update * hidden.detach().float().pow(2).mean(-1, keepdim=True).sqrt().to(update.dtype)
        if self.gate is not None:
            update = torch.tanh(self.gate) * update
        return hidden + update.to(hidden.dtype)

    def attention(self, hidden: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """The attention weights behind ``forward``, averaged over heads: [B*k, T, M]; zero for an empty user."""
        users = keys.shape[0]
        logits = self._queries(hidden, users) @ keys.transpose(-1, -2) / self.config.head_width**0.5
        logits = logits + self._bias(mask).clamp_min(torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, dim=-1) * mask[:, None, None, :]
        return weights.mean(1).reshape(*hidden.shape[:2], -1)

    def _bias(self, allowed: Tensor) -> Tensor:
        """Added to the attention logits, [B, H, 1, M]: minus infinity where not allowed, else minus slope * age."""
        age = torch.arange(allowed.shape[1] - 1, -1, -1, device=allowed.device)
        bias = -self.slopes[:, None] * age  # type: ignore[index]
        return torch.where(allowed[:, None, None, :], bias[None, :, None, :], -torch.inf)

    def _queries(self, hidden: Tensor, users: int) -> Tensor:
        # the k texts of one user become one longer row of queries: the user's keys are shared, not copied
        if hidden.shape[0] % users:
            raise ValueError(f"{hidden.shape[0]} text rows do not divide among {users} users")
        q = self.query(self.text_norm(hidden.to(self.query.weight.dtype)))
        return q.view(users, -1, self.config.heads, self.config.head_width).transpose(1, 2)

    @property
    def gate_value(self) -> float:
        """tanh(alpha), the share of the block's output that reaches the text; 1 without a gate."""
        return 1.0 if self.gate is None else float(torch.tanh(self.gate.detach()))
