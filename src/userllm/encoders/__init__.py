"""User encoders: a batch of histories in, user embeddings [B, M, U] and their mask [B, M] out."""

from __future__ import annotations

from userllm.encoders.autoregressive import AutoregressiveConfig, AutoregressiveEncoder
from userllm.encoders.base import UserEncoder
from userllm.encoders.bert4rec import Bert4RecConfig, Bert4RecEncoder
from userllm.encoders.dual import DualConfig, DualEncoder
from userllm.encoders.features import FieldShape
from userllm.encoders.text import TextConfig, TextEncoder
from userllm.errors import UserError

__all__ = [
    "AutoregressiveConfig",
    "AutoregressiveEncoder",
    "Bert4RecConfig",
    "Bert4RecEncoder",
    "DualConfig",
    "DualEncoder",
    "EncoderConfig",
    "FieldShape",
    "TextConfig",
    "TextEncoder",
    "UserEncoder",
    "config_of",
    "encoder_config_class",
]

EncoderConfig = AutoregressiveConfig | DualConfig | Bert4RecConfig | TextConfig


def encoder_config_class(kind: object) -> type[EncoderConfig]:
    """What ``encoder.kind`` stands for. Raises UserError for anything else."""
    match kind:
        case "autoregressive":
            return AutoregressiveConfig
        case "dual":
            return DualConfig
        case "bert4rec":
            return Bert4RecConfig
        case "text":
            return TextConfig
    raise UserError(f"encoder.kind is {kind!r}; use autoregressive, dual, bert4rec or text")


def config_of(encoder: UserEncoder) -> EncoderConfig | None:
    """The configuration that builds the encoder again; None for one of somebody's own."""
    if isinstance(encoder, AutoregressiveEncoder | DualEncoder | Bert4RecEncoder | TextEncoder):
        return encoder.config
    return None
