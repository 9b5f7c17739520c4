"""A small T5 written as onnxruntime's dynamic quantisation writes one, and read back."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from userllm.errors import UserError
from userllm.language_models.onnx_t5 import convert_t5_onnx
from userllm.language_models.tiny import tiny_tokenizer

onnx = pytest.importorskip("onnx")


def quantized(name, values, signed=True):
    """(initialisers of a matrix as int8 with one scale and zero point, what they stand for)."""
    kind, low = (np.int8, -128) if signed else (np.uint8, 0)
    scale = np.float32((values.max() - values.min()) / 255)
    zero = kind(np.round(low - values.min() / scale))
    q = np.clip(np.round(values / scale) + zero, low, low + 255).astype(kind)
    tensors = {f"{name}_quantized": q, f"{name}_scale": scale, f"{name}_zero_point": np.array(zero)}
    stands_for = (q.astype(np.float32) - np.float32(zero)) * scale
    return [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()], stands_for


def write_graph(file, model, part):
    prefix, nodes_prefix = ("enc", "/enc") if part == "encoder" else ("m.decoder", "/m/decoder")
    tensors, nodes, expected = [], [], {}
    for number, (name, weight) in enumerate(model.state_dict().items()):
        values = weight.numpy()
        own = name.removeprefix(f"{part}.")
        matmul = name.startswith(f"{part}.block") and values.ndim == 2 and "relative" not in name
        if matmul or (name == "lm_head.weight" and part == "decoder"):
            made, stands_for = quantized(f"onnx::MatMul_{number}", values.T)
            inner = f"{nodes_prefix}/{own.removesuffix('.weight').replace('.', '/')}"
            inner = inner.replace("block/", "block.").replace("layer/", "layer.")
            node = "/lm_head/MatMul_quant" if name == "lm_head.weight" else f"{inner}/MatMul_quant"
            nodes.append(
                onnx.helper.make_node(
                    "MatMulInteger", ["x", f"onnx::MatMul_{number}_quantized"], [f"y{number}"], name=node
                )
            )
            tensors += made
            expected[name] = stands_for.T
        elif name.startswith(f"{part}.") and "embed_tokens" not in name:
            if values.ndim == 2:
                made, expected[name] = quantized(f"{prefix}.{own}", values, signed=False)
                tensors += made
            else:
                tensors.append(onnx.numpy_helper.from_array(values, f"{prefix}.{own}"))
                expected[name] = values
        elif name == "shared.weight" and part == "decoder":
            made, expected[name] = quantized("m.shared.weight", values, signed=False)
            tensors += made
    graph = onnx.helper.make_graph(nodes, "g", [], [], initializer=tensors)
    onnx.save(onnx.helper.make_model(graph), str(file))
    return expected


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2,
                 num_decoder_layers=3, feed_forward_proj="gated-gelu", initializer_factor=2.0)
    )  # fmt: skip
    model.lm_head.weight = torch.nn.Parameter(torch.randn(len(tokenizer), 32))
    expected = write_graph(tmp_path / "encoder.onnx", model, "encoder")
    expected |= write_graph(tmp_path / "decoder.onnx", model, "decoder")
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path, expected


def test_what_is_read_is_what_the_integers_stand_for(files):
    folder, expected = files
    convert_t5_onnx(
        folder / "encoder.onnx", folder / "decoder.onnx", folder / "tokenizer.json", folder / "out"
    )
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder / "out").eval()
    found = loaded.state_dict()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].numpy(), values, atol=1e-6, err_msg=name)
    assert set(expected) == {name for name in found if "embed_tokens" not in name}
    assert (loaded.config.num_layers, loaded.config.num_decoder_layers, loaded.config.num_heads) == (2, 3, 4)
    assert not loaded.config.scale_decoder_outputs  # T5 1.1 and FLAN-T5 have a head of their own
    assert json.loads((folder / "out" / "generation_config.json").read_text())["decoder_start_token_id"] == 0
    assert AutoTokenizer.from_pretrained(folder / "out")("Heat").input_ids


def test_another_graph_is_refused(files):
    folder, _ = files
    node = onnx.helper.make_node("MatMulInteger", ["x", "w_quantized"], ["y"], name="/conv/MatMul_quant")
    graph = onnx.helper.make_graph([node], "g", [], [])
    onnx.save(onnx.helper.make_model(graph), str(folder / "encoder.onnx"))
    with pytest.raises(UserError, match="/conv/MatMul_quant has no place in a T5"):
        convert_t5_onnx(
            folder / "encoder.onnx", folder / "decoder.onnx", folder / "tokenizer.json", folder / "out"
        )
