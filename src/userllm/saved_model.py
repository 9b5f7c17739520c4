"""The files of a saved model: what is written, what is read back, and what is refused because it does not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Any

import polars as pl
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from userllm.data.collation import HistoryCollator
from userllm.data.text_store import TextStore
from userllm.data.titles import listed
from userllm.data.vocabulary import Vocabulary
from userllm.encoders import (
    AutoregressiveConfig,
    FieldShape,
    TextEncoder,
    UserEncoder,
    config_of,
    encoder_config_class,
)
from userllm.errors import UserError
from userllm.fusion.catalogue import CatalogueConfig
from userllm.fusion.config import FusionConfig
from userllm.fusion.cross_attention import CrossAttentionConfig
from userllm.fusion.history_text import HistoryTextConfig, SummaryConfig
from userllm.fusion.perceiver import PerceiverConfig
from userllm.fusion.soft_prompt import SoftPromptConfig
from userllm.language_models.pretrained import ResolvedLM
from userllm.tasks import TaskConfig

FORMAT_VERSION = 1
TEXT_START = "text_start.safetensors"
_FILES = {
    ".cache",
    ".gitattributes",  # a model from the hub brings these two
    "README.md",
    "adapter",
    "config.json",
    "encoder.safetensors",
    "fusion.safetensors",
    "items.parquet",
    "lm",
    "sentences",
    "vocabulary.json",
    TEXT_START,
}
"""What a saved model may consist of."""


def check_replaceable(folder: Path) -> None:
    """Raise UserError where a model that is saved here would take the place of something else than another one."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; a model is a folder: choose another place")
    there = {one.name for one in folder.iterdir()}
    if there and "fusion.safetensors" not in there:
        raise UserError(f"{folder}: exists and holds no model; choose another folder or remove it")
    there = {name for name in there if not name.endswith(".partial")}  # of a writer that was killed
    if others := sorted(there - _FILES):
        raise UserError(
            f"{folder}: holds {listed(others)} beside a model, which would be gone; choose another folder, or move them"
        )


def read_description(folder: Path) -> dict[str, Any]:
    """config.json of a saved model. Raises UserError where there is none, or not one this userllm reads."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder}: no model there (no config.json); give the folder save_pretrained wrote")
    try:
        saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = saved["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not written by save_pretrained ({error})") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: format_version is {version}, this userllm reads {FORMAT_VERSION}")
    _check_description(file, saved)
    return saved


def _check_description(file: Path, saved: Mapping[str, Any]) -> None:
    """Raises UserError for a part that is missing, or a setting that this userllm does not know."""
    try:
        saved["strategy"]
        for key in ("name", "dtype", "sha256"):
            saved["lm"][key]
        saved_fusion(saved["fusion"])
        for task in saved["tasks"].values():
            TaskConfig(**task)
        for field in saved["fields"]:
            FieldShape(**field)
        described = _encoder_of(saved)
        if described["kind"] != "own":
            encoder_config_class(described["kind"])(**described)
    except KeyError as error:
        raise UserError(f"{file}: {error} is missing; save the model again") from error
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: {error}; it was written by {saved.get('created_by')}, and this is userllm {package_version()}: "
            "use that version, or save the model again"
        ) from error
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _encoder_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": AutoregressiveConfig.kind} | saved["encoder"]  # there were no kinds in the beginning


def saved_reader(
    folder: Path, saved: dict[str, Any], given: UserEncoder | None
) -> tuple[UserEncoder, HistoryCollator]:
    """The encoder with its weights, and what makes its batches of histories; ``given``: see ``saved_encoder``."""
    try:
        items = pl.read_parquet(folder / "items.parquet")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(
            f"{folder / 'items.parquet'}: cannot be read ({error}); save the model again"
        ) from error
    collator = HistoryCollator(items, saved_vocabulary(folder, saved))
    encoder = saved_encoder(folder / "config.json", saved, given)
    fill_weights(encoder.state_dict(), folder / "encoder.safetensors")
    if isinstance(encoder, TextEncoder):
        texts = encoder.config.texts(items, collator.vocabulary)
        encoder.use(TextStore.read(folder / "sentences"), texts)
    return encoder, collator


def field_shapes(vocabulary: Vocabulary) -> list[FieldShape]:
    """What an encoder must know of a vocabulary's fields."""
    return [FieldShape(f.name, f.kind == "multi", f.size) for f in vocabulary]


def described_encoder(encoder: UserEncoder) -> dict[str, Any]:
    """What config.json says of an encoder: its configuration, or that it is somebody's own."""
    config = config_of(encoder)
    own = {"kind": "own", "class": type(encoder).__name__, "width": encoder.width}
    return own if config is None else asdict(config)


def saved_encoder(file: Path, saved: dict[str, Any], given: UserEncoder | None) -> UserEncoder:
    """The encoder that config.json (``file``) speaks of; ``given`` if somebody brings it."""
    described = _encoder_of(saved)
    if given is not None:
        if given.width != described["width"]:
            raise UserError(
                f"{file}: the fusion was trained with user embeddings of width {described['width']}, those of the "
                f"{type(given).__name__} given are {given.width} wide; give the encoder it was trained with"
            )
        return given
    if described["kind"] == "own":
        raise UserError(
            f"{file}: trained with an encoder of somebody's own, {described['class']}; build it as it was built then "
            "and load with UserLLM.from_pretrained(folder, encoder=...)"
        )
    return encoder_config_class(described["kind"])(**described).build(
        [FieldShape(**f) for f in saved["fields"]]
    )


def saved_vocabulary(folder: Path, saved: dict[str, Any]) -> Vocabulary:
    """vocabulary.json, if it is the one the encoder was trained with."""
    file = folder / "vocabulary.json"
    vocabulary = Vocabulary.load(file)
    for have, need in zip_longest(field_shapes(vocabulary), [FieldShape(**f) for f in saved["fields"]]):
        if have != need:
            raise UserError(f"{file}: has {_spelt(have)}, the encoder was trained with {_spelt(need)}")
    if "vocabulary" in saved and file_sha256(file) != saved["vocabulary"]:
        raise UserError(
            f"{file}: not the vocabulary the encoder was trained with: its ids stand for other values"
        )
    return vocabulary


def _spelt(field: FieldShape | None) -> str:
    return "no further field" if field is None else f"{field.size} ids of field {field.name!r}"


def file_sha256(file: Path) -> str:
    """Of a whole file, in hex."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_weights(file: Path) -> dict[str, Tensor]:
    """What a safetensors file holds. Raises UserError where it is damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}); save the model again") from error


def fill_weights(own: Mapping[str, Tensor], file: Path) -> None:
    """Copy a file's weights into a model's own. Raises UserError where the file is damaged or does not fit."""
    weights = read_weights(file)
    for name in sorted(set(weights) | set(own)):
        have = tuple(weights[name].shape) if name in weights else "absent"
        need = tuple(own[name].shape) if name in own else "absent"
        if have != need:
            raise UserError(f"{file}: {name} is {have}, this encoder and language model need {need}")
    for name, value in weights.items():
        own[name].copy_(value)


def where_from(lm: ResolvedLM) -> str:
    """The LM's name; of a local folder its full path, so that the model can be loaded from anywhere."""
    return str(lm.folder.resolve()) if Path(lm.name).expanduser() == lm.folder else lm.name


def saved_fusion(raw: dict[str, Any]) -> FusionConfig:
    """The fusion config.json speaks of; a setting that was not there when it was written has its default."""
    groups: dict[str, Any] = {
        "cross_attention": CrossAttentionConfig,
        "soft_prompt": SoftPromptConfig,
        "perceiver": PerceiverConfig,
        "catalogue": CatalogueConfig,
        "text": HistoryTextConfig,
    }
    settings: dict[str, Any] = {
        name: groups[name](**value) if name in groups and value is not None else value
        for name, value in raw.items()
    }
    if (text := settings.get("text")) is not None and isinstance(text.summary, dict):
        text.summary = SummaryConfig(**text.summary)
    return FusionConfig(**settings)


def package_version() -> str:
    """Of userllm."""
    try:
        return metadata.version("userllm")
    except metadata.PackageNotFoundError:
        return "from a source folder"
