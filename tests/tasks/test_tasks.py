"""Who should get which answer, counted anew in plain Python; and distinct texts."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userllm.data.titles import distinct_titles
from userllm.errors import UserError
from userllm.tasks import FavoriteCategory, GenrePreference, NextItem, TaskConfig, build_task


def examples(dataset):
    return np.array([(u, e) for u in range(dataset.num_users) for e in range(1, dataset.lengths[u])]).T


def test_next_item_is_the_event_at_the_position(dataset):
    task = NextItem("next", TaskConfig(), dataset.items)
    users, ends = examples(dataset)
    for user, end, target in zip(users, ends, task.targets(dataset, users, ends, 5), strict=True):
        assert dataset.items["id"][int(target)] == dataset.history(user, end, end + 1).events[0].item


@pytest.mark.parametrize("window", [1, 3, 50])
def test_favorite_category_is_the_most_frequent_value_the_first_in_the_alphabet_wins(dataset, window):
    task = build_task("genre", TaskConfig(kind="favorite_category"), dataset.items)
    assert task.answers == ["Action", "Comedy", "Drama", "Sci-Fi"]
    users, ends = examples(dataset)
    genres = dict(zip(dataset.items["id"], dataset.items["genres"].to_list(), strict=True))
    unanswered = ties = 0
    for user, end, target in zip(users, ends, task.targets(dataset, users, ends, window), strict=True):
        seen = dataset.history(user, max(0, end - window), end).events
        counts = Counter(genre for event in seen for genre in genres[event.item])
        if not counts:
            assert target == -1
            unanswered += 1
            continue
        best = sorted(genre for genre in counts if counts[genre] == max(counts.values()))
        ties += len(best) > 1
        assert task.answers[target] == best[0]
    assert ties
    assert unanswered or window > 1
    assert "first in alphabetical order" in (task.tie_rule or "")
    windows = np.arange(len(users)) % 4
    each = [
        int(task.targets(dataset, u[None], e[None], int(w))[0])
        for u, e, w in zip(users, ends, windows, strict=True)
    ]
    assert task.targets(dataset, users, ends, windows).tolist() == each
    assert task.targets(dataset, users[:0], ends[:0], window).tolist() == []


def test_favorite_category_where_nothing_has_one(dataset):
    items = dataset.items.with_columns(studio=pl.lit(None, pl.String))
    with pytest.raises(UserError, match="task studio: no item has a studio"):
        FavoriteCategory("studio", TaskConfig(kind="favorite_category", field="studio"), items)


def test_favorite_category_of_a_single_valued_field(dataset):
    items = dataset.items.with_columns(studio=pl.Series(["B", "A", None, "C"] * 5))
    task = FavoriteCategory("studio", TaskConfig(kind="favorite_category", field="studio"), items)
    assert task.answers == ["A", "B", "C"]
    users, ends = examples(dataset)
    item = dataset.events["item"][dataset.offsets[users] + ends - 1]
    expected = [task.answers.index(v) if (v := items["studio"][int(i)]) else -1 for i in item]
    assert task.targets(dataset, users, ends, 1).tolist() == expected


@pytest.mark.parametrize("dtype", [pl.Int32, pl.Float64])
def test_numbers_are_answers_as_texts_in_their_order(dataset, dtype):
    """The order of the encoder's vocabulary, by which the exact answer is counted."""
    items = dataset.items.with_columns(hall=pl.Series([10, 9, None, 2] * 5, dtype=dtype))
    task = build_task("hall", TaskConfig(kind="favorite_category", field="hall"), items)
    assert isinstance(task, FavoriteCategory) and task.answers == ["2", "9", "10"]
    liked = build_task("hall", TaskConfig(kind="genre_preference", field="hall"), items)
    assert isinstance(liked, GenrePreference) and liked.read("9, 2")[0].sum() == 2


def test_next_item_answers_are_distinct_and_in_catalogue_order(dataset):
    answers = NextItem("next", TaskConfig(), dataset.items).answers
    assert answers[5:8] == ["The Mask (1994)", "The Mask (1994) [2]", "The Mask"]
    assert len(set(answers)) == dataset.num_items


@given(st.lists(st.sampled_from(["A", "B", "A [2]", "A [3]", "A [2] [2]", ""]), max_size=12))
def test_distinct_titles(titles):
    texts = distinct_titles(titles)
    assert len(set(texts)) == len(titles)
    first = {}
    for title, text in zip(titles, texts, strict=True):
        assert text.startswith(title)
        if title not in first:  # the first item of a title keeps it
            assert text == title
            first[title] = text
    assert distinct_titles(titles) == texts


def test_settings_that_cannot_be_are_named(dataset):
    with pytest.raises(UserError, match=r"task t: items have no field 'mood'; they have .*genres"):
        build_task("t", TaskConfig(kind="favorite_category", field="mood"), dataset.items)
    with pytest.raises(UserError, match="task t: teacher"):
        build_task("t", TaskConfig(kind="favorite_category", teacher=0.5), dataset.items)
    for teacher in (-0.1, 1.1):
        with pytest.raises(UserError, match="task t: teacher"):
            build_task("t", TaskConfig(teacher=teacher), dataset.items)


@pytest.mark.parametrize("value", ["Books, Comics", "Acme Inc.", "a;b", " wide"])
def test_a_label_that_no_text_could_name_is_refused(dataset, value):
    """Labels are written with commas between them, and read back without a full stop."""
    items = dataset.items.with_columns(pl.Series("genres", [[value]] * len(dataset.items)))
    with pytest.raises(UserError, match="give this one another name"):
        build_task("genres", TaskConfig(kind="genre_preference", field="genres"), items)
