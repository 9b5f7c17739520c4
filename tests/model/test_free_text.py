"""Free text for users: losses and generation against written-out sequences, one at a time and without a cache."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from userllm.decoding.next_token import TextDecoding
from userllm.errors import UserError
from userllm.fusion.catalogue import CatalogueConfig
from userllm.fusion.history_text import HistoryTextConfig
from userllm.fusion.perceiver import PerceiverConfig

PROMPTS = ["Write a review for Heat (1995).", "Review:", "What does this user say of Alien (1979)? They say:"]
TARGETS = ["A movie of action and drama, and long.", "No.", "The user has not seen it"]
VARIANTS = {
    "text": {},
    "answer": {"attend": "answer"},
    "soft": {"kind": "soft_prompt"},
    "perceiver": {"perceiver": PerceiverConfig(latents=3, layers=1, heads=2)},
    "answer+history": {"attend": "answer", "text": HistoryTextConfig(events=2)},
    "history": {"kind": "none", "text": HistoryTextConfig(events=3)},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
LMS = {  # positions turned, learned, in a sliding window
    "tiny-random-llama": VARIANTS,
    "tiny-random-gpt2": ["answer", "soft"],
    "tiny-random-gemma3": ["text", "answer+history"],
}
every_model = pytest.mark.parametrize(("lm", "variant"), [(lm, v) for lm, some in LMS.items() for v in some])


def model_of(make_user_llm, variant, **more):
    strategy = "lora" if VARIANTS[variant].get("kind") == "none" else "enc"
    return make_user_llm(strategy, **(VARIANTS[variant] | more))


@pytest.fixture
def users(stored):
    """Contexts of three users: 6 events, 2, none."""
    return lambda model: model.context(stored.batch([(7, 0, 6), (5, 0, 2), (2, 0, 0)]))


def alone(users, row):
    return users.select(torch.tensor([row]))


def next_logits(model, prompt, tokens, user):
    """Logits of the tokens and of what follows them, [tokens + 1, V]: no padding, no cache, one text."""
    ids = torch.tensor([[*model.opening.tolist(), *model.tokenizer(prompt)["input_ids"], *tokens]])
    embedded = model.lm.get_input_embeddings()(ids)[:, len(model.opening) :]
    before = user.prefix.embeddings[:, user.prefix.mask[0]] if user.prefix is not None else None
    whole = embedded if before is None else torch.cat([before, embedded], dim=1)
    blind = whole.shape[1] - len(tokens) - 1 if model.reads_ahead else 0

    def only_the_answer_attends(_, args, out):
        return torch.cat([args[0][:, :blind], out[:, blind:]], dim=1)

    hooks = [b.register_forward_hook(only_the_answer_attends) for b in model.attachment.blocks.values()]
    with model.attending(user):
        hidden = model.lm.get_decoder()(inputs_embeds=whole).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    return model.head(hidden[len(hidden) - len(tokens) - 1 :])


@every_model
def test_losses_are_those_of_each_text_written_out(make_user_llm, users, variant, lm):
    model = model_of(make_user_llm, variant, lm=lm)
    everyone, most = users(model), 4 if variant == "answer" else None
    with torch.no_grad():
        nll, tokens = model.text_losses(PROMPTS, TARGETS, everyone, most)
        for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
            ids = [*model.tokenizer(" " + target)["input_ids"], model.tokenizer.eos_token_id][:most]
            logits = next_logits(model, prompt, ids[:-1], alone(everyone, row))
            expected = F.cross_entropy(logits, torch.tensor(ids), reduction="sum")
            assert float(nll[row]) == pytest.approx(float(expected), abs=2e-3)
            assert int(tokens[row]) == len(ids)


@every_variant
def test_a_user_who_says_nothing_leaves_the_base_lm(make_user_llm, users, variant):
    """Gates at zero, and a user without a history: the loss of the plain language model, by its own forward pass."""
    model = model_of(make_user_llm, variant, stir=False).requires_grad_(False)
    everyone = users(model)
    base, tokens = model.text_losses(PROMPTS, TARGETS, None)
    for row, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        ids = model.tokenizer(prompt)["input_ids"]
        answer = [*model.tokenizer(" " + target)["input_ids"], model.tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(ids) + answer])
        with torch.no_grad(), model.attachment.detached():
            expected = model.lm(input_ids=torch.tensor([ids + answer]), labels=labels).loss * len(answer)
        assert float(base[row]) == pytest.approx(float(expected), abs=2e-3)
        assert int(tokens[row]) == len(answer)
    nll, _ = model.text_losses(PROMPTS, TARGETS, everyone)
    if variant in ("text", "answer", "perceiver"):
        torch.testing.assert_close(nll, base, atol=1e-4, rtol=1e-5)
    elif variant == "answer+history":
        assert float(nll[2]) == pytest.approx(float(base[2]), abs=2e-3)
    else:
        assert not torch.allclose(nll[:2], base[:2], atol=1e-2)


@every_model
def test_greedy_texts_are_those_of_each_one_reread_from_the_start(make_user_llm, users, variant, lm):
    """With a cache, in a batch, its texts ending one after the other: as alone, all of it read again for each token."""
    model = model_of(make_user_llm, variant, lm=lm)
    everyone = users(model)
    probe = model.write_texts(PROMPTS, everyone, TextDecoding(max_new_tokens=9))
    # an end of text that comes at different times
    third = model.tokenizer(probe[0] or "x")["input_ids"]
    model.tokenizer.eos_token_id = third[min(2, len(third) - 1)]
    try:
        written = model.write_texts(PROMPTS, everyone, TextDecoding(max_new_tokens=9))
        with torch.no_grad():
            for row, prompt in enumerate(PROMPTS):
                tokens: list[int] = []
                while len(tokens) < 9:
                    best = int(next_logits(model, prompt, tokens, alone(everyone, row))[-1].argmax())
                    if best == model.tokenizer.eos_token_id:
                        break
                    tokens.append(best)
                expected = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                assert written[row] == expected
    finally:
        model.tokenizer.eos_token = "<eos>"


def test_one_user_may_be_asked_many_things(make_user_llm, users):
    model = make_user_llm()
    one = alone(users(model), 0)
    together = model.write_texts(PROMPTS, one, TextDecoding(max_new_tokens=5))
    assert together == [
        model.write_texts([prompt], one, TextDecoding(max_new_tokens=5))[0] for prompt in PROMPTS
    ]
    nobody = model.write_texts(PROMPTS, None, TextDecoding(max_new_tokens=5))
    for prompt, text in zip(PROMPTS, nobody, strict=True):
        assert text == model.generate(prompt, None, max_new_tokens=5).strip()


def test_generate_and_write_agree(make_user_llm, users, dataset):
    for variant in ("text", "answer", "soft"):
        model = model_of(make_user_llm, variant)
        text = model.write_texts(PROMPTS[:1], alone(users(model), 0), TextDecoding(max_new_tokens=6))[0]
        assert text == model.generate(PROMPTS[0], dataset.history(7, 0, 6), max_new_tokens=6).strip()


def test_drawn_texts_depend_on_their_number_alone(make_user_llm, users):
    model = make_user_llm()
    everyone = users(model)
    decoding = TextDecoding(max_new_tokens=6, sample=True, temperature=1.5, seed=3)
    together = model.write_texts(PROMPTS, everyone, decoding, [4, 5, 6])
    assert together != model.write_texts(PROMPTS, everyone, decoding, [5, 6, 7])
    for row, number in enumerate([4, 5, 6]):
        one = model.write_texts([PROMPTS[row]], alone(everyone, row), decoding, [number])
        assert one == [together[row]]


def test_what_is_said_of_titles_stays_out_of_free_text(make_user_llm, users, dataset):
    with_it, without = (make_user_llm(catalogue=c) for c in (CatalogueConfig(tokens=2), None))
    without.load_state_dict(with_it.state_dict(), strict=False)
    with_it.catalogue.encoder.data = torch.tensor([0.5, 0.9])
    a, b = users(with_it), users(without)
    answers = torch.tensor([1, 2, 3])
    with torch.no_grad():
        differ = [m.answer_log_likelihood("next_item", answers, u) for m, u in ((with_it, a), (without, b))]
        assert not torch.allclose(*differ, atol=1e-2)
        losses = [m.text_losses(PROMPTS, TARGETS, u)[0] for m, u in ((with_it, a), (without, b))]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-5)
    texts = [m.generate(PROMPTS[0], dataset.history(7), max_new_tokens=6) for m in (with_it, without)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("strategy", ["proj", "enc", "lora", "full"])
@pytest.mark.parametrize("attend", ["text", "answer"])
def test_gradients_reach_what_should_learn(make_user_llm, users, strategy, attend):
    model = make_user_llm(strategy, attend=attend)
    model.text_losses(PROMPTS[:2], TARGETS[:2], users(model).select(torch.tensor([0, 1])))[0].sum().backward()
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    idle = {name for name in learning if dict(model.named_parameters())[name].grad is None}
    assert learning and idle == set()
    for part, there in (("encoder.", "enc lora full"), ("lora_", "lora"), ("lm_head", "full")):
        moved = [name for name in learning if part in name]
        assert bool(moved) == (strategy in there.split()) or part == "lm_head"


def test_bad_input_is_named(make_user_llm, users):
    model = make_user_llm()
    with pytest.raises(UserError, match="prompt 1 is empty"):
        model.write_texts(["a", ""], None, TextDecoding())
    for settings, message in (
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "at most max_new_tokens"),
        ({"temperature": 0.0}, "above 0"),
        ({"top_p": 1.2}, "at most 1"),
    ):
        with pytest.raises(UserError, match=message):
            model.write_texts(["a"], None, TextDecoding(**settings))


def test_no_prompts_no_texts(make_user_llm):
    assert make_user_llm().write_texts([], None, TextDecoding()) == []


@pytest.mark.parametrize("least", [0, 1, 4])
def test_a_text_does_not_end_before_its_least_tokens(make_user_llm, users, least):
    """As transformers' generate with ``min_new_tokens``; the end of text is what the model would write first."""
    model = make_user_llm()
    everyone = users(model)
    read = torch.tensor([model.tokenizer(PROMPTS[0])["input_ids"]])
    first = int(next_logits(model, PROMPTS[0], [], alone(everyone, 0))[-1].argmax())
    model.tokenizer.eos_token_id = first
    try:
        decoding = TextDecoding(max_new_tokens=6, min_new_tokens=least)
        written = model.write_texts(PROMPTS[:1], alone(everyone, 0), decoding)[0]
        with model.attending(alone(everyone, 0)), torch.no_grad():
            tokens = model.lm.generate(
                input_ids=read,
                max_new_tokens=6,
                min_new_tokens=least,
                do_sample=False,
                eos_token_id=first,
                pad_token_id=first,
            )[0, read.shape[1] :]
        kept = [t for t in tokens.tolist() if t != first]
        assert written == model.tokenizer.decode(kept, skip_special_tokens=True).strip()
        assert len(kept) >= least and (written == "") == (least == 0)
    finally:
        model.tokenizer.eos_token = "<eos>"


@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.2])
def test_tokens_are_drawn_as_often_as_they_are_likely(top_p):
    p = torch.tensor([0.15, 0.5, 0.05, 0.3])
    decoding = TextDecoding(sample=True, top_p=top_p, temperature=0.5)
    draws = torch.from_numpy(np.linspace(0, 1, 100_001)[:-1])
    chosen = decoding.choose((p.log() * 0.5).expand(len(draws), -1), draws)
    kept = {1.0: [0, 1, 2, 3], 0.8: [1, 3], 0.2: [1]}[top_p]
    expected = torch.zeros(4)
    expected[kept] = p[kept] / p[kept].sum()
    shares = torch.bincount(chosen, minlength=4) / len(draws)
    torch.testing.assert_close(shares, expected, atol=2e-4, rtol=0)
    last = decoding.choose(p.log()[None], torch.ones(1, dtype=torch.float64))
    assert int(last) in kept


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_temperature_near_zero_draws_the_likeliest(top_p):
    logits = torch.tensor([[3.0, 800.0, -torch.inf, 799.9]])
    decoding = TextDecoding(sample=True, temperature=1e-307, top_p=top_p)
    assert decoding.choose(logits, torch.tensor([0.99])).tolist() == [1]


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_no_run_of_tokens_comes_twice(n):
    written = torch.tensor([[5, 1, 2, 5, 1, 2, 5], [0, 1, 2, 3, 4, 5, 6]])
    logits = torch.zeros(2, 8)
    kept = TextDecoding(no_repeat=n).allowed(logits, written, 7)
    banned = [set((row == -torch.inf).nonzero()[:, 0].tolist()) for row in kept]
    expected = {0: [set(), set()], 1: [{1, 2, 5}, set(range(7))], 2: [{1}, set()], 3: [{1}, set()]}[n]
    assert banned == expected
    short = written[:, : max(n - 1, 0)]
    assert torch.equal(TextDecoding(no_repeat=n).allowed(logits, short, 7), logits)


def test_a_text_without_repeats_has_none(make_user_llm, users):
    model = make_user_llm()
    plain, without = (
        model.write_texts(PROMPTS, users(model), TextDecoding(max_new_tokens=24, no_repeat=n)) for n in (0, 2)
    )

    def pairs(texts):
        ids = [model.tokenizer(text)["input_ids"] for text in texts]
        return [list(pairwise(one)) for one in ids]

    assert any(len(set(one)) < len(one) for one in pairs(plain))
    assert plain != without


@every_variant
def test_a_language_model_in_bfloat16(make_user_llm, users, variant):
    model = model_of(make_user_llm, variant, dtype="bfloat16")
    context = users(model)
    nll, tokens = model.text_losses(PROMPTS, TARGETS, context)
    assert nll.isfinite().all() and (nll > 0).all() and tokens.dtype == torch.long
    assert len(model.write_texts(PROMPTS, context, TextDecoding(max_new_tokens=3))) == 3


def test_users_are_one_for_all_or_one_for_each(make_user_llm, users):
    model = make_user_llm()
    two = users(model).select(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="2 users for 3 prompts"):
        model.write_texts(PROMPTS, two, TextDecoding(max_new_tokens=2))
    with pytest.raises(ValueError, match="2 users for 3 prompts"):
        model.text_losses(PROMPTS, TARGETS, two)
