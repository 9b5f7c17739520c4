import numpy as np
import polars as pl
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from userllm.errors import UserError
from userllm.evaluation.labels import LabelCounts, LabelScores, weighted_f1, weighted_scores
from userllm.tasks import GenrePreference, TaskConfig, build_task

CONFIG = TaskConfig(kind="genre_preference", prompt="Which genres does this user like?")


@pytest.fixture
def task(dataset):
    built = build_task("genres", CONFIG, dataset.items)
    assert isinstance(built, GenrePreference)
    return built


def by_hand(dataset, user, end, liked=4.0, share=0.25, history=200):
    events = dataset.history(user, max(0, end - history), end).events
    genres = dict(zip(dataset.items["id"], dataset.items["genres"], strict=True))
    good = [genres[e.item] for e in events if e.fields["rating"] >= liked]
    counts = {g: sum(g in one for one in good) for g in sorted({g for one in good for g in one})}
    preferred = [g for g, n in counts.items() if n >= share * len(good)]
    return ", ".join(sorted(preferred, key=lambda g: (-counts[g], g)))


@pytest.mark.parametrize("settings", [{}, {"share": 0.6}, {"liked": 5.0}, {"history": 3}])
def test_the_target_follows_the_rule(dataset, settings):
    from dataclasses import replace

    task = build_task("genres", replace(CONFIG, **settings), dataset.items)
    users = np.repeat(np.arange(24), 3)
    ends = np.concatenate([[n, n // 2, 0] for n in dataset.lengths])
    found = task.examples(dataset, users, ends, 5)
    expected = [by_hand(dataset, int(u), int(e), **settings) for u, e in zip(users, ends, strict=True)]
    assert [None if e is None else e.target for e in found] == [text or None for text in expected]
    assert len(set(expected)) > 5
    assert {e.prompt for e in found if e is not None} == {CONFIG.prompt}
    other = task.examples(dataset, users, ends, np.full(len(users), 1))
    assert other == found  # the target is the same however many events the model sees


def test_texts_are_read(task):
    assert task.values == ["Action", "Comedy", "Drama", "Sci-Fi"]
    for text, named, unknown in [
        ("Comedy, Drama", [1, 2], 0),
        ("  drama ,COMEDY.", [1, 2], 0),
        ("Comedy, Comedy; Sci-Fi\nAction", [0, 1, 3], 0),
        ("Comedy and Drama", [], 1),
        ("Heat (1995), Drama, ,", [2], 1),
        ("", [], 0),
    ]:
        found, strange = task.read(text)
        assert (np.flatnonzero(found).tolist(), strange) == (named, unknown), text


def test_weighted_scores_are_scikit_learns_with_intervals_around_them():
    rng = np.random.default_rng(0)
    true, named = rng.random((200, 4)) < [0.7, 0.4, 0.1, 0.0], rng.random((200, 4)) < [0.6, 0.5, 0.2, 0.1]
    found = weighted_scores(true, named)
    for name, function in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        estimate = found[name]
        assert estimate.value == pytest.approx(function(true, named, average="weighted", zero_division=0))
        assert estimate.low < estimate.value < estimate.high and estimate.high - estimate.low < 0.2
    draws = np.random.default_rng(1).integers(200, size=(300, 200))
    resampled = [f1_score(true[d], named[d], average="weighted", zero_division=0) for d in draws]
    assert found["f1"].low == pytest.approx(np.quantile(resampled, 0.025), abs=0.02)
    assert found["f1"].high == pytest.approx(np.quantile(resampled, 0.975), abs=0.02)
    perfect = weighted_scores(true, true)
    assert [tuple(vars(e).values()) for e in perfect.values()] == [pytest.approx((1, 1, 1))] * 3


def test_a_single_label_is_not_two_classes():
    items = pl.DataFrame({"id": ["a"], "title": ["A"], "genres": [["X"]]})
    task = build_task("g", TaskConfig(kind="genre_preference"), items)
    assert isinstance(task, GenrePreference)
    scores, targets, texts = LabelScores(task), ["X", "X", "X", ""], ["X", "X", "", "X"]
    third = pytest.approx(2 / 3)
    assert scores.table(targets, texts) == {
        "X": {"precision": third, "recall": third, "f1": third, "support": 3, "named": 3}
    }
    found = scores(targets, texts)
    assert [found[name].value for name in ("precision", "recall", "f1")] == [third] * 3


def test_a_lead_in_weighted_f1_is_of_the_same_users_with_their_texts_added_up():
    rng = np.random.default_rng(0)
    true = rng.random((300, 3)) < [0.7, 0.4, 0.1]
    good, poor = true ^ (rng.random((300, 3)) < 0.1), true ^ (rng.random((300, 3)) < 0.3)
    by_name = [[["a", "b", "c"][n] for n in np.flatnonzero(row)] for row in true]
    said = [
        [[*"abc"][n] for n in np.flatnonzero(row)] + ["z"] for row in good
    ]  # no target has a z: it weighs nothing
    users = np.arange(300)
    alone = weighted_f1(LabelCounts.of_names(by_name, said, users))
    assert alone.value == pytest.approx(f1_score(true, good, average="weighted"))
    a, b = LabelCounts.of(true, good), LabelCounts.of(true, poor)
    lead, other = weighted_f1(a, b), weighted_f1(b)
    assert lead.value == pytest.approx(alone.value - other.value)
    apart = ((alone.high - alone.low) ** 2 + (other.high - other.low) ** 2) ** 0.5
    assert 0 < lead.low < lead.value < lead.high and lead.high - lead.low < apart
    two = weighted_f1(LabelCounts.of_names(by_name, said, users // 2))
    assert (
        two.value == pytest.approx(alone.value) and two.low != alone.low
    )  # pairs of texts are drawn together


def test_measures_table_and_baselines(task):
    targets = ["Drama", "Comedy, Drama", "Drama, Action", "Sci-Fi"]
    texts = ["Drama", "Comedy", "Action, Drama", "Western"]
    scores = LabelScores(task)
    found = scores(targets, texts)
    assert found["user_f1"].tolist() == pytest.approx([1, 2 / 3, 1, 0])
    assert found["unknown_words"].tolist() == [0, 0, 0, 1] and found["labels"].tolist() == [1, 1, 2, 0]
    table = scores.table(targets, texts)
    assert table["Drama"] == {
        "precision": 1.0,
        "recall": pytest.approx(2 / 3),
        "f1": 0.8,
        "support": 3,
        "named": 2,
    }
    assert table["Sci-Fi"]["f1"] == 0 and table["Comedy"]["f1"] == 1
    assert scores.names(texts) == [["Drama"], ["Comedy"], ["Action", "Drama"], []]
    constant = scores.constants(["Drama", "Drama", "Comedy, Drama"])
    assert constant == {"majority": "Drama", "every_label": "Action, Comedy, Drama, Sci-Fi"}
    assert scores(targets, [constant["majority"]] * 4)["recall"].value == pytest.approx(3 / 6)
    assert scores(targets, [constant["every_label"]] * 4)["recall"].value == 1
    assert task.majority(["b", "a", "b", "a"]) == "a"


def test_one_clear_error(dataset):
    with pytest.raises(UserError, match="items have no field 'mood'"):
        build_task("g", TaskConfig(kind="genre_preference", field="mood"), dataset.items)
    with pytest.raises(UserError, match=r"share is in 0\.\.1"):
        build_task("g", TaskConfig(kind="genre_preference", share=0.0), dataset.items)
    single = pl.DataFrame({"id": ["a"], "title": ["A"], "genres": [["X"]], "category": ["dress"]})
    assert build_task("g", TaskConfig(kind="genre_preference", field="category"), single).values == ["dress"]
