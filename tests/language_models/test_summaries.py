import pytest
import torch

from userllm.language_models.end_tokens import end_tokens
from userllm.language_models.pretrained import LanguageModelConfig, load
from userllm.language_models.summaries import Summarizer

TINY = LanguageModelConfig(name="tiny-random-llama")
TEXTS = [
    "Movies: Heat (1995); Toy Story (1995);",
    "Movies: Alien (1979);",
    "Movies: M (1931); Z (1969); Heat (1995);",
]


@pytest.fixture
def make(tmp_path):
    def build(**settings):
        told = {
            "lm": TINY,
            "instruction": " In short?",
            "new_tokens": 5,
            "file": tmp_path / "summaries.sqlite",
        }
        return Summarizer(**(told | settings))

    return build


def test_a_summary_is_the_greedy_continuation(make):
    lm, tokenizer, _ = load(TINY)
    ids = tokenizer(TEXTS[0] + " In short?\n", return_tensors="pt")["input_ids"]
    begun = ids.shape[1]
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, lm(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    expected = " ".join(tokenizer.decode(ids[0, begun:], skip_special_tokens=True).split())
    assert make()([TEXTS[0]]) == [expected]


def test_an_encoder_decoder_writes_a_text_of_its_own(make):
    t5 = LanguageModelConfig(name="tiny-random-t5")
    lm, tokenizer, _ = load(t5)
    read = tokenizer(TEXTS[0] + " In short?\n", return_tensors="pt")["input_ids"]
    ids = torch.tensor([[0]])
    with torch.no_grad():
        while ids.shape[1] < 6 and ids[0, -1] != tokenizer.eos_token_id:
            logits = lm(input_ids=read, decoder_input_ids=ids).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    expected = " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
    assert expected and make(lm=t5)([TEXTS[0]]) == [expected]
    batch = make(lm=t5)(TEXTS)
    assert batch[0] == expected


@pytest.mark.parametrize("chat", [True, False])
def test_a_turn_of_a_chat_ends_where_the_language_model_says(make, monkeypatch, chat):
    """Gemma's and Phi-3's end of turn is named in their generation_config alone."""
    lm, tokenizer, resolved = load(TINY)
    every = list(range(len(tokenizer)))
    lm.generation_config.eos_token_id = every
    assert end_tokens(lm, tokenizer) == [tokenizer.eos_token_id, *(n for n in every if n != 2)]
    lm.generation_config.eos_token_id = None
    assert end_tokens(lm, tokenizer) == [tokenizer.eos_token_id]
    lm.generation_config.eos_token_id = 7
    assert end_tokens(lm, tokenizer) == [tokenizer.eos_token_id, 7]
    whole = tokenizer(make()(TEXTS[:1]), add_special_tokens=False)["input_ids"][0]
    assert len(whole) > 1
    if chat:
        tokenizer.chat_template = "{{ messages[0].content }}\n"
    lm.generation_config.eos_token_id = every
    monkeypatch.setattr("userllm.language_models.summaries.load", lambda config: (lm, tokenizer, resolved))
    [said] = make(file=make().file.with_name("other.sqlite"))(TEXTS[:1])
    assert len(tokenizer(said, add_special_tokens=False)["input_ids"]) == (1 if chat else len(whole))


def test_a_batch_equals_one_at_a_time(make, tmp_path):
    alone = [make(file=tmp_path / f"{n}.sqlite")([text])[0] for n, text in enumerate(TEXTS)]
    for batch in (2, 16):
        assert make(file=tmp_path / f"batch{batch}.sqlite", batch=batch)(TEXTS) == alone


def test_a_summary_is_written_once(make):
    first = make()
    said = first([*TEXTS, TEXTS[0]])
    assert first.written == 3 and said[3] == said[0]
    second = make()
    assert second(TEXTS[::-1]) == said[:3][::-1]
    assert second.written == 0
    assert second([]) == []


def test_what_is_found_on_disk_counts_once_with_the_seconds_it_took(make, monkeypatch):
    now = [0.0]

    def tick():
        now[0] += 6.0
        return now[0]

    monkeypatch.setattr("userllm.language_models.summaries.clock_of", lambda device: tick)
    first = make()
    first([*TEXTS, TEXTS[0]])  # one batch of three, 6 s
    first(TEXTS)
    assert first.spared == 0
    second = make()
    second(TEXTS[:2])
    assert second.spared == pytest.approx(4)
    second(TEXTS)
    second(TEXTS)
    assert second.spared == pytest.approx(6)


@pytest.mark.parametrize(
    "other", [{"instruction": " Well?"}, {"new_tokens": 4}, {"lm": LanguageModelConfig("tiny-random-gpt2")}]
)
def test_another_prompt_length_or_model_has_summaries_of_its_own(make, other):
    make()(TEXTS[:1])
    again = make(**other)
    again(TEXTS[:1])
    assert again.written == 1


def test_what_was_written_before_a_crash_is_kept(make, monkeypatch):
    first = make(batch=1)
    write, calls = first._write, []

    def crash(texts):
        if calls:
            raise KeyboardInterrupt
        calls.append(texts)
        return write(texts)

    monkeypatch.setattr(first, "_write", crash)
    with pytest.raises(KeyboardInterrupt):
        first(TEXTS)
    second = make()
    second(TEXTS)
    assert second.written == 2


def test_who_summarises_is_told(make):
    told = make().described()
    assert told["lm"] == "tiny-random-llama" and told["decoding"] == "greedy" and len(told["sha256"]) == 64
