import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from userllm.errors import UserError
from userllm.evaluation.metrics import sign_flip_p
from userllm.experiments.cells import CellStore
from userllm.experiments.comparison import decide, difference, mean, per_user, ratio
from userllm.experiments.definition import Claim, Side
from userllm.experiments.tables import agreement, spread, verdict_of


@pytest.fixture
def make_cell(tmp_path):
    def make(name, ranks, users=None, seed=0, loglik=-3.0, **columns):
        users = [str(u) for u in (range(len(ranks)) if users is None else users)]
        frame = pl.DataFrame(
            {
                "task": ["next_item"] * len(ranks),
                "user": users,
                "system": ["user_llm"] * len(ranks),
                "rank": np.array(ranks, dtype=np.int32),
                "log_likelihood": [loglik] * len(ranks),
                **columns,
            }
        )
        file = tmp_path / "per_user.parquet"
        frame.write_parquet(file)
        return CellStore(tmp_path).store(f"{name}-{seed}", told_of(seed), file)

    return make


def told_of(seed, kind="next_item", events=50, data="c221a94b"):
    """What these comparisons read of a cell's JSON file."""
    config = {"tasks": {"next_item": {"kind": kind}}, "fusion": {"events": events}}
    return {"settings": {"seed": seed}, "config": config, "metrics": {"dataset": {"fingerprint": data}}}


def test_a_difference_is_of_the_users_that_both_answered_for(make_cell):
    a = per_user([make_cell("a", [1, 0, 3], users=[5, 6, 7])], "next_item", "user_llm", "recall@10")
    b = per_user([make_cell("b", [0, 20, 1], users=[7, 5, 9])], "next_item", "user_llm", "recall@10")
    both = difference(a, b)
    assert both is not None
    assert (both.n, both.estimate.value) == (2, 1.0)
    assert mean(a).n == 3


def test_seeds_are_paired_and_averaged_by_user(make_cell):
    a = [make_cell("a", [1, 0], seed=0), make_cell("a", [1, 1], seed=1)]
    b = [make_cell("b", [0, 0], seed=0), make_cell("b", [1, 0], seed=1)]
    values = [per_user(cells, "next_item", "user_llm", "recall@1") for cells in (a, b)]
    both = difference(*values)
    assert both is not None
    assert (both.n, both.estimate.value) == (2, 0.5)
    assert mean(values[0]).estimate.value == 0.75


def test_every_seed_is_told_apart(make_cell):
    a = [make_cell("a", [1, 1, 0, 0], seed=0), make_cell("a", [1, 0, 0, 0], seed=1)]
    b = [make_cell("b", [0, 0, 0, 0], seed=0), make_cell("b", [0, 1, 0, 1], seed=1)]
    values = [per_user(cells, "next_item", "user_llm", "recall@1") for cells in (a, b)]
    assert mean(values[0]).by_seed == {0: 0.5, 1: 0.25}
    between = difference(*values)
    assert between.by_seed == {0: 0.5, 1: -0.25}
    assert between.estimate.value == pytest.approx(0.125)
    assert between.p == sign_flip_p([1.0, 0.0, 0.0, -0.5])
    assert spread(mean(values[0])) == "0.250 to 0.500 (2)"
    assert spread(mean(per_user(a[:1], "next_item", "user_llm", "recall@1"))) == "–"


def test_a_user_who_was_asked_more_often_counts_once(make_cell):
    """Samples differ by seed: user 1 is in both, users 2 and 3 in one each."""
    cells = [make_cell("a", [1, 0], users=[1, 2]), make_cell("a", [1, 1], users=[1, 3], seed=1)]
    measured = mean(per_user(cells, "next_item", "user_llm", "recall@1"))
    assert (measured.n, measured.estimate.value) == (3, pytest.approx(2 / 3))


def test_a_seed_that_says_the_opposite_is_enough_to_doubt(make_cell):
    worse, same, better = [0] * 60, [1] * 20 + [0] * 40, [1] * 60
    b = [make_cell("b", same, seed=seed) for seed in range(3)]
    agreeing = [make_cell("a", better, seed=seed) for seed in range(3)]
    decided = decide(claim(), {"a": agreeing, "b": b})
    assert (decided.verdict, decided.seeds) == ("confirmed", 3)
    assert agreement(decided) == "3 of 3 (+0.667 to +0.667)"
    doubtful = [*agreeing[:2], make_cell("a", worse, seed=2)]
    decided = decide(claim(), {"a": doubtful, "b": b})
    assert decided.difference.estimate.low > 0
    assert (decided.verdict, decided.seeds) == ("not confirmed", 2)


def test_a_metric_of_texts_is_compared_user_by_user(make_cell):
    texts = {"rank": pl.Series([None] * 3, dtype=pl.Int32)}
    a = [make_cell("a", [0] * 3, rougeLsum=[0.2, 0.5, None], **texts)]
    b = [make_cell("b", [0] * 3, rougeLsum=[0.1, 0.1, 0.4], **texts)]
    of = replace(claim(), metric="rougeLsum")
    decided = decide(of, {"a": a, "b": b})
    assert decided.difference.n == 2
    assert decided.difference.estimate.value == pytest.approx(0.25)
    assert per_user(a, "next_item", "user_llm", "recall@1").is_empty()
    with pytest.raises(UserError, match=r"no metric 'rouge9'; there are recall@1, .*, rougeLsum"):
        decide(replace(of, metric="rouge9"), {"a": a, "b": b})
    assert decide(replace(of, metric="rouge9", task="review"), {"a": a, "b": b}).verdict == "not run"


def test_a_ratio_is_of_means_over_the_users_that_both_answered_for(make_cell):
    a = per_user([make_cell("a", [1, 0, 1, 1], users=[1, 2, 3, 9])], "next_item", "user_llm", "recall@10")
    b = per_user([make_cell("b", [1, 1, 1], users=[1, 2, 3])], "next_item", "user_llm", "recall@10")
    of = ratio(a, b)
    assert of is not None
    assert (of.n, of.estimate.value, of.estimate.high) == (3, pytest.approx(2 / 3), 1.0)
    nothing = per_user([make_cell("c", [0, 0, 0], users=[1, 2, 3])], "next_item", "user_llm", "recall@10")
    assert ratio(a, nothing) is None


@pytest.fixture
def make_labels(tmp_path):
    def make(name, named, seed=0, targets=None):
        targets = (
            [["Drama"], ["Comedy", "Drama"], ["Action"]] * (len(named) // 3) if targets is None else targets
        )
        frame = pl.DataFrame(
            {
                "task": ["genres"] * len(named),
                "user": [str(u) for u in range(len(named))],
                "system": ["user_llm"] * len(named),
                "rank": pl.Series([None] * len(named), dtype=pl.Int32),
                "log_likelihood": [-3.0] * len(named),
                "target": targets,
                "named": pl.Series(named, dtype=pl.List(pl.String)),
            }
        )
        file = tmp_path / "per_user.parquet"
        frame.write_parquet(file)
        return CellStore(tmp_path).store(f"{name}-{seed}", told_of(seed), file)

    return make


def test_weighted_f1_is_of_all_texts_together(make_labels):
    good, poor = [["Drama"], ["Comedy", "Drama"], ["Action"]] * 20, [["Drama"], ["Drama"], ["Drama"]] * 20
    a, b = make_labels("a", good), make_labels("b", poor)
    rows = [per_user([cell], "genres", "user_llm", "f1") for cell in (a, b)]
    assert (mean(rows[0]).n, mean(rows[0]).estimate.value) == (60, 1.0)
    # Drama: precision 2/3, recall 1, half of the 80 labels; the others are never named
    assert mean(rows[1]).estimate.value == pytest.approx(0.5 * 0.8)
    lead = difference(*rows)
    assert lead.estimate.value == pytest.approx(0.6) and 0.4 < lead.estimate.low < lead.estimate.high < 0.8
    assert ratio(*rows) is None
    assert per_user([a], "genres", "user_llm", "recall@1").is_empty()
    assert mean(per_user([a], "genres", "user_llm", "log_likelihood")).estimate.value == -3.0
    told = Claim("text", "UEM", "genres", "f1", Side("a"), Side("b"))
    assert decide(told, {"a": [a], "b": [b]}).verdict == "confirmed"
    assert decide(told, {"a": [a]}).verdict == decide(told, {"b": [b]}).verdict == "not run"


def test_weighted_f1_of_seeds_is_of_their_texts_with_users_drawn_whole(make_labels):
    good, poor = [["Drama"], ["Comedy", "Drama"], ["Action"]] * 20, [["Drama"], [], ["Drama"]] * 20
    seeds = per_user([make_labels("a", good), make_labels("a", poor, seed=1)], "genres", "user_llm", "f1")
    both = mean(seeds)
    # Drama: 60 of 80 rightly, 80 named; Comedy, Action: 20 of 40, 20 named
    assert both.n == 60
    assert both.estimate.value == pytest.approx(0.5 * 2 * 60 / 160 + 0.5 * 2 * 20 / 60)


def claim(**told):
    return Claim("text", "v1 T2", "next_item", "recall@10", Side("a"), Side("b"), **told)


@pytest.mark.parametrize(
    ("a", "b", "told", "verdict"),
    [
        ([1] * 40, [0] * 40, {}, "confirmed"),
        ([1] * 40, [1] * 40, {}, "not confirmed"),
        ([0] * 40, [1] * 40, {}, "not confirmed"),
        ([1] * 400, [1] * 400, {"kind": "within", "margin": 0.01}, "confirmed"),
        (
            [1] * 200,
            [1] * 200,
            {"kind": "within", "margin": 0.01},
            "not confirmed",
        ),  # none of 200 may be 1 in 70
        ([1] * 4 + [0] * 496, [0] * 500, {}, "not confirmed"),  # four users, p = .12
        ([1] * 5 + [0] * 495, [0] * 499 + [1], {}, "not confirmed"),
        ([1] * 20 + [0] * 480, [0] * 500, {}, "confirmed"),
        (
            [1] + [0] * 99,
            [0] * 100,
            {"kind": "within", "margin": 0.01},
            "not confirmed",
        ),  # who wins bounds no loss
        ([1] * 19 + [0], [1] * 20, {"kind": "within", "margin": 0.01}, "not confirmed"),
    ],
)
def test_verdicts(make_cell, a, b, told, verdict):
    decided = decide(claim(**told), {"a": [make_cell("a", a)], "b": [make_cell("b", b, loglik=-4.0)]})
    assert decided.verdict == verdict
    assert decided.nats.estimate.value == 1.0


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"events": 100, "kind": "favorite_category"}, "other numbers of events"),
        ({"data": "another"}, "of other data"),
        ({"events": 100}, None),  # the next item is the next item
    ],
)
def test_cells_with_other_right_answers_are_not_compared(make_cell, other, why):
    a, b = make_cell("a", [1] * 40), make_cell("b", [0] * 40)
    kind = other.get("kind", "next_item")
    a, b = replace(a, told=told_of(0, kind)), replace(b, told=told_of(0, **other))
    if why is None:
        assert decide(claim(), {"a": [a], "b": [b]}).verdict == "confirmed"
        return
    with pytest.raises(UserError, match=rf"a-0.json and b-0.json: cannot be compared.*{why}"):
        decide(claim(), {"a": [a], "b": [b]})


def test_both_sides_are_of_the_users_of_the_difference(make_cell):
    a, b = make_cell("a", [1, 1, 0], users=[1, 2, 3]), make_cell("b", [0, 1, 1, 1], users=[1, 2, 8, 9])
    decided = decide(claim(), {"a": [a], "b": [b]})
    assert (decided.a.estimate.value, decided.b.estimate.value, decided.difference.n) == (1.0, 0.5, 2)


def test_a_claim_about_a_missing_cell_or_system(make_cell):
    cells = {"a": [make_cell("a", [1, 0])]}
    assert decide(claim(), cells).verdict == "not run"
    other = Claim("text", "v1 T2", "next_item", "recall@10", Side("a"), Side("a", "encoder"))
    assert decide(other, cells).verdict == "not run"


def test_stored_cells_are_whole(make_cell, tmp_path):
    cell = make_cell("a-0123456789ab", [1])
    assert json.loads(cell.file.read_text())["format_version"] == 1
    assert CellStore(tmp_path).find("0") is not None  # by the end of its name


@pytest.mark.parametrize(
    ("a", "b", "kind", "says"),
    [
        ([0] * 40, [1] * 40, "above", "not confirmed: the other way round"),
        ([0] * 500, [1] * 4 + [0] * 496, "above", "not confirmed"),  # four users, p = .12
        ([0] * 500, [1] * 20 + [0] * 480, "within", "not confirmed: it loses"),
        ([1] + [0] * 499, [0] * 499 + [1], "within", "not confirmed"),
    ],
)
def test_losing_needs_what_winning_needs(make_cell, a, b, kind, says):
    told = claim(kind=kind, margin=0.001 if kind == "within" else 0.0)
    assert verdict_of(decide(told, {"a": [make_cell("a", a)], "b": [make_cell("b", b)]})) == says


def test_a_seed_that_wins_is_enough_to_doubt_that_it_loses(make_cell):
    worse, better = (
        [make_cell("a", [0] * 60, seed=seed) for seed in range(2)],
        make_cell("a", [1] * 60, seed=2),
    )
    b = [make_cell("b", [1] * 50 + [0] * 10, seed=seed) for seed in range(3)]
    assert decide(claim(), {"a": worse, "b": b}).loses
    decided = decide(claim(), {"a": [*worse, better], "b": b})
    assert decided.difference.estimate.high < 0 and not decided.loses


def test_near_a_row_that_has_learnt_nothing_is_said_to_be_so(make_cell):
    def with_popularity(ranks, popular):
        n = len(ranks)
        systems = ["user_llm"] * n + ["popularity"] * n
        return make_cell("b", ranks + popular, users=[*range(n)] * 2, system=systems)

    a, popular = [make_cell("a", [1] * 400)], [1] * 40 + [0] * 360
    near = claim(kind="within", margin=0.02)
    untaught = decide(near, {"a": a, "b": [with_popularity(popular, popular)]})
    assert (untaught.verdict, untaught.weak) == ("confirmed", "popularity")
    assert verdict_of(untaught) == "confirmed (b is not above popularity)"
    taught = decide(near, {"a": a, "b": [with_popularity([1] * 400, popular)]})
    assert (taught.verdict, taught.weak) == ("confirmed", None)
    assert decide(claim(), {"a": a, "b": [with_popularity(popular, popular)]}).weak is None
