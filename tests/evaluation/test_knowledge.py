"""Perplexity in windows against one plain pass, and what each strategy does to the base LM."""

import hashlib
import math

import pytest
import torch

from userllm.evaluation.knowledge import Reading, general_english, knowledge_kept, read_text
from userllm.language_models.pretrained import LanguageModelConfig, load

TEXT = "Heat is a film about a thief. What will the user watch next? Toy Story, perhaps, or something else."


def by_hand(lm, ids, first):
    """Mean negative log-likelihood of ids[first:] in one pass."""
    with torch.no_grad():
        log_p = torch.log_softmax(lm(torch.tensor([ids])).logits[0], -1)
    return -sum(float(log_p[n - 1, ids[n]]) for n in range(first, len(ids))) / (len(ids) - first)


def test_one_window_is_one_pass(tiny_lm):
    lm, tokenizer = tiny_lm("llama")
    ids = tokenizer(TEXT)["input_ids"]
    reading = read_text(lm, tokenizer, TEXT)
    assert reading.tokens == len(ids) - 1
    assert reading.nats_per_token == pytest.approx(by_hand(lm, ids, 1), abs=1e-4)
    assert reading.perplexity == pytest.approx(math.exp(reading.nats_per_token))
    assert read_text(lm, tokenizer, TEXT, tokens=10).nats_per_token == pytest.approx(
        by_hand(lm, ids[:10], 1), abs=1e-4
    )


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 5), (9, 1), (100, 30)])
@pytest.mark.parametrize("begins", [False, True])
def test_windows_count_every_token_once(tiny_lm, window, stride, begins, monkeypatch):
    lm, tokenizer = tiny_lm("gpt2")
    ids = tokenizer(TEXT)["input_ids"]
    bos = [tokenizer.bos_token_id] if begins else []
    plain = type(tokenizer).__call__
    if begins:  # as Llama's and Gemma's tokenizers do

        def call(self, text, add_special_tokens=True, **kw):
            found = plain(self, text, add_special_tokens=False, **kw)
            return {"input_ids": [*bos, *found["input_ids"]] if add_special_tokens else found["input_ids"]}

        monkeypatch.setattr(type(tokenizer), "__call__", call)
    if (window, stride) == (8, 8):  # nothing to foresee the second window's first token from
        with pytest.raises(ValueError, match="cannot be read"):
            read_text(lm, tokenizer, TEXT, None, window, stride)
        return
    reading = read_text(lm, tokenizer, TEXT, None, window, stride)
    room, total, counted = window - len(bos), 0.0, 0 if begins else 1
    assert reading.tokens == len(ids) - counted
    while counted < len(ids):
        # the first window that holds the token at ``counted``
        first = next(f for f in range(0, len(ids), stride) if f <= counted < f + room)
        part = [*bos, *ids[first : counted + 1]]
        total += by_hand(lm, part, len(part) - 1)
        counted += 1
    assert reading.nats_per_token == pytest.approx(total / reading.tokens, abs=1e-4)


def test_nothing_to_read(tiny_lm):
    lm, tokenizer = tiny_lm("llama")
    with pytest.raises(ValueError, match="cannot be read"):
        read_text(lm, tokenizer, "")


@pytest.mark.parametrize("strategy", ["enc", "proj", "lora", "full"])
@pytest.mark.parametrize("attend", ["text", "answer"])
def test_what_a_strategy_does_to_the_base_lm(make_user_llm, dataset, strategy, attend):
    model = make_user_llm(strategy, attend=attend)
    batch, _ = model.collator.from_histories([dataset.history(7), dataset.history(2)], max_length=8)
    with torch.no_grad():
        users = model.context(batch)
    original, tokenizer, _ = load(LanguageModelConfig(name="tiny-random-llama"))
    found = knowledge_kept(model, users, original if strategy == "full" else None, 60, 40, 30)
    text = general_english()
    before = read_text(original, tokenizer, text, 60, 40, 30)
    assert found["base"] == before.as_dict()
    assert (found["tokens"], found["users"]) == (59, 2)
    assert found["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    # bit for bit where the LM is frozen
    assert (found["without_user"] == found["base"]) == (strategy in ("enc", "proj"))
    each = []
    for user in range(2):
        with model.conditioned(users.select(torch.tensor([user]))):
            each.append(read_text(model.lm, tokenizer, text, 60, 40, 30).nats_per_token)
    mean = Reading(sum(each) / 2, 59)
    assert found["with_users"] == pytest.approx(mean.as_dict())
    assert each[0] != each[1] and found["with_users"] != found["without_user"]
    assert model.attachment.attached
    if strategy == "full":
        with pytest.raises(ValueError, match="give the original"):
            knowledge_kept(model, users)


def test_the_text_is_general_english():
    words = general_english().split()
    assert 1400 < len(words) < 1800
    assert not {"movie", "movies", "film", "user", "rating"} & {word.strip(".,").lower() for word in words}
