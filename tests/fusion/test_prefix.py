"""Soft prompts and histories as text: what stands before the prompt is read as if nothing else were there."""

import pytest
import torch

from userllm.errors import UserError
from userllm.events import UserHistory
from userllm.fusion.config import FusionConfig
from userllm.fusion.history_text import HistoryText, HistoryTextConfig, SummaryConfig
from userllm.fusion.perceiver import PerceiverConfig
from userllm.fusion.prefix import Prefix, position_ids
from userllm.fusion.soft_prompt import SoftPrompt, SoftPromptConfig

SOFT = {"kind": "soft_prompt"}
TEXT = {"kind": "none", "text": HistoryTextConfig(events=3)}
BOTH = {"text": HistoryTextConfig(events=2)}
VARIANTS = {
    "soft": SOFT,
    "soft-mlp": SOFT | {"projection": "mlp"},
    "soft-perceiver": SOFT | {"perceiver": PerceiverConfig(latents=3, layers=1, heads=2)},
    "soft+text": SOFT | BOTH,
    "text": TEXT,
    "summary": {"kind": "none", "text": HistoryTextConfig(events=3, summary=SummaryConfig(new_tokens=4))},
    "cross+text": BOTH,
    "cross+text, answer": BOTH | {"attend": "answer"},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_lm = pytest.mark.parametrize("lm", ["tiny-random-llama", "tiny-random-gpt2", "tiny-random-gemma3"])


def model_of(make_user_llm, variant, **more):
    strategy = "lora" if VARIANTS[variant].get("kind") == "none" else "enc"
    return make_user_llm(strategy, **(VARIANTS[variant] | more))


def test_padding_goes_to_the_left_of_everything():
    first = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    second = torch.tensor([[[5.0], [6.0]], [[7.0], [8.0]]])
    there = torch.tensor([[True, True], [False, True]])
    also = torch.tensor([[True, False], [True, True]])
    prefix = Prefix.of([(first, there), (second, also)])
    assert prefix.embeddings[..., 0].tolist() == [[1, 2, 5], [4, 7, 8]]
    assert prefix.mask.all()
    shorter = Prefix.of([(first, there), (second, also & torch.tensor([[False], [True]]))])
    assert shorter.embeddings[..., 0].tolist() == [[0, 1, 2], [4, 7, 8]]
    assert shorter.mask.tolist() == [[False, True, True], [True, True, True]]
    assert position_ids(shorter.mask).tolist() == [[0, 0, 1], [0, 1, 2]]


@every_lm
@every_variant
def test_scores_are_those_of_the_written_out_sequence(make_user_llm, dataset, stored, variant, lm):
    """One user, no padding, no cache: the base LM on the prefix's embeddings followed by prompt and answer."""
    model = model_of(make_user_llm, variant, lm=lm)
    histories = stored.batch([(7, 0, 6), (5, 0, 2), (2, 0, 0)])
    users = model.context(histories)
    closed, answers = model.answers["next_item"], torch.tensor([3, 9, 0])
    with torch.no_grad():
        mine = model.answer_log_likelihood("next_item", answers, users)
        for row, answer in enumerate(answers.tolist()):
            prefix = users.prefix.select(torch.tensor([row]))
            before = prefix.embeddings[0][prefix.mask[0]]
            texts = closed.texts(torch.tensor([answer]))
            ids = texts.input_ids[0, len(model.opening) :]
            whole = torch.cat([before, model.lm.get_input_embeddings()(ids)])
            alone = users.select(torch.tensor([row]))
            cut = len(before) + len(closed.prompt_ids) - len(model.opening) - 1
            with model.attending(alone):
                if model.reads_ahead:  # nothing before the prompt's last token may attend to the user
                    for block in model.attachment.blocks.values():
                        block.register_forward_hook(
                            lambda _, args, out: torch.cat([args[0][:, :cut], out[:, cut:]], dim=1)  # noqa: B023
                        )
                hidden = model.lm.get_decoder()(inputs_embeds=whole[None]).last_hidden_state[0]
                for block in model.attachment.blocks.values():
                    block._forward_hooks.clear()
            at = texts.position + len(before) - len(model.opening)
            rows, children, log_p = closed.choices(hidden[at], texts.node, model.head)
            expected = closed.chosen(log_p, children, rows, texts.child).sum()
            assert mine[row] == pytest.approx(float(expected), abs=1e-4)


@every_variant
def test_beam_search_finds_the_exact_best(make_user_llm, stored, variant):
    model = model_of(make_user_llm, variant)
    users = model.context(stored.batch([(7, 0, 6), (5, 0, 2), (2, 0, 0)]))
    found = model.rank_answers("next_item", users, 20, beams=20)
    for user in range(3):
        exact = model.all_log_likelihoods("next_item", users.select(torch.tensor([user])))
        best, order = exact.sort(descending=True)
        assert found.answers[user].tolist() == order.tolist()
        assert torch.allclose(found.scores[user], best, atol=1e-4)


@every_variant
def test_a_batch_equals_one_at_a_time(make_user_llm, dataset, variant):
    model = model_of(make_user_llm, variant)
    histories = [dataset.history(7), dataset.history(2, 0, 1), UserHistory([]), dataset.history(4)]
    for history, mine in zip(histories, model.recommend(histories, 4), strict=True):
        alone = model.recommend(history, 4)
        assert [r.item for r in alone] == [r.item for r in mine]
        assert [r.log_likelihood for r in alone] == pytest.approx([r.log_likelihood for r in mine], abs=1e-4)


@every_variant
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_continues_the_written_out_sequence(make_user_llm, dataset, variant, beams):
    model = model_of(make_user_llm, variant)
    history = dataset.history(7)
    text = model.generate("The user likes", history, max_new_tokens=5, num_beams=beams)
    assert text == model.generate("The user likes", history, max_new_tokens=5, num_beams=beams)
    if beams > 1 or model.reads_ahead:
        return
    users = model.context(model.collator.from_histories([history], max_length=8)[0])
    ids = model.tokenizer("The user likes", return_tensors="pt")["input_ids"]
    with torch.no_grad(), model.attending(users):
        for _ in range(5):
            whole = users.prefix.then(model.lm.get_input_embeddings()(ids[:, len(model.opening) :]))
            hidden = model.lm.get_decoder()(inputs_embeds=whole.embeddings).last_hidden_state
            ids = torch.cat([ids, model.head(hidden[:, -1]).argmax(-1, keepdim=True)], dim=1)
    skip = len(model.tokenizer("The user likes")["input_ids"])
    assert text == model.tokenizer.decode(ids[0, skip:], skip_special_tokens=True)


def test_without_a_user_it_is_the_base_lm(make_user_llm):
    for variant in VARIANTS:
        model = model_of(make_user_llm, variant)
        ids = torch.arange(8)[None]
        with torch.no_grad(), model.without_user():
            mine = model.lm(input_ids=ids).logits
        with torch.no_grad(), model.attachment.detached():
            assert torch.equal(mine, model.lm(input_ids=ids).logits)


def test_soft_prompt_parts_and_size():
    soft = SoftPrompt(SoftPromptConfig(task_tokens=4), "linear", 16, 32, size=0.05)
    tokens, mask = torch.randn(3, 5, 16), torch.ones(3, 5, dtype=torch.bool)
    (task, always), (user, real) = soft(tokens, mask)
    assert task.shape == (3, 4, 32) and always.all()
    assert user.shape == (3, 5, 32) and real is mask
    assert float(user.pow(2).mean().sqrt()) == pytest.approx(0.05, rel=0.3)
    assert float(task.pow(2).mean().sqrt()) == pytest.approx(0.05, rel=0.3)
    assert SoftPrompt(SoftPromptConfig(task_tokens=0), "mlp", 16, 32, 1.0)(tokens, mask)[0][0].shape == (
        3,
        0,
        32,
    )


@every_variant
def test_gradients_reach_what_should_learn(make_user_llm, stored, variant):
    model = model_of(make_user_llm, variant)
    users = model.context(stored.batch([(7, 0, 6), (5, 0, 2)]))
    (-model.answer_log_likelihood("next_item", torch.tensor([3, 9]), users).sum()).backward()
    idle = [
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.grad is None and "gate" not in name
    ]
    assert idle == [] or (variant == "text" and not any("lora" in name for name in idle)), idle


# ---- histories as text ------------------------------------------------------------------------------------------


def written(model, histories, rows, ends, config):
    texts = HistoryText(config, model.history_text.values, model.tokenizer)
    ids, mask = texts(histories, torch.tensor(rows), torch.tensor(ends))
    return [model.tokenizer.decode(i[m]) for i, m in zip(ids, mask, strict=True)], ids, mask


def test_the_latest_events_are_written_in_order(make_user_llm, dataset, stored):
    model = model_of(make_user_llm, "text")
    histories = stored.batch([(7, 0, 6), (5, 0, 2), (2, 0, 0)])
    config = HistoryTextConfig(events=3, lead="Seen:", event=" {title} ({rating});", close=" So")
    texts, ids, mask = written(model, histories, [0, 0, 1, 2], [6, 2, 2, 0], config)
    for text, (user, start, stop) in zip(texts[:3], [(7, 3, 6), (7, 0, 2), (5, 0, 2)], strict=True):
        events = dataset.history(user, start, stop).events
        shown = "".join(f" {model.title(e.item)} ({e.fields['rating']:g});" for e in events)
        assert text.replace(" ", "") == f"Seen:{shown} So".replace(" ", "")
    assert texts[3] == "", "no history, no text"
    assert not mask[1, : ids.shape[1] - int(mask[1].sum())].any(), "padded on the left"


def test_the_oldest_events_make_room(make_user_llm, stored):
    model = model_of(make_user_llm, "text")
    histories = stored.batch([(7, 0, 6)])
    whole, ids, _ = written(model, histories, [0], [6], HistoryTextConfig(events=6))
    limit = ids.shape[1] - 1
    cut, ids, _ = written(model, histories, [0], [6], HistoryTextConfig(events=6, max_tokens=limit))
    assert ids.shape[1] <= limit
    tail = cut[0].split("oldest first:")[1]
    assert tail and whole[0].endswith(tail)
    with pytest.raises(UserError, match=r"max_tokens 3 leaves no room"):
        written(model, histories, [0], [6], HistoryTextConfig(events=6, max_tokens=3))


def test_an_event_without_room_is_cut_where_it_is_the_latest(make_user_llm, stored):
    model = model_of(make_user_llm, "text")
    histories = stored.batch([(7, 0, 6)])
    config = HistoryTextConfig(events=3, lead="Seen:", event=" {title};" + " many words" * 20)
    whole, _, _ = written(model, histories, [0], [6], config)
    config.max_tokens = 40
    [cut], ids, _ = written(model, histories, [0], [6], config)
    assert ids.shape[1] == 40
    latest = whole[0].split(";")[-2].removeprefix(" many words" * 20) + "; many words"
    assert latest in cut and cut.endswith("\n") and cut.count(";") == 1
    texts = HistoryText(config, model.history_text.values, model.tokenizer)
    assert texts.written(histories, torch.tensor([0]), torch.tensor([6])) == [cut]


def test_events_begin_as_words_behind_others_do(make_user_llm, stored):
    """A tokenizer that marks every text's beginning as that of a word would make the space a token of its own."""
    model = model_of(make_user_llm, "text")
    config, values, asked = HistoryTextConfig(events=2, lead="Seen:", close=""), model.history_text.values, []

    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            asked.append(text)
            return model.tokenizer(text, add_special_tokens=add_special_tokens)

    for space in (" ", ""):
        asked.clear()
        texts = HistoryText(config, values, Tokenizer(), space)
        texts(stored.batch([(7, 0, 6)]), torch.tensor([0]), torch.tensor([6]))
        assert asked[0] == "Seen:"
        assert [text.startswith(" ") for text in asked[2:]] == [space == " "] * 2


@pytest.mark.parametrize("event", ["{title", "title}", "{title!z}", "{rating:.1f}", "{title:{width}}"])
def test_a_template_that_no_text_fits_is_named(make_user_llm, event):
    with pytest.raises(UserError, match=r"fusion\.text\.event .*write a field as \{title\}"):
        make_user_llm("lora", kind="none", text=HistoryTextConfig(events=2, event=event))


def test_bad_settings_are_named(make_user_llm):
    with pytest.raises(UserError, match=r"fusion.text.event: no \{director\}"):
        make_user_llm("lora", kind="none", text=HistoryTextConfig(events=2, event="{director}"))
    with pytest.raises(UserError, match="leaves the user out"):
        make_user_llm("lora", kind="none")
    with pytest.raises(UserError, match="nothing to train"):
        make_user_llm("enc", kind="none", text=HistoryTextConfig(events=2))
    with pytest.raises(UserError, match=r"fusion\.events is 0; it must be at least 1"):
        FusionConfig(events=0).check()


def test_gradient_checkpointing_is_refused_where_it_would_drop_what_was_read(make_user_llm, stored):
    users = stored.batch([(7, 0, 6)])
    for attend, refused in (("answer", True), ("text", False)):
        model = make_user_llm("full", attend=attend).train()
        model.lm.gradient_checkpointing_enable({"use_reentrant": False})
        if refused:
            with pytest.raises(UserError, match=r'gradient checkpointing drops .* use "text"'):
                model.answer_losses("next_item", torch.tensor([3]), model.context(users))
        else:
            model.answer_losses("next_item", torch.tensor([3]), model.context(users))[0].sum().backward()


def test_texts_of_the_events_are_shown_where_asked_for(make_user_llm, stored):
    """Look-ups follow their history, whether it is selected, moved or cut short."""
    histories = stored.batch([(7, 0, 6), (5, 0, 2), (2, 0, 0)])
    histories.texts = [
        lambda name, place, user=user: f"{name}  of user {user}\nat {place}" for user in (7, 5, 2)
    ]
    model = model_of(make_user_llm, "text")
    config = HistoryTextConfig(events=2, lead="", event="{title}: {text};", close="", texts=["text"])
    whole, _, _ = written(model, histories, [0, 1, 2], [6, 2, 0], config)
    assert [text.count("of user") for text in whole] == [2, 2, 0]
    assert "text of user 7 at 4;" in whole[0] and whole[0].endswith("text of user 7 at 5;")
    order = torch.tensor([1, 0])
    moved = histories.select(order).prefixes(torch.tensor([1, 3])).to("cpu")
    some, _, _ = written(model, moved, [0, 1], [1, 3], config)
    assert some[0].endswith("text of user 5 at 0;") and some[1].endswith("text of user 7 at 2;")
    config.text_words = 2
    cut, _, _ = written(model, histories, [0], [6], config)
    assert cut[0].endswith(": text of;")
    histories.texts = None
    with pytest.raises(UserError, match=r"nothing is known of these histories' texts \(text\)"):
        written(model, histories, [0], [6], config)


def test_a_text_that_does_not_begin_as_the_tokenizer_would_loses_nothing(make_user_llm, dataset):
    """A chat template may leave out the token that opens a text."""
    model = model_of(make_user_llm, "text")
    users = model.context(model.collator.from_histories([dataset.history(7)], max_length=8)[0])
    ids = torch.tensor([[70, 71, 72]])
    model._opening = [3]
    before = users.prefix.embeddings.shape[1]
    for text in (ids, torch.cat([torch.tensor([[3]]), ids], dim=1)):
        whole, _ = model.after_prefix(users.prefix, text)
        assert torch.equal(whole[:, before:], model.lm.get_input_embeddings()(ids))
