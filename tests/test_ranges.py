"""Numbers out of range are named before any work is done."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from userllm.cli.configuration import load_config
from userllm.config import RunConfig
from userllm.encoders import EncoderConfig
from userllm.errors import UserError
from userllm.ranges import (
    BelowOne,
    NonNegativeFloat,
    PositiveFraction,
    PositiveInt,
    check_ranges,
    range_in_words,
)

ANY_NUMBER = {"tasks.NAME.liked"}  # on the scale of the data's own ratings


def numbers(owner: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, what it may be) of every number among the settings."""
    for name, hint in get_type_hints(owner, include_extras=True).items():
        kinds = [one for one in (hint, *get_args(hint)) if isinstance(one, type) and is_dataclass(one)]
        for kind in kinds:
            yield from numbers(kind, f"{prefix}{name}." + ("NAME." if "dict" in str(hint) else ""))
        plain = {part for part in (hint, *get_args(hint)) if part in (int, float)}
        if plain or range_in_words(hint):
            yield f"{prefix}{name}", range_in_words(hint)


def test_every_number_among_the_settings_has_a_range():
    settings = dict(numbers(RunConfig))
    assert {name for name, allowed in settings.items() if not allowed} == ANY_NUMBER
    assert settings["encoder.layers"] == settings["fusion.perceiver.layers"] == "at least 1"
    assert settings["encoder.field_weights"] == "at least 0"
    for kind in get_args(EncoderConfig):
        assert all(allowed for _, allowed in numbers(kind)), kind


@dataclass
class Inner:
    share: PositiveFraction = 0.5
    weights: dict[str, NonNegativeFloat] = field(default_factory=dict)


@dataclass
class Outer:
    count: PositiveInt | None = None
    dropout: BelowOne = 0.0
    on: bool = False
    inner: Inner | None = None
    named: dict[str, Inner] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (Outer(count=0), "count is 0; it must be at least 1"),
        (Outer(dropout=1.0), "dropout is 1.0; it must be at least 0 and below 1"),
        (Outer(dropout=-1e-9), "dropout is -1e-09; it must be at least 0 and below 1"),
        (Outer(dropout=math.nan), "dropout is nan; it must be a finite number"),
        (Outer(inner=Inner(share=0)), "inner.share is 0; it must be above 0 and at most 1"),
        (Outer(inner=Inner(share=1.5)), "inner.share is 1.5; it must be above 0 and at most 1"),
        (Outer(inner=Inner(weights={"item": -2.0})), "inner.weights.item is -2.0; it must be at least 0"),
        (Outer(named={"a": Inner(), "b": Inner(share=-1)}), "named.b.share is -1; it must be above 0 and at most 1"),
    ],
)  # fmt: skip
def test_what_lies_outside_is_named(settings: Any, problem: str):
    with pytest.raises(UserError) as raised:
        check_ranges(settings)
    assert str(raised.value) == problem


@pytest.mark.parametrize(
    "settings",
    [
        Outer(),
        Outer(count=1, inner=Inner(share=1, weights={"item": 0.0})),
        Outer(named={"a": Inner(share=1e-9)}),
    ],
)
def test_what_lies_on_the_edge_is_allowed(settings: Outer):
    check_ranges(settings)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("contextualize.steps=0", "contextualize.steps is 0; it must be at least 1"),
        ("evaluation.batch=0", "evaluation.batch is 0; it must be at least 1"),
        ("encoder.width=-4", "encoder.width is -4; it must be at least 1"),
        ("encoder.heads=0", "encoder.heads is 0; it must be at least 1"),
        ("seed=-1", "seed is -1; it must be at least 0"),
        ("evaluation.users=1", "evaluation.users is 1; it must be at least 2"),
        ("pretrain.seconds=.inf", "pretrain.seconds is inf; it must be a finite number"),
        ("tasks.next_item.weight=0", "tasks: give at least one task with a weight above 0"),
        ("tasks={}", "tasks: give at least one task with a weight above 0"),
        ("data.fields=[rating, item]", "give the item first, and every field once"),
        ("data.fields=[item, rating, item]", "give the item first, and every field once"),
    ],
)
def test_a_configuration_says_it_at_once(override: str, problem: str):
    with pytest.raises(UserError, match="configuration: ") as raised:
        load_config(None, [override])
    assert problem in str(raised.value)
