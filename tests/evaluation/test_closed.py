"""The evaluator's numbers against their recomputation, user by user."""

import numpy as np
import pytest
import torch

from userllm.baselines.own_history import own_most_frequent
from userllm.data.splits import SplitConfig
from userllm.errors import UserError
from userllm.evaluation.closed import ClosedEvaluator, EvaluationConfig, count_invalid
from userllm.evaluation.metrics import paired_gain, ranking_metrics

SILENT = {"progress": lambda _text: None}


def evaluator(model, dataset, split, stored, seed=0, encoder=None, **settings):
    encoder = encoder or model.encoder
    return ClosedEvaluator(
        model, encoder, dataset, split, stored, EvaluationConfig(**settings), seed, **SILENT
    )


def rank(scores, target, excluded=()):
    order = [n for n in np.argsort(-np.asarray(scores), kind="stable") if n == target or n not in excluded]
    return order.index(target) + 1


def as_dicts(ranks):
    return {name: estimate.as_dict() for name, estimate in ranking_metrics(ranks).items()}


def same(entry, expected):
    for name, estimate in expected.items():
        assert entry[name] == pytest.approx(estimate, abs=1e-4), name


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(max_length=8, events=6)


@pytest.mark.parametrize(("part", "exclude_seen"), [("test", True), ("validation", False)])
def test_next_item(model, make_encoder, dataset, split, stored, part, exclude_seen):
    first_stage = make_encoder(max_length=8, layers=1)  # the baseline is not the encoder that stage 2 trained
    settings = {"part": part, "exclude_seen": exclude_seen, "list_length": 7, "batch": 4}
    judge = evaluator(model, dataset, split, stored, encoder=first_stage, **settings)
    entry = judge.evaluate("next_item")
    rows = split.examples(part, max_length=8)
    assert (entry["n"], entry["N"], entry["invalid_items"]) == (len(rows), len(rows), 0)
    popularity = np.zeros(20)
    for user, end in zip(split.users, split.train_end, strict=True):
        np.add.at(popularity, dataset.events["item"][dataset.offsets[user] :][:end], 1)
    nobody = model.all_log_likelihoods("next_item", None).numpy()

    def with_history(row):
        with torch.no_grad():
            return model.all_log_likelihoods("next_item", model.context(stored.batch(row[None]))).numpy()

    ranks = {name: [] for name in ("user_llm", "user_llm_shuffled", "no_user", "encoder", "popularity")}
    logliks = {name: [] for name in ranks}
    for place, row in enumerate(rows):
        user, _, stop = row
        items = dataset.events["item"][dataset.offsets[user] :]
        target, seen = int(items[stop]), set(items[:stop].tolist()) if exclude_seen else ()
        with torch.no_grad():
            own = (
                first_stage.item_scores(first_stage(stored.batch(row[None]))[0][0, -1])
                .log_softmax(-1)
                .numpy()
            )
        systems = {
            "user_llm": with_history(row),
            "user_llm_shuffled": with_history(rows[judge.other[place]]),
            "no_user": nobody,
            "encoder": own,
            "popularity": np.log((popularity + 1) / (popularity + 1).sum()),
        }
        for name, scores in systems.items():
            found = rank(scores, target, seen)
            ranks[name].append(found if found <= 7 else 0)
            logliks[name].append(scores[target])
    if exclude_seen:  # nothing of one's own is left
        assert {**entry["popularity"], "log_likelihood": 0} == {
            **entry["own_most_frequent"],
            "log_likelihood": 0,
        }
    else:
        alone = own_most_frequent(dataset, rows, torch.from_numpy(popularity)).numpy()
        found = [
            rank(scores, dataset.events["item"][dataset.offsets[user] + stop])
            for scores, (user, _, stop) in zip(alone, rows, strict=True)
        ]
        same(entry["own_most_frequent"], as_dicts([n if n <= 7 else 0 for n in found]))
    for name in ranks:
        same(entry[name], as_dicts(ranks[name]))
        assert entry[name]["log_likelihood"]["value"] == pytest.approx(np.mean(logliks[name]), abs=1e-4)
    for other in ("shuffled", "no_user"):
        against = logliks["user_llm_shuffled" if other == "shuffled" else other]
        expected = paired_gain(np.array(logliks["user_llm"]), np.array(against)).as_dict()
        assert entry["gain_nats"][f"over_{other}"] == pytest.approx(expected, abs=1e-4)


def test_favorite_category(model, dataset, split, stored):
    entry = evaluator(model, dataset, split, stored).evaluate("favorite_genre")
    rows = split.examples("test", max_length=8)
    task = model.tasks["favorite_genre"]
    targets = task.targets(dataset, rows[:, 0], rows[:, 2], 6)
    assert entry["n"] == int((targets >= 0).sum())
    votes = task.targets(dataset, split.users, split.train_end - 1, 6)
    counts = np.bincount(votes[votes >= 0], minlength=4)
    same(entry["majority"], as_dicts([rank(counts, t) for t in targets]))
    same(
        entry["no_user"],
        as_dicts([rank(model.all_log_likelihoods("favorite_genre", None), t) for t in targets]),
    )
    ranks = []
    for row, target in zip(rows, targets, strict=True):
        with torch.no_grad():
            users = model.context(stored.batch(row[None]))
        ranks.append(rank(model.all_log_likelihoods("favorite_genre", users), target))
    same(entry["user_llm"], as_dicts(ranks))
    assert entry["exact"]["recall@1"]["value"] == 1.0


@pytest.mark.parametrize("config", [SplitConfig(), SplitConfig(kind="paper", window=4)], ids=["llo", "paper"])
def test_the_favourite_is_among_the_events_the_model_can_see(make_model, dataset, stored, config):
    """Also where the setting asks for more events than the encoder or the split's windows hold."""
    model = make_model(max_length=5, events=50)
    entry = evaluator(model, dataset, config.build(dataset), stored).evaluate("favorite_genre")
    assert entry["exact"]["recall@1"]["value"] == 1.0


def test_a_field_the_encoder_does_not_read_has_no_exact_answer(make_model, dataset, split, vocabulary):
    from userllm.data.collation import StoredHistories
    from userllm.data.vocabulary import Vocabulary
    from userllm.encoders import AutoregressiveConfig
    from userllm.model import encoder_for

    model = make_model()
    blind = Vocabulary([vocabulary["item"]])
    config = AutoregressiveConfig(layers=1, width=16, heads=2, feed_forward=16, max_length=12)
    model.encoder = encoder_for(blind, config).eval()
    entry = evaluator(model, dataset, split, StoredHistories(dataset, blind)).evaluate("favorite_genre")
    assert "exact" not in entry
    assert entry["majority"]["recall@1"]["value"] > 0


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_shuffled_to_themselves(model, dataset, split, stored, seed):
    for users in (2, 3, None):
        judge = evaluator(model, dataset, split, stored, seed, users=users)
        assert len(judge.rows) == users or users is None
        assert sorted(judge.other.tolist()) == list(range(len(judge.rows)))
        assert (judge.other != np.arange(len(judge.rows))).all()
        assert len(set(judge.rows[:, 0].tolist())) == len(judge.rows)


def test_a_single_user_cannot_be_shuffled(model, dataset, split, stored):
    with pytest.raises(UserError, match="at least two users"):
        evaluator(model, dataset, split, stored, users=1)


def test_sampled_users_are_the_same_each_time_and_counted(model, dataset, split, stored):
    first, second = (evaluator(model, dataset, split, stored, 4, users=6) for _ in range(2))
    assert np.array_equal(first.rows, second.rows)
    entry = first.evaluate("favorite_genre")
    assert (entry["n"], entry["N"]) == (6, len(split.examples("test")))


def test_a_repeated_item_can_still_be_found(model, dataset, split, stored, monkeypatch):
    """With seen items excluded the target is not, for the language model as for every other system."""
    items = dataset.events["item"].copy()
    rows = split.examples("test", max_length=8)
    for user, _, stop in rows:
        items[dataset.offsets[user] + stop] = items[dataset.offsets[user]]
    monkeypatch.setitem(dataset.events, "item", items)
    repeated = type(stored)(dataset, stored.collator.vocabulary)
    entry = evaluator(model, dataset, split, repeated, list_length=20, beams=40).evaluate("next_item")
    ranks = []
    for user, start, stop in rows:
        own = items[dataset.offsets[user] :]
        with torch.no_grad():
            users = model.context(repeated.batch([(user, start, stop)]))
        ranks.append(rank(model.all_log_likelihoods("next_item", users), own[stop], set(own[:stop].tolist())))
    assert max(ranks) > 1
    same(entry["user_llm"], as_dicts(ranks))


def test_a_dual_encoder_of_genres_is_a_baseline_of_the_favorite(model, make_encoder, dataset, split, stored):
    dual = make_encoder("dual", max_length=8, label="genres")
    judge = evaluator(model, dataset, split, stored, encoder=dual, list_length=20)
    entry = judge.evaluate("favorite_genre")
    task = model.closed_tasks["favorite_genre"]
    names = stored.collator.vocabulary["genres"].values
    rows = judge.rows
    targets = task.targets(dataset, rows[:, 0], rows[:, 2], split.visible(model.window))
    ranks = []
    for row, target in zip(rows, targets, strict=True):
        if target >= 0:
            with torch.no_grad():
                scores = dual.label_scores(dual(stored.batch(row[None]))[0])[0].tolist()
            ranks.append(rank(scores, names.index(task.answers[target])))
    same(entry["encoder"], as_dicts(ranks))
    assert "encoder" not in judge.evaluate("next_item")
    of_items = evaluator(model, dataset, split, stored, encoder=make_encoder("dual", max_length=8))
    assert "encoder" not in of_items.evaluate("favorite_genre")


def test_invalid_answers_are_counted():
    answers = torch.tensor([[0, 1, 2], [0, 0, 2], [5, 1, -1], [3, -1, -1]])
    possible = torch.tensor([3, 3, 3, 1])
    assert count_invalid(answers, 4, possible) == 0 + 1 + 2 + 0


def test_every_users_rank_is_kept(model, dataset, split, stored):
    judge = evaluator(model, dataset, split, stored, list_length=7, other_user=False)
    assert judge.per_user().is_empty()
    entries = {name: judge.evaluate(name) for name in ("next_item", "favorite_genre")}
    rows = judge.per_user()
    assert "user_llm_shuffled" not in rows["system"].to_list()
    for task, entry in entries.items():
        for system in ("user_llm", "no_user"):
            mine = rows.filter(task=task, system=system)
            assert mine["user"].n_unique() == len(mine) == entry["n"]
            same(entry[system], as_dicts(mine["rank"].to_numpy()))
            mean = mine["log_likelihood"].mean()
            assert entry[system]["log_likelihood"]["value"] == pytest.approx(mean)
    assert set(entries["next_item"]["gain_nats"]) == {"over_no_user"}


def test_smaller_samples_lie_within_larger_ones(model, dataset, split, stored):
    def users(**settings):
        return set(evaluator(model, dataset, split, stored, **settings).rows[:, 0].tolist())

    few, more, everyone = users(users=3), users(users=6), users()
    assert len(few) == 3 and len(more) == 6 < len(everyone)
    assert few < more < everyone
