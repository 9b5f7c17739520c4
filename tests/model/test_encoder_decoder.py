"""Encoder-decoder language models: what holds for causal ones holds for them."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration

from userllm.decoding.next_token import TextDecoding
from userllm.encoders import UserEncoder
from userllm.errors import UserError
from userllm.fusion.attach import find_layers
from userllm.fusion.history_text import HistoryTextConfig
from userllm.fusion.perceiver import PerceiverConfig
from userllm.fusion.source import has_encoder
from userllm.language_models.pretrained import LanguageModelConfig, load
from userllm.model import UserLLM
from userllm.training.contextualize import ContextualizeConfig, ContextualizedLosses
from userllm.training.examples import ExampleBatches
from userllm.training.strategy import trainable_parameters

FUSIONS = {
    "soft prompt": {"kind": "soft_prompt"},
    "cross-attention": {},
    "perceiver": {"kind": "soft_prompt", "perceiver": PerceiverConfig(latents=3, layers=1, heads=2)},
    "long+short": {"kind": "soft_prompt", "text": HistoryTextConfig(events=2)},
    "text prompt": {"kind": "none", "text": HistoryTextConfig(events=3)},
}
T5 = "tiny-random-t5"


@pytest.fixture(params=FUSIONS)
def model(request, make_user_llm):
    strategy = "full" if request.param == "text prompt" else "enc"
    return make_user_llm(strategy, T5, max_length=12, **FUSIONS[request.param])


def whole_log_likelihood(model, users, prompt, answer):
    """By the LM's own forward: [prefix; prompt] into the encoder, start token and answer into the decoder."""
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    embedded = model.lm.get_input_embeddings()(ids)
    prefix = None if users is None else users.prefix
    if prefix is not None:
        [real] = prefix.mask
        embedded = torch.cat([prefix.embeddings[:, real], embedded], dim=1)
    tokens = [
        *model.tokenizer(" " + answer, add_special_tokens=False)["input_ids"],
        model.tokenizer.eos_token_id,
    ]
    decoder = torch.tensor([[0, *tokens[:-1]]])
    with model.without_user() if users is None else model.attending(users):
        logits = model.lm(inputs_embeds=embedded, decoder_input_ids=decoder).logits[0]
    return tokens, F.log_softmax(logits, -1)


@torch.no_grad()
def test_answers_against_the_models_own_forward(model, stored):
    """At each token the softmax runs over what continues some answer."""
    genres = model.tasks["favorite_genre"].answers
    tokens = [model.tokenizer(" " + g, add_special_tokens=False)["input_ids"] + [2] for g in genres]
    for users in (model.context(stored.batch([(7, 0, 6)])), None):
        ours = model.answer_log_likelihood("favorite_genre", torch.arange(len(genres)), users)
        assert torch.allclose(ours.exp().sum(), torch.tensor(1.0), atol=1e-5)
        for n, genre in enumerate(genres):
            own, log_p = whole_log_likelihood(
                model, users, model.tasks["favorite_genre"].config.prompt, genre
            )
            total = 0.0
            for step, token in enumerate(own):
                open_ = sorted({t[step] for t in tokens if t[:step] == own[:step] and len(t) > step})
                total += log_p[step, token] - log_p[step, open_].logsumexp(0)
            torch.testing.assert_close(ours[n], total, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_batch_of_users_is_each_alone(model, histories, stored):
    """Histories of 9, 4 and no events: what is padded on the left of the encoder's input does not matter."""
    together = model.score_answers("next_item", model.context(histories))
    for b, row in enumerate([(7, 0, 9), (5, 0, 4), (8, 0, 0)]):
        alone = model.context(stored.batch([row]))
        torch.testing.assert_close(
            together[b], model.score_answers("next_item", alone)[0], atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
def test_what_is_cached_equals_what_is_not(model, histories):
    """Trie scoring and beam search keep keys and values token by token; teacher forcing reads every answer whole."""
    users = model.context(histories)
    scores = model.score_answers("next_item", users, block=7)
    answers = torch.arange(scores.shape[1])
    for b in range(3):
        one = users.select(torch.tensor([b]))
        torch.testing.assert_close(
            scores[b], model.answer_log_likelihood("next_item", answers, one), atol=1e-4, rtol=1e-4
        )
    found = model.rank_answers("next_item", users, k=20, beams=40)
    for b in range(3):
        torch.testing.assert_close(found.scores[b], scores[b, found.answers[b]], atol=1e-4, rtol=1e-4)
        assert found.answers[b].tolist() == scores[b].argsort(descending=True, stable=True).tolist()


@torch.no_grad()
@pytest.mark.parametrize("fusion", FUSIONS)
def test_without_a_user_it_is_the_base_lm(make_user_llm, stored, fusion):
    model = make_user_llm("full" if fusion == "text prompt" else "enc", T5, stir=False, **FUSIONS[fusion])
    base, tokenizer, _ = load(LanguageModelConfig(T5))
    ids = torch.tensor([tokenizer("What will they watch next?")["input_ids"]])
    start = torch.tensor([[0, 17, 40]])
    with model.without_user():
        assert torch.equal(
            model.lm(input_ids=ids, decoder_input_ids=start).logits,
            base(input_ids=ids, decoder_input_ids=start).logits,
        )
    if fusion == "cross-attention":  # every gate is at 0
        with model.attending(model.context(stored.batch([(7, 0, 6)]))):
            assert torch.equal(
                model.lm(input_ids=ids, decoder_input_ids=start).logits,
                base(input_ids=ids, decoder_input_ids=start).logits,
            )
    expected = base.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    said = model.generate("What will they watch next?", None, max_new_tokens=8)
    assert said == tokenizer.decode(expected[0], skip_special_tokens=True)
    model.check_head()


@torch.no_grad()
def test_the_user_makes_a_difference(model, dataset, stored):
    scores = model.score_answers(
        "favorite_genre", model.context(stored.batch([(7, 0, 6), (5, 0, 4), (8, 0, 0)]))
    )
    assert not torch.allclose(scores[0], scores[1], atol=1e-4)


@torch.no_grad()
def test_free_text(model, dataset, histories):
    users = model.context(histories)
    prompts = ["Which genres?", "What will the user watch next, and why?", "Hm"]
    texts = model.write_texts(prompts, users, TextDecoding(max_new_tokens=7))
    for b, (user, stop) in enumerate([(7, 9), (5, 4), (8, 0)]):
        assert (
            texts[b] == model.generate(prompts[b], dataset.history(user, 0, stop), max_new_tokens=7).strip()
        )
    targets = ["Comedy, Drama", "Heat (1995)", ""]
    nll, count = model.text_losses(prompts, targets, users)
    for b in range(3):
        one = users.select(torch.tensor([b]))
        tokens, log_p = whole_log_likelihood(model, one, prompts[b], targets[b])
        own = -sum(log_p[step, token] for step, token in enumerate(tokens))
        torch.testing.assert_close(nll[b], own, atol=1e-4, rtol=1e-4)
        assert count[b] == len(tokens)
    longer = model.generate(prompts[0], dataset.history(7, 0, 9), max_new_tokens=7, num_beams=3)
    assert isinstance(longer, str)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@torch.no_grad()
def test_the_tokenizers_padding_side_does_not_matter(model, histories, padding_side):
    before = model.score_answers("favorite_genre", model.context(histories))
    losses = model.text_losses(["a", "a longer prompt", "b"], ["x", "y", "z"], model.context(histories))
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.padding_side = padding_side
    assert torch.equal(before, model.score_answers("favorite_genre", model.context(histories)))
    again = model.text_losses(["a", "a longer prompt", "b"], ["x", "y", "z"], model.context(histories))
    assert torch.equal(losses[0], again[0])


@pytest.mark.parametrize(
    ("strategy", "fusion", "encoder"),
    [
        ("full", "soft prompt", "autoregressive"),
        ("lora", "soft prompt", "bert4rec"),
        ("enc", "long+short", "autoregressive"),
        pytest.param("proj", "perceiver", "dual", marks=pytest.mark.slow),
        pytest.param("full", "cross-attention", "autoregressive", marks=pytest.mark.slow),
        ("lora", "cross-attention", "autoregressive"),
        pytest.param("lora", "text prompt", "autoregressive", marks=pytest.mark.slow),
    ],
)
def test_a_step_a_round_trip(
    make_user_llm, make_encoder, dataset, split, stored, tmp_path, strategy, fusion, encoder
):
    own: UserEncoder = make_encoder(encoder, max_length=8)
    model = make_user_llm(strategy, T5, encoder=own, **FUSIONS[fusion])
    config = ContextualizeConfig(histories=3, examples_per_history=2)
    batch = ExampleBatches(model, dataset, split, stored, config, seed=0).batch(0)
    losses = ContextualizedLosses(model.train())
    trained = [w for w in model.parameters() if w.requires_grad]
    before = [w.detach().clone() for w in trained]
    losses(**batch)["loss"].backward()
    torch.optim.SGD(trained, lr=0.1).step()
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    model.eval()
    model.save_pretrained(tmp_path / "model")
    again = UserLLM.from_pretrained(tmp_path / "model")
    history = dataset.history(7, 0, 8)
    for task in model.tasks:
        same = {"atol": 1e-5, "rtol": 1e-5}  # a copy's weights may lie in memory in another order
        torch.testing.assert_close(again.score(history, task=task), model.score(history, task=task), **same)
    assert again.generate("Hm", history, max_new_tokens=5) == model.generate("Hm", history, max_new_tokens=5)
    if strategy == "full":
        saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model" / "lm")
        assert not torch.equal(saved.lm_head.weight, saved.shared.weight)
        assert torch.equal(saved.lm_head.weight, model.lm.lm_head.weight)


def test_blocks_sit_in_the_decoder(make_user_llm):
    model = make_user_llm("enc", T5)
    assert sorted(model.gates) == [2, 3]
    with model.attachment.detached():
        assert find_layers(model.lm) is model.lm.decoder.block


def test_only_relative_positions(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=30, decoder_attention_heads=2, **sizes))
    with pytest.raises(UserError, match="only the T5 family"):
        has_encoder(bart)


def test_a_t5s_own_blocks_are_the_language_models(make_user_llm):
    """T5 calls its layers "block", too: its weights must not be counted, nor trained, as cross-attention."""
    model = make_user_llm("full", T5)
    counts = trainable_parameters(model)
    own, _, _ = load(LanguageModelConfig(T5))
    assert counts["lm"] == sum(w.numel() for w in own.parameters())
    assert counts["cross_attention"] == sum(
        w.numel() for b in model.attachment.blocks.values() for w in b.parameters()
    )
