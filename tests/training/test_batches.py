"""Training batches are a function of (seed, step), show the past only, and never touch validation or test."""

import numpy as np
import pytest
import torch

from userllm.data.batches import BatchConfig
from userllm.data.collation import StoredHistories
from userllm.data.splits import SplitConfig
from userllm.training.contextualize import ContextualizeConfig
from userllm.training.examples import ExampleBatches
from userllm.training.pretrain import PretrainBatches, PretrainConfig

SPLITS = {"llo": SplitConfig(), "paper": SplitConfig(kind="paper", window=4)}
every_split = pytest.mark.parametrize("split_config", SPLITS.values(), ids=SPLITS)
every_stage = pytest.mark.parametrize("stage", ["pretrain", "contextualize"])


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(max_length=6, events=4)


def flat(value):
    """Every tensor of a batch, by name."""
    if isinstance(value, torch.Tensor | int):
        return {"": torch.as_tensor(value)}
    items = value.items() if isinstance(value, dict) else vars(value).items()
    return {
        f"{name}.{inner}": tensor
        for name, part in items
        if not isinstance(part, list)
        for inner, tensor in flat(part).items()
    }


def build(stage, model, dataset, split_config, vocabulary, seed=0, **settings):
    stored, split = StoredHistories(dataset, vocabulary), split_config.build(dataset)
    if stage == "pretrain":
        return PretrainBatches(stored, split, 6, PretrainConfig(epochs=3, batch=BatchConfig(events=30)), seed)
    config = ContextualizeConfig(**({"steps": 12, "histories": 5, "examples_per_history": 3} | settings))
    return ExampleBatches(model, dataset, split, stored, config, seed)


def equal(a, b):
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@every_split
@every_stage
def test_batches_are_a_function_of_seed_and_step(model, dataset, vocabulary, split_config, stage):
    first, second = (build(stage, model, dataset, split_config, vocabulary) for _ in range(2))
    assert len(first) >= 9
    forwards = [first.batch(step) for step in range(len(first))]
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 the legacy global state is what must not matter
    backwards = [second.batch(step) for step in reversed(range(len(first)))][::-1]
    assert all(equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not all(equal(forwards[0], other) for other in forwards[1:])
    other = build(stage, model, dataset, split_config, vocabulary, seed=1)
    assert not equal(other.batch(0), forwards[0])
    second.start = 4
    assert equal(second[0], forwards[4])


@every_split
@every_stage
def test_held_out_events_cannot_reach_training(model, dataset, vocabulary, split_config, stage, monkeypatch):
    """With any other items, ratings and genres at validation and test positions every batch stays the same."""
    split = split_config.build(dataset)
    before = build(stage, model, dataset, split_config, vocabulary)
    expected = [before.batch(step) for step in range(len(before))]
    for name in ("item", "rating"):
        values = dataset.events[name].copy()
        for user, end in zip(split.users, split.train_end, strict=True):
            held_out = slice(dataset.offsets[user] + end, dataset.offsets[user + 1])
            values[held_out] = values[held_out] % 5 + 1
        assert (values != dataset.events[name]).sum() > len(split.users) // 2
        monkeypatch.setitem(dataset.events, name, values)
    after = build(stage, model, dataset, split_config, vocabulary)
    assert all(equal(after.batch(step), batch) for step, batch in enumerate(expected))


@every_split
def test_examples_ask_for_what_comes_next_of_what_is_seen(model, dataset, vocabulary, split_config):
    batches = build("contextualize", model, dataset, split_config, vocabulary)
    tasks = list(model.tasks.values())
    genre_answers = tasks[1].answers
    window = min(4, split_config.window if split_config.kind == "paper" else 99)
    checked = {"next_item": 0, "favorite_genre": 0}
    lengths = set()
    for step in range(12):
        examples = batches.batch(step)["examples"]
        items, genres = examples.histories.fields["item"], examples.histories.fields["genres"]
        for row, end, task, answer in zip(
            examples.rows.tolist(),
            examples.ends.tolist(),
            examples.task.tolist(),
            examples.answers.tolist(),
            strict=True,
        ):
            length = int(examples.histories.lengths[row])
            lengths.add(end)
            assert 1 <= end <= length <= 6
            if examples.tasks[task] == "next_item":
                if end < length:
                    assert int(items[row, end]) == answer + 2
                    checked["next_item"] += 1
            else:
                seen = genres[row, max(0, end - window) : end].flatten()
                counts = torch.bincount(seen, minlength=2 + len(genre_answers))[2:]
                assert answer == int(counts.argmax())
                checked["favorite_genre"] += 1
    assert checked["favorite_genre"] > 20
    if split_config.kind == "paper":
        assert max(lengths) == 4, "a window of the paper's protocol"
    else:
        assert checked["next_item"] > 5


def test_every_user_once_per_pass(model, dataset, vocabulary, split):
    batches = build("contextualize", model, dataset, SplitConfig(), vocabulary, histories=4, steps=5)
    firsts = []
    for step in range(5):  # 20 users, 4 a batch: one pass
        histories = batches.batch(step)["examples"].histories
        firsts += [tuple(row[row > 0].tolist()) for row in histories.fields["item"]]
    users = set()
    for row in firsts:
        [user] = [
            u
            for u in split.users.tolist()
            if any(
                row
                == tuple(2 + i for i in dataset.events["item"][dataset.offsets[u] + s :][: len(row)].tolist())
                for s in range(int(dataset.lengths[u]))
            )
        ][:1]
        users.add(user)
    assert len(firsts) == 20
    assert len(users) >= 15  # short stretches may fit several users


def test_tasks_share_by_weight(make_model, dataset, vocabulary):
    model = make_model()
    model.tasks["next_item"].config.weight = 3.0
    batches = build("contextualize", model, dataset, SplitConfig(), vocabulary, histories=50, steps=10)
    shares = torch.cat([batches.batch(step)["examples"].task for step in range(10)])
    assert float((shares == 0).float().mean()) == pytest.approx(0.75, abs=0.05)


def test_pretraining_covers_every_training_target_once_an_epoch(model, dataset, vocabulary, split):
    batches = build("pretrain", model, dataset, SplitConfig(), vocabulary)
    recent = PretrainConfig(epochs=1, batch=BatchConfig(events=30), recent=2)
    few = PretrainBatches(StoredHistories(dataset, vocabulary), split, 6, recent, 0)
    seen = sum(int(few.batch(step)["targets"].mask.sum()) for step in range(few.per_epoch))
    assert seen == int((split.train_end - 1).clip(max=2).sum())
    for epoch in range(2):
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        targets = sum(int(batches.batch(step)["targets"].mask.sum()) for step in steps)
        assert targets == int((split.train_end - 1).sum())


def test_points_in_time_may_be_apart(model, dataset, vocabulary):
    """Every example's history ends a multiple of ``every`` after its start, or at the first target."""
    stored, split = StoredHistories(dataset, vocabulary), SplitConfig().build(dataset)
    config = ContextualizeConfig(steps=9, histories=4, examples_per_history=3)
    ends = []
    for every in (1, 3):
        batches = ExampleBatches(model, dataset, split, stored, config, 0, every=every)
        spans, batch = [], stored.batch

        def recorded(rows, spans=spans, batch=batch):
            spans.append(rows)
            return batch(rows)

        batches.stored = type("Stored", (), {"batch": staticmethod(recorded)})()
        points = set()
        for step in range(9):
            examples = batches.batch(step)["examples"]
            begins = [begin for _, begin, _ in spans[-1]]
            lowest = [max(split.first_target, begin + 1) for begin in begins]
            for row, end in zip(examples.rows.tolist(), examples.ends.tolist(), strict=True):
                point = begins[row] + end
                points.add(point)
                assert point % every == 0 or point in (split.first_target, lowest[row])
        ends.append(points)
    assert len(ends[1]) < len(ends[0])
