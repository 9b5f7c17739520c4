"""Products in bfloat16: the same weights, answers close by, and everything but the layers' products left as it was."""

import copy

import pytest
import torch
from torch import nn

from userllm.errors import UserError
from userllm.language_models.pretrained import LanguageModelConfig, load
from userllm.language_models.products import Bfloat16Linear, products_in_bfloat16
from userllm.language_models.tiny import tiny_language_model


@pytest.fixture(params=["llama", "gemma3", "t5"])
def pair(request):
    lm, tokenizer = tiny_language_model(request.param)
    return lm.eval(), tokenizer


def logits(lm, tokenizer):
    batch = tokenizer(["What will the user watch next?"], return_tensors="pt")
    asked = {"decoder_input_ids": batch.input_ids} if lm.config.is_encoder_decoder else {}
    return lm(**batch, **asked).logits


def test_answers_are_closer_than_in_bfloat16_throughout_and_weights_the_same(pair):
    lm, tokenizer = pair
    throughout = logits(copy.deepcopy(lm).bfloat16(), tokenizer).float()
    exact, before = logits(lm, tokenizer), copy.deepcopy(lm.state_dict())
    inside = sum(type(m) is nn.Linear for m in lm.modules()) - (type(lm.get_output_embeddings()) is nn.Linear)
    assert products_in_bfloat16(lm) == inside > 0
    assert products_in_bfloat16(lm) == 0  # they are already
    assert not isinstance(lm.get_output_embeddings(), Bfloat16Linear)
    rounded = logits(lm, tokenizer)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    if (
        not lm.config.is_encoder_decoder
    ):  # a random T5, whose attention has no scale, makes much of any rounding
        assert (rounded - exact).abs().mean() < (throughout - exact).abs().mean()
    after = lm.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_are_those_of_the_rounded_product(frozen):
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    x = torch.randn(5, 16, requires_grad=True)
    rounded = Bfloat16Linear(linear).requires_grad_(not frozen)
    out = rounded(x)
    torch.testing.assert_close(out, linear(x), rtol=0.02, atol=0.02)
    out.sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(5, -1), rtol=0.02, atol=0.02)
    assert (linear.weight.grad is None) == frozen
    if not frozen:
        assert linear.weight.grad.dtype == torch.float32
        torch.testing.assert_close(linear.weight.grad, x.detach().sum(0).expand(8, -1), rtol=0.02, atol=0.02)


def test_weights_that_change_are_cast_anew():
    linear = nn.Linear(4, 4, bias=False).requires_grad_(False)
    rounded, x = Bfloat16Linear(linear), torch.eye(4)
    rounded(x)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(4))
    assert torch.equal(rounded(x), torch.eye(4))
    linear.weight.data = 3 * torch.eye(4)
    assert torch.equal(rounded(x), 3 * torch.eye(4))
    linear.weight.data = torch.eye(4)
    again = copy.deepcopy(rounded)
    again.load_state_dict({"weight": 2 * torch.eye(4)})
    assert torch.equal(again(x), 2 * torch.eye(4)) and torch.equal(rounded(x), torch.eye(4))


def test_the_source_says_so_and_what_cannot_be_is_refused():
    lm, _, reference = load(LanguageModelConfig("tiny-random-llama", products="bfloat16"))
    assert reference.products == "bfloat16" and reference.source.endswith("; matrix products in bfloat16")
    assert any(isinstance(module, Bfloat16Linear) for module in lm.modules())
    with pytest.raises(UserError, match="no linear layers"):
        load(LanguageModelConfig("tiny-random-gpt2", products="bfloat16"))
    with pytest.raises(UserError, match=r"lm.dtype: float32"):
        load(LanguageModelConfig("tiny-random-llama", dtype="bfloat16", products="bfloat16"))
