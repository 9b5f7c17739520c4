"""A YAML file and ``a.b=c`` overrides -> a checked ``RunConfig``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from userllm.config import RunConfig
from userllm.errors import UserError


def load_config(file: Path | None, overrides: Sequence[str] = ()) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration and its plain values, defaults included.

    Raises UserError for a missing file, an unknown key or a value of the wrong type.
    """
    parser = ArgumentParser(exit_on_error=False, prog="config")
    parser.add_class_arguments(RunConfig)
    try:
        base: dict[str, Any] = {}
        if file is not None:
            if not file.is_file():
                raise UserError(f"{file}: no such configuration file")
            base = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        for text in overrides:
            _override(base, text)
        parsed = parser.parse_object(base)
    except (argparse.ArgumentError, yaml.YAMLError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file or 'configuration'}: {reason[:400]}") from error
    values = Namespace(parsed)
    built = parser.instantiate(values)
    config = RunConfig(**{name: built[name] for name in RunConfig.__dataclass_fields__})
    return config, yaml.safe_load(parser.dump(values, format="yaml", skip_none=False, skip_default=False))


def _override(base: dict[str, Any], text: str) -> None:
    """Set ``a.b=c`` in nested plain values; the value is read as YAML, so null, lists and numbers work."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"override {text!r} is not of the form a.b=c")
    *parents, last = path.split(".")
    for key in parents:
        if not isinstance(base.get(key), dict):
            base[key] = {}
        base = base[key]
    base[last] = yaml.safe_load(value)
