"""Attaching is invisible until a gate opens, leaves with no trace, and does not disturb generation or training."""

import copy
import warnings

import pytest
import torch
from torch import nn

from userllm.errors import UserError
from userllm.fusion.attach import Attachment, FusedLayer, ReplayLayer, UserContext, find_layers
from userllm.fusion.config import FusionConfig
from userllm.fusion.cross_attention import CrossAttentionBlock, CrossAttentionConfig

every_architecture = pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "gemma3", "gpt2", "opt", "gpt_neox", "phi3"]
)
TEXT = "What will the user watch next? Star Wars: Episode IV - A New Hope (1977), or perhaps Heat?"


def ids_of(model, text=TEXT):
    return model.tokenizer(text, return_tensors="pt")["input_ids"]


@every_architecture
@pytest.mark.parametrize("gate", ["tanh", "none"])
def test_a_new_fusion_is_the_base_lm_bit_for_bit(make_model, tiny_lm, histories, architecture, gate):
    base, _ = tiny_lm(architecture)
    model = make_model(architecture, layers="all", gate=gate, stir=False)
    ids = ids_of(model)
    with torch.no_grad(), model.conditioned(model.context(histories)):
        fused = model.lm(ids.repeat(3, 1)).logits
    with torch.no_grad():
        expected = base(ids.repeat(3, 1)).logits
    assert torch.equal(fused, expected)


@every_architecture
def test_users_matter_and_no_user_or_no_events_do_not(make_model, tiny_lm, histories, architecture):
    base, _ = tiny_lm(architecture)
    model = make_model(architecture)
    ids = ids_of(model).repeat(3, 1)
    with torch.no_grad():
        expected = base(ids).logits
        with model.conditioned(model.context(histories)):
            fused = model.lm(ids).logits
        with model.without_user():
            without = model.lm(ids).logits
    assert not torch.allclose(fused[0], expected[0], atol=1e-2)
    assert not torch.allclose(fused[0], fused[1], atol=1e-2)
    assert torch.equal(fused[2], expected[2])  # the third user has no events
    assert torch.equal(without, expected)


@every_architecture
def test_detaching_gives_the_same_layers_back(tiny_lm, architecture):
    lm, _ = tiny_lm(architecture)
    before = list(find_layers(lm))
    names = [name for name, _ in lm.named_parameters()]
    blocks = {i: CrossAttentionBlock(CrossAttentionConfig(2, 8), 32, 16) for i in (1, 3)}
    attachment = Attachment(lm, blocks)
    kinds = [type(layer) for layer in find_layers(lm)]
    assert kinds == [ReplayLayer, FusedLayer, type(before[2]), FusedLayer]
    with attachment.detached():
        assert all(a is b for a, b in zip(find_layers(lm), before, strict=True))
    assert isinstance(find_layers(lm)[1], FusedLayer)
    attachment.detach()
    assert all(a is b for a, b in zip(find_layers(lm), before, strict=True))
    assert [name for name, _ in lm.named_parameters()] == names
    attachment.attach()
    with pytest.raises(RuntimeError, match="already attached"):
        attachment.attach()


def test_a_fused_lm_without_a_word_about_the_user_raises(make_model, histories):
    model = make_model()
    with pytest.raises(RuntimeError, match=r"conditioned\(users\)"):
        model.lm(ids_of(model))
    with model.conditioned(model.context(histories)), model.without_user():
        pass
    with pytest.raises(RuntimeError, match="without_user"):  # nothing is left behind by the with blocks
        model.lm(ids_of(model))


def test_nested_users_are_restored(make_model, histories):
    model = make_model()
    first, second = (model.context(histories.select(torch.tensor([i]))) for i in (0, 1))
    with torch.no_grad(), model.conditioned(first):
        expected = model.lm(ids_of(model)).logits
        with model.conditioned(second):
            inside = model.lm(ids_of(model)).logits
        assert torch.equal(model.lm(ids_of(model)).logits, expected)
    assert not torch.equal(inside, expected)


def test_text_rows_must_divide_among_users(make_model, histories):
    model = make_model()
    with pytest.raises(ValueError, match="do not divide"), model.conditioned(model.context(histories)):
        model.lm(ids_of(model).repeat(4, 1))


@every_architecture
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams-2", "sample-2"],
)
def test_cached_generation_equals_uncached(make_model, histories, architecture, settings):
    model = make_model(architecture)
    ids = ids_of(model)[:, :20].repeat(2, 1)  # longer than gemma3's sliding window of 16
    users = model.context(histories.select(torch.tensor([0, 1])))
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        with torch.no_grad(), model.conditioned(users):
            texts.append(
                model.lm.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, use_cache=use_cache,
                    **({"do_sample": False} | settings),
                )
            )  # fmt: skip
    assert torch.equal(*texts)
    assert len(texts[0]) == 2 * settings.get("num_return_sequences", 1)


@every_architecture
def test_a_left_padded_batch_generates_what_single_texts_do(make_model, histories, architecture):
    model = make_model(architecture)
    texts = ["Heat", TEXT, "The user has watched these movies, latest last: Toy"]
    batch = model.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    users = model.context(histories.select(torch.tensor([0, 1, 0])))
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    with torch.no_grad(), model.conditioned(users):
        together = model.lm.generate(**batch, **settings)[:, -8:]
    for row, text in enumerate(texts):
        one = model.tokenizer([text], return_tensors="pt")
        with torch.no_grad(), model.conditioned(users.select(torch.tensor([row]))):
            alone = model.lm.generate(**one, **settings)[0, -8:]
        assert torch.equal(together[row], alone)


def test_a_batch_of_users_equals_one_at_a_time(make_model, histories):
    model = make_model()
    ids = ids_of(model)
    with torch.no_grad():
        with model.conditioned(model.context(histories)):
            together = model.lm(ids.repeat(3, 1)).logits
        for row in range(3):
            with model.conditioned(model.context(histories.select(torch.tensor([row])))):
                alone = model.lm(ids).logits
            torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_padding_of_histories_does_not_matter(make_model, stored, histories, padding):
    model = make_model()
    longer = stored.batch([(7, 0, 9), (5, 0, 4), (8, 0, 0), (4, 0, 9 + padding)])
    if padding:  # and padding's content may be anything
        assert longer.mask.shape[1] == 9 + padding
        for ids in longer.fields.values():
            ids[~longer.mask] = 1
    few, many = model.context(histories), model.context(longer)
    assert torch.equal(few.mask, many.mask[:3])
    torch.testing.assert_close(few.tokens, many.tokens[:3], atol=1e-5, rtol=1e-5)
    assert not few.tokens[~few.mask].any()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, histories, architecture, reentrant):
    model = make_model(architecture).train()
    for module in model.lm.modules():  # the comparison needs a deterministic forward pass
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients():
        model.zero_grad()
        ids = ids_of(model)[:, :12].repeat(3, 1)
        with model.conditioned(model.context(histories)):
            loss = model.lm(ids, labels=ids, use_cache=False).loss
            loss.backward()
        return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}

    plain = gradients()
    model.lm.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    hook = model.attachment.blocks[3].query.register_forward_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpointed = gradients()
    hook.remove()
    assert len(calls) == 2, "the block was not recomputed"
    assert plain.keys() == checkpointed.keys()
    assert any("block.gate" in name for name in plain)
    assert any(name.startswith("encoder.") for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_a_deep_copy_works_and_is_independent(make_model, histories):
    model = make_model()
    losses, _ = model.answer_losses("next_item", torch.tensor([0, 1, 2]), model.context(histories))
    losses.sum().backward()
    twin = copy.deepcopy(model)
    ids = ids_of(model)
    with torch.no_grad():
        with model.conditioned(model.context(histories)):
            expected = model.lm(ids.repeat(3, 1)).logits
            with pytest.raises(RuntimeError):  # the copy has its own current user
                twin.lm(ids)
        with twin.conditioned(twin.context(histories)):
            assert torch.equal(twin.lm(ids.repeat(3, 1)).logits, expected)
        for weight in twin.parameters():
            weight.add_(0.1)
        before = model.all_log_likelihoods("next_item", None)
        assert not torch.allclose(twin.all_log_likelihoods("next_item", None), before)
        with model.conditioned(model.context(histories)):
            assert torch.equal(model.lm(ids.repeat(3, 1)).logits, expected)
    twin.attachment.detach()
    assert isinstance(find_layers(model.lm)[3], FusedLayer)


def test_keys_and_values_are_projected_once_per_context(make_model, histories):
    model = make_model()
    calls = []
    hook = model.attachment.blocks[3].key.register_forward_hook(lambda *_: calls.append(1))
    users = model.context(histories.select(torch.tensor([0])))
    with torch.no_grad(), model.conditioned(users):
        model.lm.generate(ids_of(model), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    hook.remove()
    assert len(calls) == 1


def test_selected_users_are_the_users(make_model, histories):
    model = make_model()
    users = model.context(histories)
    chosen = users.select(torch.tensor([1, 1, 0]))
    assert torch.equal(chosen.tokens, users.tokens[[1, 1, 0]])
    assert torch.equal(chosen.mask, users.mask[[1, 1, 0]])
    fresh = UserContext(chosen.tokens, chosen.mask)
    with torch.no_grad():
        with model.conditioned(users):
            model.lm(ids_of(model).repeat(3, 1))
        kept = users.select(torch.tensor([1, 1, 0]))
        assert kept.keys_values.keys() == users.keys_values.keys()
        with model.conditioned(kept):
            a = model.lm(ids_of(model).repeat(3, 1)).logits
        with model.conditioned(fresh):
            b = model.lm(ids_of(model).repeat(3, 1)).logits
    torch.testing.assert_close(a, b)


@every_architecture
@pytest.mark.parametrize("layers", ["last:1", "last:2", "every:2"])
def test_lower_states_replayed_equal_full_computation(make_model, histories, architecture, layers):
    model = make_model(architecture, layers=layers)
    ids = ids_of(model).repeat(3, 1)
    with torch.no_grad():
        states = model.attachment.lower_states(model.lm, ids)
        with model.conditioned(model.context(histories)):
            full = model.hidden(ids)
            replayed = model.hidden(ids, states)
    torch.testing.assert_close(replayed, full, atol=1e-5, rtol=1e-5)


def test_there_are_no_states_below_the_first_layer(make_model):
    model = make_model(layers="all")
    with pytest.raises(ValueError, match="no layer lies below"):
        model.attachment.lower_states(model.lm, ids_of(model))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]), ("every:1", [0, 1, 2, 3, 4, 5]), ("every:2", [1, 3, 5]), ("every:4", [1, 5]),
        ("every:6", [5]), ("last:1", [5]), ("last:6", [0, 1, 2, 3, 4, 5]),
    ],
)  # fmt: skip
def test_fused_layers(setting, expected):
    assert FusionConfig(layers=setting).layer_indices(6) == expected


@pytest.mark.parametrize(
    "setting",
    [
        "",
        "none",
        "last",
        "last:",
        "last:0",
        "last:7",
        "last:-1",
        "last:x",
        "every:7",
        "all:",
        "all:2",
        "every:²",
    ],
)
def test_unusable_fused_layers_are_named(setting):
    with pytest.raises(UserError, match=r"fusion\.layers"):
        FusionConfig(layers=setting).layer_indices(6)


def test_an_lm_without_a_list_of_layers_is_refused(tiny_lm):
    lm, _ = tiny_lm("llama")
    lm.config.num_hidden_layers = 3
    with pytest.raises(UserError, match="expected one list of 3 decoder layers, found 0"):
        find_layers(lm)
    lm.config.num_hidden_layers = 4
    lm.extra = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))
    with pytest.raises(UserError, match="found 2"):
        find_layers(lm)


def test_blocks_must_fit_the_lm(tiny_lm):
    lm, _ = tiny_lm("llama")
    block = CrossAttentionBlock(CrossAttentionConfig(2, 8), 32, 16)
    for blocks in ({4: block}, {-1: block}):
        with pytest.raises(UserError, match="do not fit"):
            Attachment(lm, blocks)


def test_wrappers_pass_unknown_attributes_on(make_model):
    model = make_model()
    fused, replayed = find_layers(model.lm)[3], find_layers(model.lm)[0]
    assert fused.self_attn is fused.layer.self_attn
    assert replayed.mlp is replayed.layer.mlp
    with pytest.raises(AttributeError):
        _ = fused.no_such_thing


def test_a_bfloat16_lm_takes_a_float32_fusion(make_model, histories):
    model = make_model()
    model.lm.to(torch.bfloat16)
    for block in model.attachment.blocks.values():
        block.float()
    ids = ids_of(model).repeat(3, 1)
    users = model.context(histories)
    with model.conditioned(users):
        logits = model.lm(ids).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
    logits.float().logsumexp(-1).sum().backward()
    assert model.attachment.blocks[3].gate.grad.abs() > 0
