"""Whether what a run folder measured is of the settings that stand in its configuration. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from userllm.errors import UserError
from userllm.json_file import ANEW, read_object

MEASURED_BY = (
    "data", "split", "encoder", "pretrain", "seed", "lm", "fusion", "tasks", "contextualize", "evaluation",
)  # fmt: skip
"""What metrics.json depends on: the settings of the stage "evaluate"."""


def stage_hash(plain: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Hash of these parts of a resolved configuration, by which stages.json knows what a stage was done with."""
    # null counts as absent: a newer userllm with one more optional setting still knows what an older one did
    chosen = _without_nulls({key: plain.get(key) for key in keys})
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def check_current(folder: Path) -> None:
    """Raise UserError where the metrics of a run folder are of other settings than its configuration's.

    They are while a run with new settings is under way, or has been interrupted. A folder that lacks stages.json or
    config.yaml cannot tell, and passes.
    """
    config, stages = folder / "config.yaml", folder / "stages.json"
    if not (config.is_file() and stages.is_file()):
        return
    record = read_object(stages, ANEW).get("evaluate")
    now = yaml.safe_load(config.read_text(encoding="utf-8"))
    if record is not None and record["settings"] != stage_hash(now, MEASURED_BY):
        raise UserError(
            f"{folder}/metrics.json is of other settings than {config}, with which a run was begun and not ended; "
            f"run `userllm run {config}` first"
        )


def _without_nulls(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {name: _without_nulls(value) for name, value in settings.items() if value is not None}
