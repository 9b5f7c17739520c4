"""userllm gives a language model a sense of who it is talking to.

    events -> user embeddings -> user tokens -> a contextualised LM -> text or items

Names are imported when they are first used: ``import userllm`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from userllm.cli.configuration import load_config
    from userllm.config import RunConfig
    from userllm.data.history_file import read_history
    from userllm.data.sources.movielens import prepare_movielens
    from userllm.data.store import Dataset
    from userllm.encoders import UserEncoder
    from userllm.errors import UserError
    from userllm.events import Event, HistoryBatch, UserHistory
    from userllm.model import Attended, Recommendation, UserLLM
    from userllm.pipeline import Run
    from userllm.report import write_report
    from userllm.serving.record import UserRecord
    from userllm.serving.store import UserStore

    __version__: str

__all__ = [
    "Attended",
    "Dataset",
    "Event",
    "HistoryBatch",
    "Recommendation",
    "Run",
    "RunConfig",
    "UserEncoder",
    "UserError",
    "UserHistory",
    "UserLLM",
    "UserRecord",
    "UserStore",
    "__version__",
    "load_config",
    "prepare_movielens",
    "read_history",
    "write_report",
]

_HOMES = {
    "Attended": "userllm.model",
    "Dataset": "userllm.data.store",
    "Event": "userllm.events",
    "HistoryBatch": "userllm.events",
    "Recommendation": "userllm.model",
    "Run": "userllm.pipeline",
    "RunConfig": "userllm.config",
    "UserEncoder": "userllm.encoders",
    "UserError": "userllm.errors",
    "UserHistory": "userllm.events",
    "UserLLM": "userllm.model",
    "UserRecord": "userllm.serving.record",
    "UserStore": "userllm.serving.store",
    "load_config": "userllm.cli.configuration",
    "prepare_movielens": "userllm.data.sources.movielens",
    "read_history": "userllm.data.history_file",
    "write_report": "userllm.report",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'userllm' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    try:
        return metadata.version("userllm")
    except metadata.PackageNotFoundError:
        return "0 (a source folder, not installed)"
