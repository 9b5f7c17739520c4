"""What a number among the settings may be: stated in its type, and checked before any work is done."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import astuple, is_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from userllm.errors import UserError

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
AtLeastTwo = Annotated[int, Ge(2)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
PositiveFraction = Annotated[float, Gt(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]

_BOUNDS: dict[type, tuple[str, Callable[[Any, Any], bool]]] = {
    Ge: ("at least", operator.ge),
    Gt: ("above", operator.gt),
    Le: ("at most", operator.le),
    Lt: ("below", operator.lt),
}


def check_ranges(settings: Any, prefix: str = "") -> None:
    """Raise UserError where a number in a dataclass, or in one within it, is none that its type allows.

    prefix: what stands before the name of the setting in the message.
    """
    for name, hint in _hints(type(settings)).items():
        _check(getattr(settings, name), hint, f"{prefix}{name}")


def range_in_words(hint: Any) -> str:
    """The numbers that a type allows, like "at least 0 and below 1"; "" where it allows all."""
    return " and ".join(f"{_BOUNDS[kind][0]} {limit}" for kind, limit in _bounds(hint))


def _check(value: Any, hint: Any, where: str) -> None:
    if is_dataclass(value):
        check_ranges(value, f"{where}.")
    elif isinstance(value, dict):
        for name, one in value.items():
            _check(one, get_args(hint)[1], f"{where}.{name}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"{where} is {value}; it must be a finite number")
        if not all(_BOUNDS[kind][1](value, limit) for kind, limit in _bounds(hint)):
            raise UserError(f"{where} is {value}; it must be {range_in_words(hint)}")


def _bounds(hint: Any) -> Iterator[tuple[type, Any]]:
    """The bounds of a number: of one that may be null, and of one that stands in a dict, too."""
    if get_origin(hint) is Annotated:
        yield from ((type(one), *astuple(one)) for one in hint.__metadata__ if type(one) in _BOUNDS)
    elif not is_dataclass(hint):
        for one in get_args(hint):
            yield from _bounds(one)


@cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)
