"""Settings as people write them: a YAML file, and ``a.b=c`` for one setting of a nested table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from userllm.errors import UserError


class _Loader(yaml.SafeLoader):
    """Dates are text: every setting that is a date is one. A setting that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See the class."""
        said: set[str] = set()
        for key, _ in node.value:  # before anything is merged in, which may be said anew
            if isinstance(key, yaml.ScalarNode) and key.value in said:
                problem = f"{key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            said.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(file: Path, called: str = "file") -> Any:
    """What a YAML file says. Raises UserError where there is no such file, or it is no YAML."""
    try:
        return yaml.load(file.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except OSError as error:
        raise UserError(f"{file}: no such {called} ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not YAML: {' '.join(str(error).split())[:300]}") from error


def override(base: dict[str, Any], text: str) -> None:
    """Set ``a.b=c`` in nested plain values; c is read as YAML. Raises UserError for any other text."""
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"override {text!r} is not of the form a.b=c")
    try:
        parsed = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: the value is not YAML; quote it") from error
    *parents, last = path.split(".")
    for key in parents:
        if not isinstance(base.get(key), dict):
            base[key] = {}
        base = base[key]
    base[last] = parsed
