import pytest
import torch

from userllm.errors import UserError
from userllm.language_models.tiny import ARCHITECTURES, tiny_language_model, tiny_tokenizer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_each_architecture_runs_generates_and_is_deterministic(architecture):
    model, tokenizer = tiny_language_model(architecture)
    again, _ = tiny_language_model(architecture)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other, _ = tiny_language_model(architecture, seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    batch = tokenizer(["What will the user watch next?", "Heat"], return_tensors="pt", padding=True)
    asked = {"decoder_input_ids": batch.input_ids} if model.config.is_encoder_decoder else {}
    logits = model(**batch, **asked).logits
    assert logits.shape == (*batch.input_ids.shape, len(tokenizer))
    assert logits.isfinite().all() and logits.std() > 0.5
    answer = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert answer.shape[1] <= batch.input_ids.shape[1] + 4


def test_the_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    tiny_language_model("gpt2")
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("text", ["Amélie (2001)", "  two  spaces\n", "千と千尋の神隠し", "🎬"])
def test_the_tokenizer_loses_nothing(text):
    tokenizer = tiny_tokenizer(["Toy Story (1995)"])
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_an_unknown_architecture_is_named():
    with pytest.raises(UserError, match="tiny-random-mamba: unknown architecture; known are llama"):
        tiny_language_model("mamba")
