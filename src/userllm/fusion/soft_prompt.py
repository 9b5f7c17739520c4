"""User tokens as soft prompts: projected to the LM's width and put before the text (User-LLM section 3.2).

A learned task prompt of length 10 goes first, as in the paper. What it leaves out ("ours"): the projection starts so
that a user token is as long as the LM's own token embeddings are on average, and the task prompt starts at random with
that length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from userllm.fusion.prefix import Part
from userllm.ranges import NonNegativeInt


@dataclass
class SoftPromptConfig:
    """What goes before the text."""

    task_tokens: NonNegativeInt = 10
    """Length of the learned task prompt (paper: 10); 0: none."""


def projection(kind: Literal["linear", "mlp"], width: int, out: int) -> nn.Module:
    """``width`` -> ``out``: one linear map, or two with a GELU between (hidden width ``out``)."""
    if kind == "linear":
        return nn.Linear(width, out)
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))


class SoftPrompt(nn.Module):
    """User tokens [B, M, U] -> the parts of a prefix at the LM's width: the task prompt, then the user.

    size: root mean square of the LM's token embeddings.
    """

    def __init__(
        self,
        config: SoftPromptConfig,
        kind: Literal["linear", "mlp"],
        width: int,
        lm_width: int,
        size: float,
    ):
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(width), projection(kind, width, lm_width))
        self.task_prompt = nn.Parameter(torch.randn(config.task_tokens, lm_width) * size)
        last = [module for module in self.project.modules() if isinstance(module, nn.Linear)][-1]
        nn.init.normal_(last.weight, std=size * last.in_features**-0.5)
        nn.init.zeros_(last.bias)

    def forward(self, tokens: Tensor, mask: Tensor) -> list[Part]:
        """See the class; mask [B, M]."""
        users = len(tokens)
        task = self.task_prompt.expand(users, -1, -1)
        real = torch.ones(task.shape[:2], dtype=torch.bool, device=mask.device)
        return [(task, real), (self.project(tokens.to(task.dtype)), mask)]
