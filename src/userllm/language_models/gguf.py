"""A llama.cpp GGUF file of the Llama architecture -> a Hugging Face folder.

transformers can read GGUF too, but unpacks it anew at every load, in minutes; here it is unpacked once, in about
ten seconds.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from userllm.errors import UserError
from userllm.tensor_file import save_tensors

if TYPE_CHECKING:
    from gguf import GGUFReader

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


def convert_llama_gguf(gguf_path: Path, out_folder: Path) -> None:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files into ``out_folder``.

    Weights are stored as float32: a 4-bit weight is scale * q + offset, which float16 would round. Embeddings are tied
    when the file has no output matrix of its own. The tokenizer prepends nothing.
    Raises UserError for a file that is not a Llama with a SmolLM byte-level BPE tokenizer.
    """
    from gguf import GGUFReader  # 0.5 s of imports, needed once per machine

    try:
        reader = GGUFReader(gguf_path)
    except (ValueError, OSError, IndexError) as error:
        raise UserError(
            f"{gguf_path}: not a readable GGUF file ({error}); delete it and run again"
        ) from error
    architecture, tokenizer = _field(reader, "general.architecture"), _field(reader, "tokenizer.ggml.pre", "")
    if architecture != "llama" or tokenizer != "smollm":
        raise UserError(
            f"{gguf_path}: architecture {architecture!r} with tokenizer {tokenizer!r} cannot be converted "
            "(only 'llama' with 'smollm'); use the model's Hugging Face folder instead"
        )
    out_folder.mkdir(parents=True, exist_ok=True)
    weights = _weights(reader)
    save_tensors(weights, out_folder / "model.safetensors", {"format": "pt"})
    config = _config(reader, tied="lm_head.weight" not in weights)
    _write_json(out_folder / "config.json", config)
    special = {key: config[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
    _write_json(
        out_folder / "generation_config.json", {f"{key}_token_id": value for key, value in special.items()}
    )
    _write_tokenizer(reader, out_folder, special)


def _field(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is None:
        raise UserError(f"{reader.data.filename}: GGUF key {key!r} is missing; the file cannot be converted")
    return default


def _config(reader: GGUFReader, tied: bool) -> dict[str, Any]:
    heads = _field(reader, "llama.attention.head_count")
    width = _field(reader, "llama.embedding_length")
    bos, eos = _field(reader, "tokenizer.ggml.bos_token_id"), _field(reader, "tokenizer.ggml.eos_token_id")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].data),
        "hidden_size": width,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv", heads),
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": _field(reader, "llama.context_length"),
        # The metadata holds float32 1e-5, which prints as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": _field(reader, "llama.rope.freq_base", 10000.0),
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id", eos),
    }


def _weights(reader: GGUFReader) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    heads = _field(reader, "llama.attention.head_count")
    heads_of = {"attn_q": heads, "attn_k": _field(reader, "llama.attention.head_count_kv", heads)}
    weights = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":  # a table that transformers computes itself
            continue
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if layer and layer[2] in _IN_LAYER:
            if layer[2] in heads_of:
                values = _half_split_rope(values, heads_of[layer[2]])
            name = f"model.layers.{layer[1]}.{_IN_LAYER[layer[2]]}.weight"
        elif tensor.name.removesuffix(".weight") in _TOP:
            name = f"{_TOP[tensor.name.removesuffix('.weight')]}.weight"
        else:
            raise UserError(
                f"{reader.data.filename}: tensor {tensor.name!r} has no place in a Llama; cannot be converted"
            )
        weights[name] = torch.from_numpy(np.ascontiguousarray(values))
    return weights


def _half_split_rope(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of query and key rows: it rotates neighbouring pairs, transformers a head's two halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(reader: GGUFReader, folder: Path, special: dict[str, int]) -> None:
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _field(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "unk_token": tokens[_field(reader, "tokenizer.ggml.unknown_token_id", special["eos"])],
        **{f"{key}_token": tokens[index] for key, index in special.items()},
    }
    if template := _field(reader, "tokenizer.chat_template", ""):
        config["chat_template"] = template
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
