"""What each strategy trains, and that nothing else moves by a bit."""

import pytest
import torch

from userllm.fusion.perceiver import PerceiverConfig
from userllm.training.contextualize import ContextualizeConfig, ContextualizedLosses
from userllm.training.examples import ExampleBatches
from userllm.training.strategy import trainable_parameters
from userllm.training.trainer import OptimizationConfig, StageTrainer, training_arguments

GROUPS = {
    "full": {"lm", "encoder", "projection", "cross_attention"},
    "lora": {"lora", "encoder", "projection", "cross_attention"},
    "enc": {"encoder", "projection", "cross_attention"},
    "proj": {"projection", "cross_attention"},
}
every_strategy = pytest.mark.parametrize("strategy", GROUPS)


def group_of(name):
    for key, group in (
        ("encoder.", "encoder"),
        ("user_tokens.", "projection"),
        (".user_block.", "cross_attention"),
    ):
        if key in name:
            return group
    return "lora" if "lora_" in name else "lm"


@every_strategy
def test_groups_and_their_sizes(make_user_llm, strategy):
    model = make_user_llm(strategy, stir=False)
    counts = trainable_parameters(model)
    assert {group for group, count in counts.items() if count} == GROUPS[strategy]
    blocks = sum(w.numel() for b in model.attachment.blocks.values() for w in b.parameters())
    assert counts["cross_attention"] == blocks
    assert counts["projection"] == 5 * 16  # a vector for each recency
    if counts["encoder"]:
        heads = sum(w.numel() for w in model.encoder.features.heads.parameters())
        assert counts["encoder"] == sum(w.numel() for w in model.encoder.parameters()) - heads
    if strategy == "full":
        with model.attachment.detached():
            assert counts["lm"] == sum(w.numel() for w in model.lm.parameters())
    if strategy == "lora":
        layers = [m for m in model.lm.modules() if hasattr(m, "lora_A")]
        expected = sum(2 * (m.in_features + m.out_features) for m in layers)
        assert counts["lora"] == expected > 0


@every_strategy
def test_only_the_strategys_groups_change(run_contextualize, tmp_path, strategy):
    model, before, history = run_contextualize(tmp_path / "contextualize", strategy)
    after = model.state_dict()
    changed = {group_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == GROUPS[strategy]
    assert not any(
        not torch.equal(before[name], after[name])
        for name in before
        if name.startswith("encoder.features.heads")
    )
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert {"next_item_nll", "favorite_genre_nll"} & set(history[0])


@pytest.mark.parametrize("attend", ["text", "answer"])
def test_stored_states_do_not_change_training(make_user_llm, dataset, split, stored, attend):
    """The losses and gradients of a frozen LM are those of computing everything."""
    results = []
    for store in (False, True):
        model = make_user_llm(attend=attend).train()
        if store:
            model.store_lower_states()
        model.tasks["next_item"].config.teacher = 0.5
        examples = ExampleBatches(model, dataset, split, stored, ContextualizeConfig(steps=1), 0).batch(0)
        losses = ContextualizedLosses(model)(**examples)
        losses["loss"].backward()
        gradients = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
        results.append((losses, gradients))
    (losses, gradients), (stored_losses, stored_gradients) = results
    for name, value in losses.items():
        torch.testing.assert_close(stored_losses[name], value, atol=1e-4, rtol=1e-4)
    assert gradients.keys() == stored_gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(stored_gradients[name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_the_loss_is_the_mean_over_examples(make_user_llm, dataset, split, stored):
    model = make_user_llm()
    losses_of = ContextualizedLosses(model)
    examples = ExampleBatches(model, dataset, split, stored, ContextualizeConfig(steps=1), 0).batch(0)[
        "examples"
    ]
    users = model.context(examples.histories, examples.rows, examples.ends)
    each = []
    for place, (task, answer) in enumerate(
        zip(examples.task.tolist(), examples.answers.tolist(), strict=True)
    ):
        one = users.select(torch.tensor([place]))
        each.append(-model.all_log_likelihoods(examples.tasks[task], one)[answer])
    found = losses_of(examples)
    torch.testing.assert_close(found["loss"], torch.stack(each).mean(), atol=1e-4, rtol=1e-4)
    for number, name in enumerate(examples.tasks):
        mine = [value for value, task in zip(each, examples.task.tolist(), strict=True) if task == number]
        torch.testing.assert_close(found[f"{name}_nll"], torch.stack(mine).mean(), atol=1e-4, rtol=1e-4)


def test_a_teacher_is_the_encoder_as_it_was(make_user_llm, dataset, split, stored):
    model = make_user_llm()
    model.tasks["next_item"].config.teacher = 1.0
    losses_of = ContextualizedLosses(model)
    assert not any("_teacher" in name for name, _ in losses_of.named_parameters())
    examples = ExampleBatches(model, dataset, split, stored, ContextualizeConfig(steps=1), 0).batch(0)[
        "examples"
    ]
    mine = torch.nonzero(examples.task == 0)[:, 0]
    expected = losses_of._teach(examples.histories, examples, mine)
    torch.testing.assert_close(expected.sum(1), torch.ones(len(mine)))
    for place, row in enumerate(mine.tolist()):
        prefix = examples.histories.select(examples.rows[row : row + 1])
        with torch.no_grad():
            own = model.encoder(prefix)[0][0, examples.ends[row] - 1]
        torch.testing.assert_close(expected[place], torch.softmax(model.encoder.item_scores(own), -1))
    with torch.no_grad():
        for weight in model.encoder.parameters():
            weight.add_(1.0)
    torch.testing.assert_close(losses_of._teach(examples.histories, examples, mine), expected)


def test_a_batch_without_an_answer_is_not_an_error(make_user_llm, dataset, split, stored):
    model = make_user_llm()
    examples = ExampleBatches(model, dataset, split, stored, ContextualizeConfig(steps=1), 0).batch(0)[
        "examples"
    ]
    for name in ("rows", "ends", "task", "answers"):
        setattr(examples, name, getattr(examples, name)[:0])
    loss = ContextualizedLosses(model)(examples)["loss"]
    loss.backward()
    assert float(loss.detach()) == 0


def test_adafactors_steps_are_a_share_of_each_weights_size(make_user_llm, dataset, split, stored, tmp_path):
    model = make_user_llm("lora")
    model.user_tokens.recency.weight.data.mul_(1000)
    config = OptimizationConfig(optimizer="adafactor", learning_rate=0.01, warmup=0.0)
    batches = ExampleBatches(model, dataset, split, stored, ContextualizeConfig(steps=1), 0)
    trainer = StageTrainer(
        ContextualizedLosses(model), training_arguments(tmp_path / "c", config, 1, 0, None), batches
    )
    large, before = model.user_tokens.recency.weight, model.user_tokens.recency.weight.detach().clone()
    small, start = model.encoder.features.fuse.weight, model.encoder.features.fuse.weight.detach().clone()
    trainer.run()
    for weight, was in ((large, before), (small, start)):
        step = float((weight.detach() - was).pow(2).mean().sqrt() / was.pow(2).mean().sqrt())
        assert 0.001 < step <= 0.011


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_rates_and_decay_by_group(make_user_llm, dataset, split, stored, tmp_path, optimizer):
    model = make_user_llm("lora", stir=False, perceiver=PerceiverConfig(latents=3, layers=1, heads=2))
    stage = ContextualizeConfig(steps=1)
    batches = ExampleBatches(model, dataset, split, stored, stage, 0)
    config = OptimizationConfig(optimizer=optimizer, learning_rate=0.01, weight_decay=0.5)
    args = training_arguments(tmp_path / "c", config, 1, 0, None)
    trainer = StageTrainer(ContextualizedLosses(model), args, batches, rates=stage.rates)
    names = {id(weight): name for name, weight in model.named_parameters()}
    seen = {}
    for group in trainer.create_optimizer().param_groups:
        for weight in group["params"]:
            seen[names[id(weight)]] = (group["lr"], group["weight_decay"])
            assert group["weight_decay"] == (0.5 if weight.ndim > 1 else 0.0)
    assert seen.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    expected = {"encoder": 0.001, "projection": 0.01, "cross_attention": 0.01, "lora": 0.0002}
    for name, (rate, _) in seen.items():
        own = 0.1 if name.endswith("gate") else 0.003 if "perceiver" in name else expected[group_of(name)]
        assert rate == pytest.approx(own), name


def test_a_frozen_lm_does_not_drop_out(make_user_llm):
    for strategy in GROUPS:
        model = make_user_llm(strategy, "tiny-random-gpt2", stir=False).train()
        frozen = strategy in ("enc", "proj")
        assert model.lm.training != frozen
        assert model.encoder.training == (strategy != "proj")


@every_strategy
def test_a_frozen_encoder_has_no_dropout(make_user_llm, make_encoder, stored, strategy):
    """With proj the encoder is a constant: what learns from it sees what it will see when it answers."""
    model = make_user_llm(strategy, encoder=make_encoder("autoregressive", dropout=0.3)).eval()
    batch = stored.batch([(7, 0, 8)])
    answered = model.encoder(batch)[0]
    model.train()
    assert torch.equal(model.encoder(batch)[0], answered) == (strategy == "proj")
