"""What a review task asks, of whom, and what could be copied."""

import numpy as np
import polars as pl
import pytest

from userllm.data.store import FieldSpec, Source, write_dataset
from userllm.errors import UserError
from userllm.tasks import OpenTask, TaskConfig, TextExample, build_task

EVENTS = [  # user, item, rating, body
    (0, 0, 5, "Good\n film. "), (0, 1, 2.5, ""), (0, 0, 4, "Again {title}!"),
    (1, 1, 1, ""), (1, 0, 3, "So, so"),
]  # fmt: skip


@pytest.fixture
def shop(tmp_path):
    events = pl.DataFrame(EVENTS, schema=["user", "item", "rating", "body"], orient="row", strict=False)
    return write_dataset(
        tmp_path / "shop",
        events.with_row_index("time"),
        pl.DataFrame(
            {"id": ["a", "b"], "title": ["Heat {1995}", "M"], "genres": [["Crime", "Drama"], []], "year": [1995, 1931]}
        ),
        pl.DataFrame({"id": ["u", "v"]}),
        name="shop",
        source=Source("made", "a test", "none", "0" * 64, "path"),
        fields=[
            FieldSpec("item", "event", "single"),
            FieldSpec("rating", "event", "single"),
            FieldSpec("body", "event", "text"),
            FieldSpec("genres", "item", "multi"),
            FieldSpec("year", "item", "single"),
            FieldSpec("title", "item", "text"),
        ],
    )  # fmt: skip


def review(shop, prompt="Review {title} ({genres}, {year}), {rating}:", target="body"):
    task = build_task("review", TaskConfig(kind="review", prompt=prompt, target=target), shop.items)
    assert isinstance(task, OpenTask)
    return task


def ask(task, shop):
    return task.examples(shop, np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 1]), 9)


def test_prompts_tell_of_the_event_that_is_written_about(shop):
    assert ask(review(shop), shop) == [
        TextExample("Review Heat {1995} (Crime, Drama, 1995), 5:", "Good film."),
        None,
        TextExample("Review Heat {1995} (Crime, Drama, 1995), 4:", "Again {title}!"),
        None,
        TextExample("Review Heat {1995} (Crime, Drama, 1995), 3:", "So, so"),
    ]


def test_a_prompt_says_how_a_number_is_written(shop):
    [first, *_] = ask(review(shop, "{rating:.1f} {year:,} {title!r} {title:>12} {{so}}:"), shop)
    assert first is not None and first.prompt == "5.0 1,995 'Heat {1995}'  Heat {1995} {so}:"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("About {title", r"prompt 'About \{title': .*; write \{\{ for a plain \{"),
        ("About }", r"prompt 'About \}': .*; write"),
        ("{title:.1f}", r"task review: prompt: \{title\} cannot be written as '\.1f'"),
        ("{rating!x}", r"task review: prompt: \{rating\} cannot be written as"),
    ],
)
def test_a_prompt_that_cannot_be_filled_in(shop, prompt, message):
    with pytest.raises(UserError, match=message):
        ask(review(shop, prompt), shop)


@pytest.mark.parametrize("place", ["{year}", "{year:04d}", "{year!r:>8}"])
def test_what_an_item_lacks_reads_unknown(shop, place):
    items = shop.items.with_columns(pl.when(pl.col("id") == "b").then("year").alias("year"))
    task = build_task("review", TaskConfig(kind="review", prompt=f"Film of {place}:", target="body"), items)
    assert isinstance(task, OpenTask)
    asked = ask(task, shop)[0]
    assert asked is not None and asked.prompt == "Film of unknown:"


def test_the_text_written_last_can_be_copied(shop):
    copied = review(shop).copied(shop, np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 1, 2]))
    assert copied == ["", "Good film.", "Good film.", "", "So, so"]


def test_what_the_data_lack_is_named(shop):
    with pytest.raises(
        UserError, match=r"task review: prompt: no \{actor\}; there are .*\{title\}.*\{rating\}"
    ):
        ask(review(shop, "By {actor}"), shop)
    with pytest.raises(UserError, match="no text field 'text'; text fields: body"):
        ask(review(shop, target="text"), shop)
    with pytest.raises(UserError, match=r"teacher is 0\.5"):
        build_task("review", TaskConfig(kind="review", teacher=0.5), shop.items)
