"""The part of a model that reads users: from events to what the language model attends to. No language model in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from userllm.data.collation import HistoryCollator
from userllm.encoders import TextEncoder, UserEncoder, config_of
from userllm.errors import UserError
from userllm.fusion.config import FusionConfig
from userllm.fusion.cross_attention import CrossAttentionBlock
from userllm.fusion.history_summary import HistorySummary
from userllm.fusion.history_text import HistoryText
from userllm.fusion.projection import UserTokens
from userllm.saved_model import read_description, read_weights, saved_fusion, saved_reader

if TYPE_CHECKING:
    from userllm.model import UserLLM


@dataclass
class UserSide:
    """Encoder, user tokens, and of the cross-attention blocks what they project users with.

    weights: everything the fusion has learned, by name. history_text: what writes histories as text, where
    ``fusion.text`` asks for it; lm: then the hash of the language model whose tokens that text is made of.
    """

    encoder: UserEncoder
    user_tokens: UserTokens
    blocks: Mapping[int, CrossAttentionBlock]
    config: FusionConfig
    collator: HistoryCollator
    weights: Mapping[str, Tensor]
    history_text: HistoryText | HistorySummary | None = None
    lm: str | None = None

    @classmethod
    def of(cls, model: UserLLM) -> UserSide:
        """A model's own; nothing is copied."""
        return cls(
            model.encoder,
            model.user_tokens,
            model.attachment.blocks,
            model.config,
            model.collator,
            model.fusion_weights(),
            model.history_text,
            None if model.history_text is None else model.reference.sha256,
        )

    @classmethod
    def load(cls, folder: Path, encoder: UserEncoder | None = None) -> UserSide:
        """Of a saved model, without its language model. encoder: as for ``UserLLM.from_pretrained``.

        Raises UserError where the folder is no model, or one that writes histories as text: that text is made of the
        language model's tokens, so load the whole and take ``UserSide.of`` it.
        """
        saved = read_description(folder)
        fusion = saved_fusion(saved["fusion"])
        if fusion.text.events > 0:
            raise UserError(
                f"{folder}: fusion.text needs the language model's tokenizer; load the whole model"
            )
        encoder, collator = saved_reader(folder, saved, encoder)
        weights = read_weights(folder / "fusion.safetensors")
        tokens = UserTokens.of(fusion, encoder.width)
        parts: dict[str, torch.nn.Module] = {"user_tokens": tokens}
        layers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("blocks.")})
        for index in layers:
            lm_width = len(weights[f"blocks.{index}.text_norm.weight"])
            parts[f"blocks.{index}"] = CrossAttentionBlock(fusion.block, lm_width, encoder.width)
        for name, part in parts.items():
            own = {k.removeprefix(f"{name}."): w for k, w in weights.items() if k.startswith(f"{name}.")}
            try:
                part.load_state_dict(own)
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise UserError(f"{folder / 'fusion.safetensors'}: does not fit ({reason})") from error
            part.requires_grad_(False).eval()
        blocks = {index: parts[f"blocks.{index}"] for index in layers}
        encoder.requires_grad_(False).eval()
        return cls(encoder, tokens, blocks, fusion, collator, weights)  # type: ignore[arg-type]

    def to(self, device: torch.device) -> UserSide:
        """Itself, moved to a device."""
        for part in (self.encoder, self.user_tokens, *self.blocks.values()):
            part.to(device)
        return self

    @property
    def weight(self) -> Tensor:
        """A weight of it, whose device and type are those of all."""
        return self.user_tokens.recency.weight

    @property
    def window(self) -> int:
        """How many of a history's latest embeddings count."""
        return self.config.events

    @property
    def scores_follow(self) -> bool:
        """Whether the encoder's ranking follows from the last user embedding, so that it need not be kept."""
        some = self.weight.new_zeros(1, self.encoder.width)
        return self.encoder.causal and self.encoder.item_scores(some) is not None

    def version(self) -> dict[str, str]:
        """sha256 of whatever user embeddings and user tokens depend on, by what it is of.

        "encoder", "fusion": weights and settings that differ from the defaults (a setting that a later userllm adds
        leaves the hash as it is). "catalogue": items and vocabulary. "language model": only where histories stand as
        text.
        """
        config = config_of(self.encoder)
        told = {"own": type(self.encoder).__name__} if config is None else _changed(config)
        texts = {"vectors": self.encoder.vectors} if isinstance(self.encoder, TextEncoder) else {}
        fusion = {"kind": self.config.kind, "events": self.config.events} | _changed(self.config)
        hashes = {
            "encoder": _sha256(told, self.encoder.state_dict() | texts),
            "fusion": _sha256(fusion, self.weights),
            "catalogue": self._catalogue_sha256(),
        }
        return hashes if self.lm is None else hashes | {"language model": self.lm}

    def _catalogue_sha256(self) -> str:
        names = [[field.name, field.values] for field in self.collator.vocabulary]
        ids = self.collator.items["id"].to_list()
        if self.config.text.events > 0:  # the text says what the items are called
            ids = [ids, self.collator.items["title"].to_list()]
        tables = {"item": self.collator.item_vocabulary_ids, **self.collator.item_fields}
        arrays = {name: torch.from_numpy(np.ascontiguousarray(table)) for name, table in tables.items()}
        return _sha256({"fields": names, "items": ids}, arrays)


def _sha256(settings: Any, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _changed(config: Any) -> dict[str, Any]:
    """A configuration's settings that are not its class's defaults."""
    return _different(asdict(config), asdict(type(config)()))


def _different(have: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    changed = {}
    for name, value in have.items():
        usual = default[name]
        if isinstance(value, dict) and isinstance(usual, dict) and usual:
            value, usual = _different(value, usual), {}
        if value != usual:
            changed[name] = value
    return changed
