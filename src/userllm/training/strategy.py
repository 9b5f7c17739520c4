"""What is trained in stage 2 (User-LLM section 3.2.3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from userllm.errors import UserError
from userllm.language_models.adapter import Adapter, LoraConfig
from userllm.model import UserLLM


@dataclass
class StrategyConfig:
    """Which groups of weights learn in stage 2.

    The papers count the inserted cross-attention as projection, and so do we.
    """

    name: Literal["full", "lora", "enc", "proj"] = "enc"
    """full: LM + encoder + projection; lora: adapter + encoder + projection; enc: encoder + projection;
    proj: projection alone."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapter settings, used by "lora"."""


def apply_strategy(model: UserLLM, strategy: str, adapter: Adapter | None) -> None:
    """Set ``requires_grad`` on every weight of the model. The encoder's output heads never learn in stage 2."""
    model.requires_grad_(False)
    if strategy == "full":
        model.lm.requires_grad_(True)
    if adapter is not None:
        for weight in adapter.parameters():
            weight.requires_grad_(True)
    if strategy != "proj":
        model.encoder.requires_grad_(True)
        for weight in model.encoder.head_parameters():
            weight.requires_grad_(False)
    model.user_tokens.requires_grad_(True)
    if model.soft_prompt is not None:
        model.soft_prompt.requires_grad_(True)
    if model.config.kind == "none":  # nothing of the encoder reaches the language model
        model.encoder.requires_grad_(False)
        model.user_tokens.requires_grad_(False)
        if strategy in ("enc", "proj"):
            raise UserError(
                f"fusion.kind none with strategy {strategy} has nothing to train; use lora or full"
            )
    for block in model.attachment.blocks.values():
        block.requires_grad_(True)
    if model.catalogue is not None:
        model.catalogue.requires_grad_(True)
    model.lm_is_frozen = strategy in ("enc", "proj")


def trainable_parameters(model: UserLLM) -> dict[str, int]:
    """Trainable weights per group.

    lm, lora, encoder, projection (recency, Perceiver, soft prompt, the catalogue's weights), cross_attention.
    """
    counts = {"lm": 0, "lora": 0, "encoder": 0, "projection": 0, "cross_attention": 0}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if name.startswith("encoder."):
            group = "encoder"
        elif name.startswith(("user_tokens.", "soft_prompt.", "catalogue.")):
            group = "projection"
        elif ".user_block." in name:
            group = "cross_attention"
        else:
            group = "lora" if "lora_" in name else "lm"
        counts[group] += weight.numel()
    return counts
