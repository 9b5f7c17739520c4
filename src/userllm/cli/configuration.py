"""A YAML file and ``a.b=c`` overrides -> a checked ``RunConfig``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from userllm.config import RunConfig
from userllm.encoders import AutoregressiveConfig, EncoderConfig, encoder_config_class
from userllm.errors import UserError
from userllm.overrides import override, read_yaml
from userllm.ranges import range_in_words


def load_config(file: Path | str | None, overrides: Sequence[str] = ()) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration and its plain values, defaults included.

    file: YAML; None: defaults alone. overrides: ``"a.b=c"``, the value read as YAML, so null, lists and numbers work.
    Raises UserError for a missing file, an unknown key, a value of the wrong type, or settings that contradict.
    """
    base = {} if file is None else _read(Path(file))
    for text in overrides:
        override(base, text)
    config = checked_config(base, str(file or "configuration"))
    return config, _plain(config)


def checked_config(base: dict[str, Any], where: str) -> RunConfig:
    """The configuration that plain values are. where: what stands before the problem in a message.

    Raises UserError as ``load_config`` does.
    """
    encoder = _encoder_class(base, f"{where}: ")
    _check_groups(base, RunConfig, where)
    built = _built(_run_parser(encoder), base, where)
    try:
        return RunConfig(**{name: built[name] for name in RunConfig.__dataclass_fields__})
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


@cache
def _run_parser(encoder: type[EncoderConfig]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, prog="config")
    parser.add_class_arguments(RunConfig, skip={"encoder"})
    parser.add_class_arguments(encoder, "encoder")
    return parser


@cache
def _group_parser(group: type, path: str) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, prog="config")
    parser.add_class_arguments(group, path)
    return parser


def _built(parser: ArgumentParser, values: dict[str, Any], where: str, group: str = "") -> Namespace:
    """Plain values as what the parser makes of them. Raises UserError; what a group says of itself names the group."""
    try:
        return parser.instantiate(Namespace(parser.parse_object(values)))
    except (argparse.ArgumentError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: {reason[:400]}") from error
    except UserError as error:
        raise UserError(f"{where}: {group}{error}") from error


def _check_groups(given: dict[str, Any], owner: type, where: str, prefix: str = "") -> None:
    """Raise UserError where a single value stands for a whole group of settings, and for what is wrong within a group
    that may be null.

    Such a group is parsed by itself, the innermost first: of a union the parser names every branch, and the true
    problem is lost among them.
    """
    hints = get_type_hints(owner)
    for name, value in given.items():
        branches = get_args(hints.get(name))
        groups = [one for one in (hints.get(name), *branches) if isinstance(one, type) and is_dataclass(one)]
        if not groups or value is None:
            continue
        path, optional = f"{prefix}{name}", type(None) in branches
        if get_origin(hints[name]) is dict:  # groups by name
            for key, one in value.items() if isinstance(value, dict) else ():
                if isinstance(one, dict):
                    _check_groups(one, groups[0], where, f"{path}.{key}.")
            continue
        if not isinstance(value, dict):
            null = ", or null" if optional else ""
            raise UserError(
                f"{where}: {path} is a group of settings, not {value!r}; set one of them ({path}.x=...){null}"
            )
        # an encoder's kinds, which have no groups in them; the kind that is meant is known
        if len(groups) > 1:
            continue
        _check_groups(value, groups[0], where, f"{path}.")
        if optional:
            for part in reversed(path.split(".")):
                value = {part: value}
            _built(_group_parser(groups[0], path), value, where, f"{path}: ")


def _encoder_class(base: dict[str, Any], where: str) -> type[EncoderConfig]:
    """What the encoder's group is parsed by. Raises UserError for an unknown kind, or another kind's settings."""
    given = base.get("encoder")
    if not isinstance(given, dict):  # what is wrong with it is said where groups are looked at
        return AutoregressiveConfig
    try:
        chosen = encoder_config_class(({"kind": AutoregressiveConfig.kind} | given)["kind"])
    except UserError as error:
        raise UserError(f"{where}{error}") from error
    for name in given:
        others = [kind for kind in get_args(EncoderConfig) if name in kind.__dataclass_fields__]
        if others and chosen not in others:
            kinds = " or ".join(one.kind for one in others)
            raise UserError(
                f"{where}encoder.{name} is a setting of encoder.kind={kinds}; this encoder is {chosen.kind}"
            )
    return chosen


def _read(file: Path) -> dict[str, Any]:
    base = read_yaml(file, "configuration file")
    if base is None:
        return {}
    if not isinstance(base, dict):
        raise UserError(f"{file}: a configuration is a table of settings, this is a {type(base).__name__}")
    return base


def _plain(value: Any) -> Any:
    """Dataclasses and paths as what YAML and JSON can hold."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def describe_settings(group: Any = None, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, default, meaning) of every setting in a configuration (None: ``RunConfig()``); a group's default is "".

    Where a group is of one of several kinds, the default kind's settings come first, then the others', whose names say
    so: ``encoder.layers (kind: bert4rec)``.
    """
    from docstring_parser import parse_from_object

    group = RunConfig() if group is None else group
    types = get_type_hints(type(group), include_extras=True)
    meanings = {
        p.arg_name: " ".join((p.description or "").split())
        for owner in type(group).__mro__[:-1]
        for p in parse_from_object(owner).params
    }
    for name in types:
        default = getattr(group, name)
        allowed = range_in_words(types[name])
        meaning = meanings.get(name, "") + (f" ({allowed})" if allowed else "")
        groups = [one for one in (types[name], *get_args(types[name])) if _is_group(one)]
        inner = groups[0] if groups else None
        if meaning or inner is None:
            shown = "" if inner is not None and default is not None else json.dumps(_plain(default))
            yield f"{prefix}{name}", shown, meaning
        if isinstance(default, dict) and inner is not None:
            yield from describe_settings(inner(), f"{prefix}{name}.NAME.")
        elif inner is not None:
            shown_group = default or inner()
            yield from describe_settings(shown_group, f"{prefix}{name}.")
            for other in groups:
                if not isinstance(shown_group, other):
                    for setting, value, text in describe_settings(other(), f"{prefix}{name}."):
                        yield f"{setting} (kind: {other.kind})", value, text


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)
