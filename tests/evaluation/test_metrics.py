"""Metrics against two independent implementations, and intervals against what is known of them."""

import doctest
import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, top_k_accuracy_score

from userllm.evaluation import metrics
from userllm.evaluation.metrics import (
    Estimate,
    bootstrap_mean,
    paired_gain,
    ranking_metrics,
    sign_flip_p,
    user_metrics,
)


@pytest.fixture(scope="module")
def scored():
    """Scores of 300 users for 40 items without ties, each user's target, and the target's rank."""
    rng = np.random.default_rng(7)
    scores = rng.permuted(np.tile(np.arange(40.0), (300, 1)), axis=1)
    targets = rng.integers(40, size=300)
    of_target = scores[np.arange(300), targets]
    return scores, targets, 1 + (scores > of_target[:, None]).sum(axis=1)


def test_doctests():
    assert doctest.testmod(metrics).failed == 0


def test_parity_with_scikit_learn(scored):
    scores, targets, ranks = scored
    ours = ranking_metrics(ranks, resamples=10)
    for k in (1, 5, 10):
        theirs = top_k_accuracy_score(targets, scores, k=k, labels=np.arange(40))
        assert ours[f"recall@{k}"].value == pytest.approx(theirs, abs=1e-12)
    relevant = np.eye(40)[targets]
    assert ours["ndcg@10"].value == pytest.approx(float(ndcg_score(relevant, scores, k=10)), abs=1e-12)
    whole_list = ranking_metrics(ranks, ks=(40,), resamples=10)["mrr"]
    assert whole_list.value == pytest.approx(
        label_ranking_average_precision_score(relevant, scores), abs=1e-12
    )


@pytest.mark.slow  # ranx compiles for a minute before its first number
def test_parity_with_ranx(scored):
    from ranx import Qrels, Run, evaluate

    scores, targets, ranks = scored
    qrels = Qrels({f"u{user}": {f"i{item}": 1} for user, item in enumerate(targets)})
    run = Run(
        {
            f"u{user}": {f"i{item}": s for item, s in enumerate(row)}
            for user, row in enumerate(scores.tolist())
        }
    )
    names = {
        "recall@1": "recall@1",
        "recall@5": "recall@5",
        "recall@10": "recall@10",
        "ndcg@10": "ndcg@10",
        "mrr": "mrr@10",
    }
    theirs = evaluate(qrels, run, list(names.values()))
    assert isinstance(theirs, dict)
    ours = ranking_metrics(ranks, resamples=10)
    for name, theirs_name in names.items():
        assert ours[name].value == pytest.approx(theirs[theirs_name], abs=1e-9), name


def test_names_are_those_of_metrics_json():
    assert list(ranking_metrics([1, 0], resamples=10)) == [
        "recall@1",
        "recall@5",
        "recall@10",
        "ndcg@10",
        "mrr",
    ]
    assert list(ranking_metrics([1, 0], ks=(1, 20), resamples=10)) == [
        "recall@1",
        "recall@20",
        "ndcg@20",
        "mrr",
    ]


def test_a_short_list_and_the_full_ranking_agree(scored):
    ranks = scored[2]
    cut = np.where(ranks <= 10, ranks, 0)
    assert ranking_metrics(ranks) == ranking_metrics(cut)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=50))
def test_order_of_metrics(ranks):
    values = {name: per_user.mean() for name, per_user in user_metrics(ranks).items()}
    assert 0 <= values["recall@1"] <= values["recall@5"] <= values["recall@10"] <= 1
    assert values["recall@1"] <= values["mrr"] <= values["ndcg@10"] <= values["recall@10"]


def test_metric_intervals_are_those_of_the_per_user_values(scored):
    ranks = scored[2]
    for name, values in user_metrics(ranks).items():
        assert ranking_metrics(ranks)[name] == bootstrap_mean(values), name


def test_interval_is_deterministic_and_depends_on_the_seed():
    values = np.random.default_rng(0).normal(size=500)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values) != bootstrap_mean(values, seed=1)


def test_interval_does_not_depend_on_the_block_size(monkeypatch):
    values = np.random.default_rng(0).normal(size=64)
    whole = bootstrap_mean(values, resamples=300)
    monkeypatch.setattr(metrics, "_DRAWS_AT_A_TIME", 64 * 7)
    assert bootstrap_mean(values, resamples=300) == whole


def test_interval_is_close_to_the_normal_one():
    values = np.random.default_rng(3).normal(loc=2.0, size=4000)
    estimate = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert estimate.value == values.mean()
    assert estimate.low == pytest.approx(values.mean() - half, abs=half * 0.1)
    assert estimate.high == pytest.approx(values.mean() + half, abs=half * 0.1)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    covered = [
        e.low <= 0.3 <= e.high
        for e in (bootstrap_mean(rng.random(300) < 0.3, resamples=400) for _ in range(300))
    ]
    assert 0.91 <= np.mean(covered) <= 0.98


def test_pairing_cancels_what_both_share():
    rng = np.random.default_rng(1)
    hard = rng.normal(scale=3, size=600)
    a, b = hard + 0.2 + rng.normal(scale=0.3, size=600), hard + rng.normal(scale=0.3, size=600)
    gain = paired_gain(a, b)
    assert gain.low > 0
    assert gain.high - gain.low < 0.1
    assert not bootstrap_mean(a).above(bootstrap_mean(b))
    assert paired_gain(b, a).value == pytest.approx(-gain.value)


def test_p_is_the_share_of_sign_patterns_that_go_as_far():
    differences = np.array([0.5, 1.0, -0.25, 2.0, 0.75, 0.0, 1.5, -0.5])
    every = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    exact = (abs(every @ differences) >= abs(differences.sum())).mean()
    assert sign_flip_p(differences, flips=20_000) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(-differences) == sign_flip_p(differences)


def test_p_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(2)
    found = np.array([sign_flip_p(rng.normal(size=40), flips=199, seed=n) for n in range(400)])
    assert abs((found <= 0.1).mean() - 0.1) < 0.04 and abs((found <= 0.5).mean() - 0.5) < 0.07


def test_p_does_not_depend_on_the_block_size(monkeypatch):
    values = np.random.default_rng(0).normal(0.2, 1, size=50)
    whole = sign_flip_p(values)
    monkeypatch.setattr(metrics, "_DRAWS_AT_A_TIME", 500)
    assert sign_flip_p(values) == pytest.approx(whole, abs=0.03)
    with pytest.raises(ValueError, match="finite"):
        sign_flip_p([1.0, np.nan])


def test_above_is_strict():
    assert Estimate(0.5, 0.4, 0.6).above(Estimate(0.3, 0.2, 0.39))
    assert not Estimate(0.5, 0.4, 0.6).above(Estimate(0.3, 0.2, 0.4))


def test_as_dict():
    assert Estimate(0.5, 0.4, 0.6).as_dict() == {"value": 0.5, "low": 0.4, "high": 0.6}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([]), "no users"),
        (lambda: bootstrap_mean([[1.0]]), "one number per user"),
        (lambda: bootstrap_mean([0.0, float("nan")]), "finite"),
        (lambda: paired_gain([0.0, -np.inf], [0.0, 0.0]), "finite"),
        (lambda: paired_gain([1.0], [1.0, 2.0]), "same users"),
        (lambda: ranking_metrics(np.array([], dtype=int)), "no users"),
        (lambda: ranking_metrics([-1]), "1 or more"),
        (lambda: ranking_metrics([1.0]), "integer"),
        (lambda: ranking_metrics([1], ks=(0,)), "cut-offs"),
        (lambda: ranking_metrics([1], ks=()), "cut-offs"),
    ],
)
def test_what_has_no_answer_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_whole_catalogue_of_users_is_fast_and_small():
    ranks = np.random.default_rng(0).integers(0, 30, size=6000)
    start = time.process_time()
    bootstrap_mean(ranks)
    seconds = time.process_time() - start
    tracemalloc.start()
    ranking_metrics(ranks)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 32e6
