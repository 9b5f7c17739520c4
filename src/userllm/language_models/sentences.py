"""Sentence encoders in the folder format of sentence-transformers, run by plain transformers.

A folder has a Hugging Face model at its top; modules.json names what comes behind it. Known are Pooling (cls, mean,
max), Dense and Normalize: all of SentenceT5, all-MiniLM, E5, BGE and their like. sentence-transformers itself is not
needed (a test holds the numbers against its ``encode``): texts are batched by tokens instead of by count, which is
faster on texts of mixed lengths.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from userllm.data.sources.fetch import announce
from userllm.data.text_store import SentenceEncoderCard
from userllm.errors import UserError
from userllm.language_models.pretrained import LanguageModelConfig, resolve

_ACTIVATIONS = {"Identity": nn.Identity, "Tanh": nn.Tanh, "GELU": nn.GELU, "ReLU": nn.ReLU}
_POOLINGS = ("cls", "mean", "max")
_OLD_POOLINGS = {f"pooling_mode_{name}": kind for name, kind in
                 (("cls_token", "cls"), ("mean_tokens", "mean"), ("max_tokens", "max"))}  # fmt: skip


@dataclass(frozen=True)
class _Dense:
    """A linear layer behind the pooling: its folder's name and its activation."""

    folder: str
    activation: str


@dataclass(frozen=True)
class SentenceEncoderFiles:
    """A sentence encoder found on this machine and what its folder says; ``load`` reads the weights."""

    folder: Path
    card: SentenceEncoderCard
    pooling: str
    dense: tuple[_Dense, ...]
    normalize: bool
    lower: bool
    max_length: int | None
    prompt: str

    def load(self) -> SentenceEncoder:
        """Raises UserError for damaged weights."""
        return SentenceEncoder(self)


def find_sentence_encoder(name: str) -> SentenceEncoderFiles:
    """By hub id, folder, or short name (``all-minilm-l6-v2``, from its package where no hub is reached).

    Raises UserError where it cannot be had, or has a module that is not known.
    """
    try:
        found = resolve(LanguageModelConfig(name=name))
    except UserError as error:
        raise UserError(
            f"encoder.sentences: {error}; all-minilm-l6-v2 (encoder.sentence_width 384) also comes as a package"
        ) from error
    folder = found.folder
    described: dict[str, Any] = {"pooling": "mean", "dense": (), "normalize": False}
    modules = _read(folder / "modules.json") or []
    for module in modules[1:]:  # the first is the model itself
        kind, path = module["type"].rpartition(".")[2], module["path"]
        settings = _read(folder / path / "config.json") if path else None
        if kind == "Pooling" and settings is not None:
            described["pooling"] = _pooling(folder / path / "config.json", settings)
        elif kind == "Dense" and settings is not None:
            activation = settings.get("activation_function", "Tanh").rpartition(".")[2]
            if activation not in _ACTIVATIONS:
                raise UserError(f"{folder / path}: activation {activation} is not known; use another encoder")
            described["dense"] += (_Dense(path, activation),)
        elif kind == "Normalize":
            described["normalize"] = True
        else:
            raise UserError(
                f"{folder}/modules.json: module {kind} is not known (only Pooling, Dense, Normalize are); "
                "use another sentence encoder"
            )
    limits = _read(folder / "sentence_bert_config.json") or {}
    prompts = _read(folder / "config_sentence_transformers.json") or {}
    described["lower"] = bool(limits.get("do_lower_case", False))
    described["max_length"] = limits.get("max_seq_length")
    described["prompt"] = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"), "")
    width = _width(folder, described["dense"])
    facts = {**described, "dense": [asdict(d) for d in described["dense"]]}
    digest = hashlib.sha256(f"{found.sha256} {json.dumps(facts, sort_keys=True)}".encode())
    for dense in described["dense"]:
        digest.update((folder / dense.folder / "model.safetensors").read_bytes())
    card = SentenceEncoderCard(name, digest.hexdigest(), width)
    announce(f"sentence encoder {name}: {found.source}")
    return SentenceEncoderFiles(folder, card, **described)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _pooling(file: Path, settings: dict[str, Any]) -> str:
    modes = [settings["pooling_mode"]] if "pooling_mode" in settings else [
        _OLD_POOLINGS.get(name, name) for name, on in settings.items() if name.startswith("pooling_mode_") and on
    ]  # fmt: skip
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise UserError(
            f"{file}: pooling {', '.join(map(str, modes))}; known are {', '.join(_POOLINGS)}, one of them"
        )
    return str(modes[0])


def _width(folder: Path, dense: Sequence[_Dense]) -> int:
    if dense:
        return int(_read(folder / dense[-1].folder / "config.json")["out_features"])
    return int(AutoConfig.from_pretrained(folder).hidden_size)


class SentenceEncoder:
    """Texts -> vectors [n, s]. In evaluation mode, on the CPU until ``to``."""

    def __init__(self, files: SentenceEncoderFiles):
        self.files = files
        self.card = files.card
        folder = files.folder
        transformers_logging.disable_progress_bar()
        try:
            # of an encoder-decoder like T5 the encoder alone
            halved = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_TEXT_ENCODING_MAPPING
            kind = AutoModelForTextEncoding if halved else AutoModel
            self.model: Any = kind.from_pretrained(folder, dtype=torch.float32).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self.dense = nn.ModuleList(_dense(folder, layer) for layer in files.dense)
        except (ValueError, OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{folder}: cannot be loaded as a sentence encoder: {reason}") from error
        config = self.model.config
        limits = [
            files.max_length,
            getattr(config, "max_position_embeddings", None),
            self.tokenizer.model_max_length,
        ]
        self.max_length = files.max_length or min(limit for limit in limits if limit is not None)
        self.tokenizer.padding_side = "right"

    @property
    def width(self) -> int:
        """s."""
        return self.card.width

    def to(self, device: torch.device | str) -> SentenceEncoder:
        """Move the weights."""
        self.model.to(device)
        self.dense.to(device)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str], tokens: int = 2048) -> np.ndarray:
        """Vectors [n, s] float32, in the order of the texts; zeros for a text without tokens.

        tokens: padded tokens read at once (at least one text). Texts of alike length are read together.
        """
        ids = self._ids(texts)
        vectors = np.zeros((len(ids), self.width), dtype=np.float32)
        order = sorted((n for n in range(len(ids)) if ids[n]), key=lambda n: len(ids[n]))
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and (stop + 1 - start) * len(ids[order[stop]]) <= tokens:
                stop += 1
            part = order[start:stop]
            vectors[part] = self._read([ids[n] for n in part])
            start = stop
        return vectors

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        given = [self.files.prompt + text for text in texts]
        if self.files.lower:
            given = [text.lower() for text in given]
        return (
            self.tokenizer(given, truncation=True, max_length=self.max_length)["input_ids"] if given else []
        )

    def _read(self, ids: list[list[int]]) -> np.ndarray:
        device = self.model.device
        lengths = torch.tensor([len(one) for one in ids])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        padded = torch.full(mask.shape, self.tokenizer.pad_token_id or 0)
        padded[mask] = torch.tensor([token for one in ids for token in one])
        mask = mask.to(device)
        states = self.model(input_ids=padded.to(device), attention_mask=mask.long()).last_hidden_state
        pooled = _pooled(states.float(), mask, self.files.pooling)
        for layer in self.dense:
            pooled = layer(pooled)
        if self.files.normalize:
            pooled = nn.functional.normalize(pooled, dim=-1)
        return pooled.cpu().numpy()


def _pooled(states: Tensor, mask: Tensor, kind: str) -> Tensor:
    """[B, T, D] -> [B, D]."""
    if kind == "cls":
        return states[:, 0]
    if kind == "max":
        return states.masked_fill(~mask[..., None], -torch.inf).amax(1)
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _dense(folder: Path, layer: _Dense) -> nn.Module:
    weights = load_file(folder / layer.folder / "model.safetensors")
    weight = weights["linear.weight"]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias="linear.bias" in weights)
    linear.load_state_dict({name.removeprefix("linear."): value.float() for name, value in weights.items()})
    return nn.Sequential(linear, _ACTIVATIONS[layer.activation]()).eval().requires_grad_(False)
