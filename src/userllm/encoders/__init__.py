"""User encoders: a batch of histories in, user embeddings [B, S, U] out."""

from userllm.encoders.autoregressive import AutoregressiveConfig, AutoregressiveEncoder
from userllm.encoders.features import FieldShape

__all__ = ["AutoregressiveConfig", "AutoregressiveEncoder", "FieldShape"]
