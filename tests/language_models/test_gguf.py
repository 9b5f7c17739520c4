"""A Llama written the way llama.cpp writes it comes back as the same Llama."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from userllm.errors import UserError
from userllm.language_models.gguf import convert_llama_gguf


@torch.no_grad()
def test_the_converted_model_computes_the_same_logits(small_llama, write_gguf, tmp_path):
    write_gguf(tmp_path / "small.gguf", small_llama)
    convert_llama_gguf(tmp_path / "small.gguf", tmp_path / "lm")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    ids = torch.arange(3, 35)[None]
    assert torch.equal(converted(input_ids=ids).logits, small_llama(input_ids=ids).logits)
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    assert converted.config.rms_norm_eps == 1e-5


def test_quantized_weights_are_stored_without_rounding(small_llama, write_gguf, tmp_path):
    write_gguf(tmp_path / "small.gguf", small_llama, quantized=True)
    convert_llama_gguf(tmp_path / "small.gguf", tmp_path / "lm")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    weight = small_llama.model.layers[1].self_attn.k_proj.weight.detach().numpy()
    kind = GGMLQuantizationType.Q8_0
    expected = dequantize(
        quantize(weight, kind), kind
    )  # rows are quantised one by one, so their order is no matter
    assert np.array_equal(converted.model.layers[1].self_attn.k_proj.weight.detach().numpy(), expected)


def test_the_tokenizer_splits_digits_prepends_nothing_and_loses_nothing(small_llama, write_gguf, tmp_path):
    write_gguf(tmp_path / "small.gguf", small_llama)
    convert_llama_gguf(tmp_path / "small.gguf", tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    assert tokenizer.tokenize("the 19 the<|im_end|>") == ["the", "Ġ", "1", "9", "Ġthe", "<|im_end|>"]
    text = "Amélie (2001)  東京"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


def test_another_tokenizer_is_refused(small_llama, write_gguf, tmp_path):
    write_gguf(tmp_path / "small.gguf", small_llama, pre="llama-bpe")
    with pytest.raises(UserError, match=r"small\.gguf.*'llama-bpe'.*Hugging Face folder"):
        convert_llama_gguf(tmp_path / "small.gguf", tmp_path / "lm")


def test_a_truncated_file_is_one_clear_line(small_llama, write_gguf, tmp_path):
    write_gguf(tmp_path / "small.gguf", small_llama)
    content = (tmp_path / "small.gguf").read_bytes()
    for length in (100, 3000, len(content) // 2, len(content) - 100):
        (tmp_path / "short.gguf").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"short\.gguf"):
            convert_llama_gguf(tmp_path / "short.gguf", tmp_path / "lm")
