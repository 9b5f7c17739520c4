"""What a person asks of a model: recommend, generate, encode, explain; for any history."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import OPTConfig, OPTForCausalLM

import userllm.model
from userllm.errors import UserError
from userllm.events import Event, UserHistory
from userllm.fusion.catalogue import CatalogueConfig
from userllm.fusion.cross_attention import CrossAttentionConfig
from userllm.fusion.history_text import HistoryTextConfig
from userllm.fusion.perceiver import PerceiverConfig
from userllm.fusion.source import new_cache
from userllm.model import FusionConfig, UserLLM


@pytest.fixture(scope="module")
def model(make_user_llm):
    return make_user_llm()


def plain(recommendations):
    return [(r.item, r.title) for r in recommendations]


def scores(recommendations):
    return [r.log_likelihood for r in recommendations]


@pytest.mark.parametrize("task", ["next_item", "favorite_genre"])
@pytest.mark.parametrize("attend", ["text", "answer"])
def test_a_batch_equals_one_at_a_time(make_user_llm, dataset, task, attend):
    model = make_user_llm(attend=attend)
    histories = [dataset.history(7), dataset.history(2, 0, 1), UserHistory([]), dataset.history(4)]
    together = model.recommend(histories, 4, task=task)
    for history, mine in zip(histories, together, strict=True):
        alone = model.recommend(history, 4, task=task)
        assert plain(alone) == plain(mine)
        assert scores(alone) == pytest.approx(scores(mine), abs=1e-4)
    assert model.recommend([], 4, task=task) == []


def test_recommendations_are_the_catalogues_best_unseen(model, dataset):
    history = dataset.history(7, 0, 9)
    users = model.context(model.collator.from_histories([history], max_length=8)[0])
    log_likelihoods = model.all_log_likelihoods("next_item", users)
    seen = {event.item for event in history.events}
    best = [
        n for n in log_likelihoods.argsort(descending=True).tolist() if dataset.items["id"][n] not in seen
    ]
    found = model.recommend(history, 20)
    assert [r.item for r in found] == [dataset.items["id"][n] for n in best]
    assert [r.title for r in found] == [model.tasks["next_item"].answers[n] for n in best]
    assert scores(found) == pytest.approx(log_likelihoods[best].tolist(), abs=1e-4)
    everything = model.recommend(history, 99, exclude_seen=False)
    assert {r.item for r in everything} == set(dataset.items["id"])
    assert len(everything) == 20


@pytest.mark.parametrize("attend", ["text", "answer"])
def test_scores_are_those_of_each_item_alone(make_user_llm, dataset, attend):
    model = make_user_llm(attend=attend)
    histories = [dataset.history(7, 0, 9), UserHistory([]), dataset.history(5)]
    for task in ("next_item", "favorite_genre"):
        whole = model.score(histories, task=task)
        for history, mine in zip(histories, whole, strict=True):
            users = model.context(model.collator.from_histories([history], max_length=8)[0])
            expected = model.all_log_likelihoods(task, users)
            torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(model.score(history, task=task, block=2), mine, atol=1e-4, rtol=1e-4)
    items = ["Heat (1995)", "m0", "m3"]
    some, genres = model.score(histories, items), model.score(histories, ["Drama"], task="favorite_genre")
    torch.testing.assert_close(some, model.score(histories)[:, [3, 0, 3]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(genres[:, 0], model.score(histories, task="favorite_genre")[:, 2])
    assert model.score([], items).shape == (0, 3)
    assert model.score(histories[0], []).shape == (0,)


@pytest.mark.parametrize(
    ("items", "task", "message"),
    [
        (["m0", "m99", "Solaris"], "next_item", r"unknown to task next_item: m99, Solaris; give ids"),
        (["The Mask (1994)"], "next_item", r"The Mask \(1994\); .* titles that only one item has"),
        (["Drama", "Opera"], "favorite_genre", "Opera; its answers are Action, Comedy, Drama, Sci-Fi"),
        ("m0", "next_item", "give a list"),
        (["m0"], "mood", "not trained for a task 'mood'"),
    ],
)
def test_items_that_cannot_be_scored(model, dataset, items, task, message):
    with pytest.raises(UserError, match=message):
        model.score(dataset.history(7), items, task=task)


@pytest.mark.parametrize("who", [None, "m0", {"item": "m0"}, [Event("m0")], 7])
def test_who_is_no_user(model, who):
    for ask in (model.recommend, model.score):
        with pytest.raises(UserError, match="is no user; give a UserHistory"):
            ask(who)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"num_beams": 0}, "num_beams is 0; it must be at least 1"),
        ({"num_beams": 1.5}, r"num_beams is 1\.5; it must be at least 1"),
        ({"do_sample": True, "temperature": 0.0}, r"temperature is 0\.0; it must be above 0"),
    ],
)
def test_a_text_that_cannot_be_written(model, settings, message):
    with pytest.raises(UserError, match=message):
        model.generate("Hello", None, **settings)


def test_half_a_character_cannot_be_asked(model):
    with pytest.raises(UserError, match="half a character"):
        model.generate("Hello \ud800", None)


@pytest.mark.parametrize("settings", [{"k": 2.5}, {"k": "5"}, {"beams": 2.5}])
def test_how_many_answers_is_a_whole_number(model, dataset, settings):
    with pytest.raises(UserError, match=r"(k|beams) is .*at least one"):
        model.recommend(dataset.history(7), **settings)


def test_nothing_is_left_for_who_has_seen_everything(model, dataset):
    history = UserHistory([Event(item) for item in dataset.items["id"]])
    assert model.recommend(history, 5) == []
    assert len(model.recommend(history, 5, exclude_seen=False)) == 5


def test_without_a_user_is_the_base_lm(model, dataset):
    nobody = model.recommend_without_user(20)
    empty = model.recommend(UserHistory([]), 20)
    assert plain(nobody) == plain(empty)
    assert scores(nobody) == pytest.approx(scores(empty), abs=1e-4)


def test_unknown_items_are_named_once_and_keep_their_place(model, dataset):
    known = dataset.history(7, 0, 4)
    strange = UserHistory([*known.events, Event("m999"), Event("Solaris (1972)"), Event("m999")])
    with pytest.warns(UserWarning, match=r"unknown: m999, Solaris \(1972\)$"):
        found = model.recommend(strange, 3)
    assert len(found) == 3
    with pytest.warns(UserWarning, match="unknown: m999"):
        assert model.encode(strange).shape == (7, 16)
    with pytest.warns(UserWarning, match="a, b, c, d, e and 2 more"):
        model.encode(UserHistory([Event(name) for name in "abcdefg"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.recommend(known, 3)


def test_an_item_may_be_named_by_its_title(model):
    by_id = UserHistory([Event("m3"), Event("m0")])
    by_title = UserHistory([Event("Heat (1995)"), Event("Toy Story (1995)")])
    assert model.recommend(by_id, 5) == model.recommend(by_title, 5)
    assert [a.title for a in model.explain(by_id)] == ["Heat (1995)", "Toy Story (1995)"]


@pytest.mark.parametrize("length", [0, 1, 5, 8, 9, 300])
def test_histories_of_any_length(model, dataset, length):
    events = [Event(f"m{n % 20}", fields={"rating": 1 + n % 5}) for n in range(length)]
    history = UserHistory(events)
    assert len(model.recommend(history, 3, exclude_seen=False)) == 3
    assert model.encode(history).shape == (min(length, 8), 16)
    assert isinstance(model.generate("The user likes", history, max_new_tokens=3), str)
    latest = UserHistory(events[-8:])
    assert model.recommend(history, 3, exclude_seen=False) == model.recommend(latest, 3, exclude_seen=False)
    attended = model.explain(history)
    assert [a.event for a in attended] == events[-5:] if length else attended == []


def test_embeddings_are_the_encoders(model, dataset, stored):
    history = dataset.history(7, 0, 6)
    with torch.no_grad():
        expected = model.encoder(stored.batch([(7, 0, 6)]))[0][0]
    torch.testing.assert_close(model.encode(history), expected)


@pytest.mark.parametrize("attend", ["text", "answer"])
@pytest.mark.parametrize("task", ["next_item", "favorite_genre"])
def test_explained_weights_sum_to_one_over_the_events_seen(make_user_llm, dataset, attend, task):
    model = make_user_llm(attend=attend)
    for stop in (1, 3, 5, 12):
        attended = model.explain(dataset.history(7, 0, stop), task=task)
        assert len(attended) == min(stop, 5)
        assert sum(a.weight for a in attended) == pytest.approx(1, abs=1e-5)
        assert all(a.weight > 0 for a in attended)
    shut = make_user_llm(attend=attend)
    for block in shut.attachment.blocks.values():
        block.gate.data.zero_()
    assert sum(a.weight for a in shut.explain(dataset.history(7))) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("events", [0, 2])  # of the history as text, which is read before
def test_explained_weights_are_of_the_prompts_last_token(make_user_llm, dataset, stored, events):
    plain_attention = CrossAttentionConfig(heads=2, head_width=8, recency=False)
    text = HistoryTextConfig(events=events)
    model = make_user_llm(layers="last:1", cross_attention=plain_attention, text=text)
    block, seen = model.attachment.blocks[3], []
    hook = block.register_forward_pre_hook(lambda _block, args: seen.append(args))
    attended = model.explain(dataset.history(7, 0, 4))
    hook.remove()
    hidden, keys, _, mask = seen[-1]
    query = block.query(block.text_norm(hidden[0, -1])).view(2, 8)
    logits = torch.einsum("hd,hmd->hm", query, keys[0]) / 8**0.5
    expected = torch.softmax(logits[:, mask[0]], -1).mean(0).tolist()
    assert [a.weight for a in attended] == pytest.approx(expected, abs=1e-5)


def test_many_users_are_answered_some_at_a_time(model, dataset, monkeypatch):
    histories = [dataset.history(user) for user in range(5)]
    expected, told = model.recommend(histories, 3), model.score(histories, ["m0", "m3"])
    at_once = []
    original = type(model).users
    monkeypatch.setattr(
        type(model), "users", lambda self, who: at_once.append(len(who)) or original(self, who)
    )
    monkeypatch.setattr(userllm.model, "_USERS", 2)
    for mine, whole in zip(model.recommend(histories, 3), expected, strict=True):
        assert plain(mine) == plain(whole)
        assert scores(mine) == pytest.approx(scores(whole), abs=1e-4)
    torch.testing.assert_close(model.score(histories, ["m0", "m3"]), told, atol=1e-4, rtol=1e-4)
    assert at_once == [2, 2, 1] * 2


def test_in_double_precision_answers_are_the_same(make_user_llm, dataset):
    model = make_user_llm(catalogue=CatalogueConfig(tokens=2))
    histories = [dataset.history(7), UserHistory([])]
    before, listed = model.score(histories), model.recommend(histories, 3)
    model.double()
    torch.testing.assert_close(model.score(histories).float(), before, atol=1e-4, rtol=1e-4)
    assert [plain(one) for one in model.recommend(histories, 3)] == [plain(one) for one in listed]


def test_a_tokenizer_that_ends_prompts_does_not_end_them_here(make_user_llm, tiny_lm, dataset):
    """What stood behind the end of a text would be another text."""
    ready, models = make_user_llm(), []
    for ends in (False, True):
        lm, tokenizer = tiny_lm("llama")
        tokenizer = copy.deepcopy(tokenizer)
        if ends:
            end = (tokenizer.eos_token, tokenizer.eos_token_id)
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"$A {end[0]}", special_tokens=[end]
            )
        assert (tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id) == ends
        torch.manual_seed(0)
        models.append(
            UserLLM(
                lm,
                tokenizer,
                ready.encoder,
                ready.config,
                ready.tasks,
                ready.collator,
                ready.reference,
                "enc",
            ).eval()
        )
    history = dataset.history(7)
    listed = [scores(model.recommend(history, 3)) for model in models]
    assert listed[0] == pytest.approx(listed[1], abs=1e-5)
    for user in (history, None):
        said = [model.generate("Say:", user, max_new_tokens=5) for model in models]
        assert said[0] == said[1]


def test_an_lm_whose_word_embeddings_are_narrow_takes_soft_prompts(make_user_llm, tiny_lm, dataset):
    """OPT-350m projects them to its width."""
    ready, tokenizer = make_user_llm(), tiny_lm("opt")[1]
    narrow = OPTConfig(
        vocab_size=len(tokenizer), word_embed_proj_dim=16, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    fusion = FusionConfig(kind="soft_prompt", events=5)
    model = UserLLM(
        OPTForCausalLM(narrow), tokenizer, ready.encoder, fusion, ready.tasks, ready.collator, ready.reference,
        "enc",
    ).eval()  # fmt: skip
    model.check_head()
    history = dataset.history(7)
    [best, *_] = model.recommend(history, 3)
    assert float(model.score(history, [best.item])) == pytest.approx(best.log_likelihood, abs=1e-4)


def test_a_chat_ends_where_the_lm_says_a_turn_ends(make_user_llm, dataset, monkeypatch):
    """Chat models name their end of turn beside the end of text, in generation_config alone."""
    model = make_user_llm()
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.chat_template = "{{ messages[0].content }}"
    model.lm.generation_config.eos_token_id = [7, 9]
    generate, ends = model.lm.generate, []

    def told(**arguments):
        ends.append(arguments["generation_config"].eos_token_id)
        return generate(**arguments)

    monkeypatch.setattr(model.lm, "generate", told)
    for chat in (True, False):
        model.generate("Say:", dataset.history(7), max_new_tokens=2, chat=chat)
    own = model.tokenizer.eos_token_id
    assert ends == [[own, 7, 9], own]


def test_a_perceiver_cannot_be_explained(make_user_llm, dataset):
    model = make_user_llm(perceiver=PerceiverConfig(latents=2, layers=1, heads=2))
    with pytest.raises(UserError, match="a Perceiver mixes events"):
        model.explain(dataset.history(7))


def test_questions_that_cannot_be_answered(model, dataset):
    history = dataset.history(7)
    with pytest.raises(UserError, match="not trained for a task 'mood'; it knows next_item, favorite_genre"):
        model.recommend(history, task="mood")
    with pytest.raises(UserError, match="k is 0"):
        model.recommend(history, 0)
    with pytest.raises(UserError, match="beams is 0"):
        model.recommend(history, 3, beams=0)
    with pytest.raises(UserError, match="prompt is empty"):
        model.generate("", history)


def by_hand(model, prompt, users, tokens, attend):
    """Greedy decoding by full forward passes; with "answer", blocks only act from the prompt's last token on."""
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    before = ids.shape[1] - 1 if attend == "answer" else 0
    hooks = [
        block.register_forward_hook(
            lambda _b, args, out: torch.cat([args[0][:, :before], out[:, before:]], 1)
        )
        for block in model.attachment.blocks.values()
    ]
    for _ in range(tokens):
        with torch.no_grad(), model.conditioned(users):
            ids = torch.cat([ids, model.lm(ids).logits[:, -1:].argmax(-1)], 1)
    for hook in hooks:
        hook.remove()
    return model.tokenizer.decode(ids[0, -tokens:], skip_special_tokens=True)


@pytest.mark.parametrize("attend", ["text", "answer"])
@pytest.mark.parametrize("lm", ["tiny-random-llama", "tiny-random-gemma3", "tiny-random-gpt2"])
def test_generation_is_greedy_and_about_the_user(make_user_llm, dataset, attend, lm):
    model = make_user_llm(attend=attend, lm=lm)
    model.lm.get_output_embeddings().weight.data[model.tokenizer.eos_token_id] = 0
    history = dataset.history(7, 0, 6)
    prompt = "What will the user watch next? Star Wars: Episode IV - A New Hope"
    users = model.context(model.collator.from_histories([history])[0])
    found = model.generate(prompt, history, max_new_tokens=6)
    assert found == by_hand(model, prompt, users, 6, attend)
    assert isinstance(model.generate("Z", history, max_new_tokens=4, num_beams=3), str)
    beams = model.generate(prompt, history, max_new_tokens=6, num_beams=3)
    assert beams == model.generate(prompt, history, max_new_tokens=6, num_beams=3)
    torch.manual_seed(0)
    sampled = {
        model.generate(prompt, history, max_new_tokens=6, do_sample=True, temperature=2.0) for _ in range(5)
    }
    assert len(sampled) > 1


def test_the_lms_own_generation_config_is_not_consulted(make_user_llm, dataset):
    model = make_user_llm()
    history = dataset.history(7)
    expected = model.generate("The user likes", history, max_new_tokens=8)
    shipped = model.lm.generation_config
    shipped.repetition_penalty = 9.0
    shipped.do_sample, shipped.temperature = True, 5.0
    shipped.suppress_tokens = list(range(6, len(model.tokenizer)))
    assert model.generate("The user likes", history, max_new_tokens=8) == expected
    assert model.lm.generation_config is shipped


def test_chat_uses_the_template_as_it_is(make_user_llm, dataset, monkeypatch):
    model = make_user_llm()
    with pytest.raises(UserError, match="no chat template"):
        model.generate("Hello", dataset.history(7), chat=True)
    tokenizer = model.tokenizer
    template = "<bos>{% for message in messages %}{{ message['content'] }}{% endfor %} Answer:"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    seen = []
    original = model.lm.generate
    monkeypatch.setattr(model.lm, "generate", lambda **kw: seen.append(kw["input_ids"]) or original(**kw))
    text = "<bos>Hello Answer:"
    model.generate("Hello", dataset.history(7), chat=True, max_new_tokens=1)
    assert seen[0][0].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    # a tokenizer that begins every text with <bos> must not do so twice
    begins = lambda text, add_special_tokens=True, **kw: type(tokenizer).__call__(  # noqa: E731
        tokenizer, "<bos>" * add_special_tokens + text, add_special_tokens=False, **kw
    )
    spoken = type("Spoken", (), {"__call__": lambda self, *a, **kw: begins(*a, **kw)})()
    monkeypatch.setattr(
        type(spoken), "__getattr__", lambda self, name: getattr(tokenizer, name), raising=False
    )
    monkeypatch.setattr(model, "tokenizer", spoken)
    model.generate("Hello", dataset.history(7), chat=True, max_new_tokens=1)
    assert seen[1].tolist() == seen[0].tolist()


def test_threads_do_not_get_each_others_users(make_user_llm, dataset):
    model = make_user_llm()
    histories = [dataset.history(7), dataset.history(2)]
    alone = [(model.score(one), model.generate("The user likes", one, max_new_tokens=4)) for one in histories]

    def ask(number):
        return [
            torch.allclose(model.score(histories[number]), alone[number][0], atol=1e-4)
            and model.generate("The user likes", histories[number], max_new_tokens=4) == alone[number][1]
            for _ in range(8)
        ]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, [0, 1])) == [[True] * 8] * 2


@pytest.mark.parametrize("prompt", [None, ["a", "b"], 3])
def test_a_prompt_that_is_no_text(model, prompt):
    with pytest.raises(UserError, match="give one text"):
        model.generate(prompt, None)


def test_what_is_not_one_user(model, dataset):
    several = [dataset.history(7)]
    with pytest.raises(UserError, match="is not one user"):
        model.generate("a", several)
    for ask in (model.encode, model.remember, model.explain):
        with pytest.raises(UserError, match="is no history; give a UserHistory"):
            ask(several)


def test_numbers_that_cannot_be(model, dataset):
    with pytest.raises(UserError, match="k is -1"):
        model.recommend_without_user(-1)
    with pytest.raises(UserError, match="block is 0"):
        model.score(dataset.history(7), block=0)


def test_a_history_may_come_from_an_iterator(model):
    events = [Event("m1"), Event("m2")]
    history = UserHistory(event for event in events)
    assert len(history) == 2 and history == UserHistory(events)
    with pytest.raises(UserError, match=r"events\[0\] is 'm1'; give Event\(item\)"):
        UserHistory(["m1"])


def test_calls_of_ones_own_are_refused_where_they_would_miss_the_prefix(make_user_llm, dataset):
    for model in (
        make_user_llm(kind="soft_prompt"),
        make_user_llm(text=HistoryTextConfig(events=3)),
        make_user_llm("lora", kind="none", text=HistoryTextConfig(events=3)),
    ):
        users = model.users([dataset.history(7)])
        with (
            pytest.raises(UserError, match="something of these users stands before the prompt"),
            model.conditioned(users),
        ):
            pass


def test_a_prompt_of_one_token_and_no_history(make_user_llm):
    model = make_user_llm("lora", kind="none", text=HistoryTextConfig(events=3, lead="", close=""))
    nobody = UserHistory([])
    token = model.tokenizer.decode([40])
    assert len(model.tokenizer(token, add_special_tokens=True)["input_ids"]) == 1
    assert model.generate(token, nobody, max_new_tokens=3) == model.generate(token, None, max_new_tokens=3)


@pytest.mark.parametrize("lm", ["tiny-random-llama", "tiny-random-gpt2"])
def test_a_text_for_which_the_language_model_has_no_positions(make_user_llm, lm):
    model = make_user_llm("enc", lm)
    text = torch.ones(1, 1025, dtype=torch.long)
    with torch.no_grad(), model.without_user():
        assert model.hidden(text[:, :1024]).shape[1] == 1024
        cache = new_cache(model.lm)
        model.hidden(text[:, :1024], cache=cache)
        if lm == "tiny-random-llama":  # rotary positions go on
            assert model.hidden(text).shape[1] == 1025
            return
        mask = torch.arange(1025)[None] > 0  # one token of padding on the left
        assert model.hidden(text, mask=mask).shape[1] == 1025
        for more in ({"text": text}, {"text": text[:, :1], "cache": cache}):
            with pytest.raises(
                UserError, match="reads texts of 1,024 tokens, and this one has 1,025; shorten"
            ):
                model.hidden(**more)


def test_a_prompt_that_leaves_no_positions_for_its_continuation(make_user_llm):
    """On an accelerator an index beyond the table ends everything that comes after, too."""
    model = make_user_llm("enc", "tiny-random-gpt2")
    for prompt, new in (("word " * 2000, 1), ("word", 1025)):
        with pytest.raises(UserError, match="reads texts of 1,024 tokens, and this one has"):
            model.generate(prompt, None, max_new_tokens=new)
