"""``a.b=c``: one setting of a nested table."""

from __future__ import annotations

from typing import Any

import yaml

from userllm.errors import UserError


def override(base: dict[str, Any], text: str) -> None:
    """Set ``a.b=c`` in nested plain values; c is read as YAML. Raises UserError for any other text."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"override {text!r} is not of the form a.b=c")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: the value is not YAML; quote it") from error
    *parents, last = path.split(".")
    for key in parents:
        if not isinstance(base.get(key), dict):
            base[key] = {}
        base = base[key]
    base[last] = parsed
