"""A T5 in two int8 ONNX graphs (encoder, decoder with its head) -> a Hugging Face folder with float32 weights.

onnxruntime's dynamic quantisation keeps a matrix as int8 with one scale and one zero point; the graph's node names say
which weight of the model it is. Weights come out as (q - zero point) * scale, matrices transposed to torch's order.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import T5Config

from userllm.errors import UserError
from userllm.tensor_file import save_tensors

if TYPE_CHECKING:
    from onnx import GraphProto  # type: ignore[import-not-found]

_NODE = re.compile(r"/(?:enc|m/decoder)/(block\.\d+/layer\.\d+/\w+/\w+)/MatMul_quant")
_FEED_FORWARD = "block.0.layer.1.DenseReluDense"


def convert_t5_onnx(encoder: Path, decoder: Path, tokenizer: Path, out_folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files into ``out_folder``.

    The head is the decoder's own matrix, not tied to the embeddings. Raises UserError where onnx is not installed, or
    the graphs are not those of a T5.
    """
    weights = _weights(encoder, "encoder") | _weights(decoder, "decoder")
    if "shared.weight" not in weights or "lm_head.weight" not in weights:
        raise UserError(f"{decoder}: no embeddings or no output matrix in the graph; cannot be converted")
    config = _config(weights)
    out_folder.mkdir(parents=True, exist_ok=True)
    save_tensors(weights, out_folder / "model.safetensors", {"format": "pt"})
    _write_json(out_folder / "config.json", config)
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    _write_json(out_folder / "generation_config.json", special)
    _write_tokenizer(tokenizer, out_folder)


def _weights(file: Path, part: str) -> dict[str, torch.Tensor]:
    try:
        import onnx  # type: ignore[import-not-found]
        from onnx.numpy_helper import to_array  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"{file.name}: reading it takes the package onnx; in the clone: pip install -e '.[text]'"
        ) from error
    graph: GraphProto = onnx.load(str(file)).graph
    raw = {tensor.name: to_array(tensor) for tensor in graph.initializer}

    def dequantized(name: str) -> np.ndarray:
        values, zero = (
            raw[f"{name}_quantized"].astype(np.float32),
            raw[f"{name}_zero_point"].astype(np.float32),
        )
        return (values - zero) * raw[f"{name}_scale"].astype(np.float32)

    found: dict[str, np.ndarray] = {}
    for node in graph.node:
        if node.op_type != "MatMulInteger":
            continue
        name = node.input[1].removesuffix("_quantized")
        if inner := _NODE.fullmatch(node.name):
            found[f"{part}.{inner[1].replace('/', '.')}.weight"] = dequantized(name).T
        elif node.name.endswith("/lm_head/MatMul_quant"):
            found["lm_head.weight"] = dequantized(name).T
        else:
            raise UserError(f"{file}: node {node.name} has no place in a T5; cannot be converted")
    for name, values in raw.items():
        own = re.fullmatch(r"(?:enc|m\.decoder)\.(.+\.weight)(_quantized)?", name)
        if name.removesuffix("_quantized") in ("m.shared.weight", "m.decoder.embed_tokens.weight"):
            found["shared.weight"] = dequantized(name.removesuffix("_quantized"))
        elif own and own[1] != "embed_tokens.weight":
            quantized = own[2] is not None
            found[f"{part}.{own[1]}"] = dequantized(name.removesuffix("_quantized")) if quantized else values
    return {
        name: torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
        for name, values in found.items()
    }


def _config(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Every size is read off the weights; what they do not show is T5's own and FLAN's: gated GELU, 128, 1e-6."""
    buckets, heads = weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape
    inner, width = weights["encoder.block.0.layer.0.SelfAttention.q.weight"].shape
    layers = {part: 1 + max(int(name.split(".")[2]) for name in weights if name.startswith(f"{part}.block."))
              for part in ("encoder", "decoder")}  # fmt: skip
    gated = f"encoder.{_FEED_FORWARD}.wi_0.weight" in weights
    wo = weights[f"encoder.{_FEED_FORWARD}.wo.weight"]
    sizes: dict[str, Any] = {
        "vocab_size": weights["shared.weight"].shape[0],
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": wo.shape[1],
        "num_layers": layers["encoder"],
        "num_decoder_layers": layers["decoder"],
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
    }
    settings = T5Config(**sizes).to_dict()
    return settings | {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "dtype": "float32",
        "tie_word_embeddings": False,
    }


def _write_tokenizer(file: Path, folder: Path) -> None:
    saved = json.loads(file.read_text(encoding="utf-8"))
    _write_json(folder / "tokenizer.json", saved | {"padding": None, "truncation": None})
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special}
    config |= {"model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
