import pytest
import torch

from userllm.language_models.text_embeddings import text_embeddings

TEXTS = ["Toy Story (1995)", "M", "", "The Empire Strikes Back (1980)", "Heat (1995)"]


@pytest.fixture(params=["llama", "gpt2", "gemma3"])
def model(request, tiny_lm):
    return tiny_lm(request.param)


@pytest.mark.parametrize("kind", ["input", "hidden"])
def test_a_mean_over_each_texts_own_tokens(model, kind):
    lm, tokenizer = model
    vectors = text_embeddings(lm, tokenizer, TEXTS, kind, batch=3)
    assert vectors.shape == (5, lm.config.get_text_config().hidden_size)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.long)
        if ids.numel() == 0:
            assert not vector.any()
            continue
        with torch.no_grad():
            if kind == "input":
                states = lm.get_input_embeddings()(ids)[0]
            else:
                states = lm(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(vector, states.mean(0), atol=1e-5, rtol=1e-4)
