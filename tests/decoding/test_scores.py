"""Scores inside real (tiny) language models against their own full forward passes."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from userllm.decoding.answers import LogitHead
from userllm.decoding.beam_search import search_free
from userllm.errors import UserError
from userllm.language_models.products import products_in_bfloat16
from userllm.text_in_lm import TextInLM

every_normalization = pytest.mark.parametrize("normalization", ["catalogue", "vocabulary"])


@contextmanager
def answer_attends_only(model, prompt_length):
    """Cross-attention as ``attend="answer"`` defines it: at the prompt's last token and after it."""

    def before_the_answer_nothing(_block, args, output):
        return torch.cat([args[0][:, : prompt_length - 1], output[:, prompt_length - 1 :]], dim=1)

    hooks = [b.register_forward_hook(before_the_answer_nothing) for b in model.attachment.blocks.values()]
    yield
    for hook in hooks:
        hook.remove()


def by_full_forward(model, task, users, normalization):
    """Log-likelihood of every answer for every user: the LM's own logits over title and end."""
    answers, tokenizer = model.tasks[task].answers, model.tokenizer
    prompt = tokenizer(model.tasks[task].config.prompt)["input_ids"]
    texts = [(*tokenizer(f" {a}")["input_ids"], tokenizer.eos_token_id) for a in answers]
    longest = max(map(len, texts))
    ids = torch.tensor([[*prompt, *tokens, *[0] * (longest - len(tokens))] for tokens in texts])
    scores = torch.zeros(len(users.tokens), len(texts))
    for user, one in enumerate(per_user(users)):
        limited = (
            answer_attends_only(model, len(prompt)) if model.config.attend == "answer" else nullcontext()
        )
        with torch.no_grad(), model.conditioned(one), limited:
            log_p = torch.log_softmax(model.lm(ids).logits[:, len(prompt) - 1 :], -1).numpy()
        for number, tokens in enumerate(texts):
            for place, token in enumerate(tokens):
                scores[user, number] += log_p[number, place, token]
                if normalization == "catalogue":  # conditioned on going on as some answer does
                    allowed = sorted({t[place] for t in texts if t[:place] == tokens[:place]})
                    scores[user, number] -= np.logaddexp.reduce(log_p[number, place, allowed])
    return scores


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def per_user(users):
    return [users.select(torch.tensor([i])) for i in range(len(users.tokens))]


ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2", "opt", "gpt_neox", "phi3"]


@pytest.mark.parametrize(
    ("architecture", "normalization", "task", "attend"),
    [
        *(
            pytest.param(
                name, "catalogue", "next_item", attend, marks=() if (n + m) % 2 == 0 else pytest.mark.slow
            )
            for n, name in enumerate(ARCHITECTURES)
            for m, attend in enumerate(("text", "answer"))
        ),
        ("llama", "vocabulary", "next_item", "text"),
        ("gemma3", "vocabulary", "next_item", "answer"),
        ("opt", "vocabulary", "favorite_genre", "text"),
        ("llama", "catalogue", "favorite_genre", "answer"),
    ],
)
def test_every_way_to_a_score_agrees(make_model, histories, architecture, normalization, task, attend):
    """Teacher forcing, all answers at once, beam search; with and without replayed lower states."""
    model = make_model(architecture, normalization=normalization, attend=attend)
    model.check_head()
    with torch.no_grad():
        users = model.context(histories)
    expected = by_full_forward(model, task, users, normalization)
    count = len(model.tasks[task].answers)
    if normalization == "catalogue":
        close(expected.exp().sum(1), torch.ones(3))
    for stored in (False, True):
        if stored:
            model.store_lower_states()
            assert (task in model.lower) == (normalization == "catalogue")
        close(
            torch.stack([model.all_log_likelihoods(task, one, batch=7) for one in per_user(users)]), expected
        )
        for answer in (0, count - 1):
            with torch.no_grad():
                found = model.answer_log_likelihood(task, torch.full((3,), answer), users)
            close(found, expected[:, answer])
        ranking = model.rank_answers(task, users, k=count, beams=count)
        best = expected.sort(dim=1, descending=True).values
        close(ranking.scores, best)
        close(expected.gather(1, ranking.answers), best)
        assert ranking.answers.sort(1).values.tolist() == [list(range(count))] * 3
        one = model.rank_answers(task, per_user(users)[1], k=5, beams=5)
        batch = model.rank_answers(task, users, k=5, beams=5)
        assert torch.equal(one.answers[0], batch.answers[1])
        close(one.scores[0], batch.scores[1])
    with model.without_user():
        nobody = model.all_log_likelihoods(task, None)
    close(nobody, expected[2])  # the user without events


@pytest.mark.parametrize("attend", ["text", "answer"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts_side_by_side_equal_texts_in_rows(make_model, histories, architecture, attend):
    """Few beams, so that texts are dropped and continued twice on the way."""
    model = make_model(architecture, attend=attend)
    with torch.no_grad():
        users = model.context(histories)
    assert model.reads_trees == (architecture != "gemma3")  # whose sliding windows forget
    for _ in range(2):
        side_by_side = model.rank_answers("next_item", users, k=5, beams=3)
        model.reads_trees = False
        rows = model.rank_answers("next_item", users, k=5, beams=3)
        assert torch.equal(side_by_side.answers, rows.answers)
        close(side_by_side.scores, rows.scores)
        del model.reads_trees
        model.store_lower_states()


@pytest.mark.parametrize("rounded", [True, False])
def test_what_rounded_products_differ_by_is_no_other_text(make_model, rounded):
    """On a GPU the same text, read in another shape, is rounded to bfloat16 otherwise now and then."""
    model = make_model("llama")
    if rounded:
        products_in_bfloat16(model.lm)
    draws = torch.Generator().manual_seed(0)
    norm = model.lm.get_decoder().norm
    norm.register_forward_hook(
        lambda module, given, out: out * (1 + 0.01 * torch.randn(out.shape, generator=draws))
    )
    assert model.reads_trees == rounded


@every_normalization
@pytest.mark.parametrize("layers", ["all", "every:2", "last:1"])
def test_other_fused_layers_and_a_perceiver(make_model, histories, normalization, layers):
    from userllm.fusion.perceiver import PerceiverConfig

    model = make_model(layers=layers, normalization=normalization, perceiver=PerceiverConfig(3, 2, 2))
    with torch.no_grad():
        users = model.context(histories)
    expected = by_full_forward(model, "next_item", users, normalization)
    model.store_lower_states()
    assert bool(model.lower) == (layers != "all" and normalization == "catalogue")
    ranking = model.rank_answers("next_item", users, k=20, beams=20)
    close(ranking.scores, expected.sort(dim=1, descending=True).values)


OTHERS = {
    "bloom": {
        "hidden_size": 32,
        "n_layer": 4,
        "n_head": 4,
    },  # a layer returns a tuple; no positions but a slope
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "rotary_dim": 8},
    "gpt_neo": {  # windows of which no cache tells
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 16,
    },
}


@pytest.mark.parametrize("attend", ["text", "answer"])
@pytest.mark.parametrize("name", OTHERS)
def test_lms_whose_layers_return_tuples(make_model, histories, name, attend):
    model = make_model(other_config=(name, OTHERS[name]), attend=attend)
    model.check_head()
    with torch.no_grad():
        users = model.context(histories)
    assert model.reads_trees == (name == "gptj")  # bloom counts its tokens itself
    expected = by_full_forward(model, "next_item", users, "catalogue")
    for _ in range(2):
        ranking = model.rank_answers("next_item", users, k=20, beams=20)
        close(ranking.scores, expected.sort(dim=1, descending=True).values)
        model.store_lower_states()


@pytest.mark.parametrize("name", ["mamba", "qwen3_next", "falcon_h1"])
def test_recurrent_lms_are_refused(make_model, name):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    with pytest.raises(UserError, match="keeps a recurrent state"):
        make_model(other_config=(name, sizes))


def test_excluded_items_are_passed_over(make_model, histories):
    model = make_model()
    with torch.no_grad():
        users = model.context(histories)
    excluded = torch.rand(3, 20) < 0.4
    found = model.rank_answers("next_item", users, 20, 20, excluded)
    scores = torch.stack([model.all_log_likelihoods("next_item", one) for one in per_user(users)])
    close(found.scores, scores.masked_fill(excluded, -torch.inf).sort(dim=1, descending=True).values)
    for user in range(3):
        given = {a for a in found.answers[user].tolist() if a >= 0}
        assert given == set(torch.nonzero(~excluded[user])[:, 0].tolist())


@every_normalization
def test_losses_are_log_likelihoods_and_a_teacher_reads_child_by_child(make_model, histories, normalization):
    model = make_model(normalization=normalization)
    users = model.context(histories)
    answers = torch.tensor([0, 5, 7])
    teacher = torch.softmax(torch.randn(3, 20), 1)
    nll, taught = model.answer_losses("next_item", answers, users, teacher)
    close(-nll, model.answer_log_likelihood("next_item", answers, users))
    tokenizer = model.tokenizer
    texts = [
        (*tokenizer(f" {a}")["input_ids"], tokenizer.eos_token_id) for a in model.tasks["next_item"].answers
    ]
    prompt = tokenizer(model.tasks["next_item"].config.prompt)["input_ids"]
    for row, answer in enumerate(answers.tolist()):
        tokens, expected = texts[answer], 0.0
        with torch.no_grad(), model.conditioned(per_user(users)[row]):
            logits = model.lm(torch.tensor([prompt + list(tokens)])).logits[0, len(prompt) - 1 : -1]
        for place in range(len(tokens)):
            below = [n for n, t in enumerate(texts) if t[:place] == tokens[:place]]
            allowed = sorted({texts[n][place] for n in below})
            if normalization == "catalogue":
                if len(allowed) == 1:
                    continue
                log_p = dict(zip(allowed, torch.log_softmax(logits[place, allowed], 0), strict=True))
            else:
                log_p = torch.log_softmax(logits[place], 0)
            for n in below:
                expected -= float(teacher[row, n] / teacher[row, below].sum() * log_p[texts[n][place]])
        assert float(taught[row].detach()) == pytest.approx(expected, abs=2e-3)
    assert model.answer_losses("next_item", answers, users)[1] is None


def test_losses_reach_everything_that_learns(make_model, histories):
    model = make_model()
    model.lm_is_frozen = True
    model.store_lower_states()
    nll, _ = model.answer_losses("next_item", torch.tensor([0, 5, 7]), model.context(histories))
    nll.sum().backward()
    for block in model.attachment.blocks.values():
        assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in block.parameters())
    assert model.user_tokens.recency.weight.grad.abs().sum() > 0
    assert model.encoder.positions.weight.grad.abs().sum() > 0


def test_all_answers_are_for_one_user(make_model, histories):
    model = make_model()
    with pytest.raises(ValueError, match="one user"):
        model.all_log_likelihoods("next_item", model.context(histories.select(torch.tensor([0, 1]))))


def test_stored_states_and_answers_follow_the_model(make_model, histories):
    model = make_model()
    model.store_lower_states()
    users = model.context(histories)
    before = model.answer_log_likelihood("next_item", torch.tensor([0, 1, 2]), users)
    model.double()
    after = model.answer_log_likelihood("next_item", torch.tensor([0, 1, 2]), model.context(histories))
    close(after.float(), before)
    model.store_lower_states()
    model.answer_log_likelihood("next_item", torch.tensor([0, 1, 2]), model.context(histories))
    model.to("meta")
    assert model.answers["next_item"].prompt_ids.is_meta
    assert model.answers["next_item"].tree.paths.is_meta
    assert not model.lower


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_unconstrained_search_equals_transformers(make_model, histories, architecture):
    model = make_model(architecture, prompt="Heat")
    beams, steps, never = 4, 5, 2
    model.lm.get_output_embeddings().weight.data[never] = 0  # an end that is never worth taking
    prompt = model.answers["next_item"].prompt_ids
    with torch.no_grad(), model.conditioned(model.context(histories)):
        state = TextInLM(model, 3, "next_item")
        sequences, scores = search_free(state, prompt, model.head, 3, beams, never, steps)
        theirs = model.lm.generate(
            prompt.repeat(3, 1), attention_mask=torch.ones(3, len(prompt), dtype=torch.long), max_new_tokens=steps,
            num_beams=beams, num_return_sequences=beams, length_penalty=0.0, do_sample=False, eos_token_id=never,
            early_stopping="never", return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    texts = theirs.sequences[:, len(prompt) :].view(3, beams, -1)
    assert not (texts == never).any()
    assert torch.equal(sequences, texts)
    close(scores, theirs.sequences_scores.view(3, beams))


SMALL = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
T5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 64, "decoder_start_token_id": 0}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("granite", SMALL | {"logits_scaling": 8.0}),
        ("cohere", SMALL | {"logit_scale": 0.0625}),
        ("gemma2", SMALL | {"num_key_value_heads": 4, "head_dim": 8, "final_logit_softcapping": 3.0}),
        ("t5", T5 | {"tie_word_embeddings": True}),
        ("t5", T5 | {"tie_word_embeddings": False}),
        ("mt5", T5),
        ("umt5", T5),
        ("switch_transformers", T5 | {"num_experts": 2, "feed_forward_proj": "relu"}),
    ],
)
def test_scaled_and_capped_logits_are_the_language_models_own(kind, settings):
    config = CONFIG_MAPPING[kind](vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    lm, ids = auto.from_config(config).eval(), torch.tensor([[3, 4, 5]])
    given, asked = {"input_ids": ids}, {"input_ids": ids}
    with torch.no_grad():
        if config.is_encoder_decoder:
            asked = asked | {"decoder_input_ids": ids}
            given["encoder_hidden_states"] = lm.get_encoder()(ids).last_hidden_state
        hidden = lm.get_decoder()(**given).last_hidden_state
        torch.testing.assert_close(LogitHead.of(lm)(hidden), lm(**asked).logits)


def test_logits_the_head_cannot_reproduce_are_refused(make_model):
    model = make_model()
    model.check_head()
    original = model.lm.lm_head.forward
    model.lm.lm_head.forward = lambda hidden: original(hidden) * 1.5
    with pytest.raises(UserError, match="changes its logits"):
        model.check_head()


def test_an_empty_prompt_is_refused(make_model):
    with pytest.raises(UserError, match=r"task next_item.*prompt"):
        make_model(prompt="")
