"""The cells under docs/results are still what their settings say: no default has changed under them."""

import json
from pathlib import Path

import pytest
import yaml

from userllm.cli.configuration import load_config
from userllm.experiments.cells import FinishedCell

CELLS = Path(__file__).parents[2] / "docs" / "results" / "experiments" / "cells"


def one_of_each():
    """A cell of each kind of model: they share their defaults, and reading all takes half a minute."""
    found = {}
    for file in sorted(CELLS.glob("*.json")):
        told = json.loads(file.read_text(encoding="utf-8"))
        kind = told["config"]["encoder"]["kind"], told["config"]["fusion"]["kind"]
        found.setdefault(kind, file)
    return found.values()


def different(then, now, where=""):
    """Settings with another value now; those that are new since, or gone with the group they stood in, are left out."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            at for key in then.keys() & now.keys() for at in different(then[key], now[key], f"{where}.{key}")
        ]
    return [] if then == now else [f"{where[1:]}: {then!r}, now {now!r}"]


@pytest.mark.parametrize("file", one_of_each(), ids=lambda file: file.stem)
def test_no_default_changed_under_a_stored_cell(file, tmp_path):
    told = json.loads(file.read_text(encoding="utf-8"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(told["settings"] | {"name": told["config"]["name"]}))
    _, now = load_config(tmp_path / "config.yaml")
    for stage, pace in zip(("pretrain", "contextualize"), FinishedCell(file, told).pace, strict=True):
        if (now.get(stage) or {}).get("seconds") is not None:  # a slower machine was given more of them
            now[stage]["seconds"] *= pace
    assert different(told["config"], now) == []
