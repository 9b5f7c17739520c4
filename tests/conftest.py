"""Brings ``fixtures.py`` to whoever runs tests. A process that only hands them out (pytest-xdist) is spared torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    spec = importlib.util.spec_from_file_location("userllm_fixtures", Path(__file__).with_name("fixtures.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config.pluginmanager.register(module)
