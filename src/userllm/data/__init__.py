"""Raw files -> a prepared dataset on disk -> splits and batches.

Names are imported when they are first used: reading raw files must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from userllm.data.batches import BatchConfig, LengthBucketSampler, TrainingSequences
    from userllm.data.collation import (
        HistoryCollator,
        StoredHistories,
        encode_histories,
        encode_user_history,
    )
    from userllm.data.history_file import read_history
    from userllm.data.splits import Split, SplitConfig
    from userllm.data.store import Dataset, DatasetCard, FieldSpec, Source, write_dataset
    from userllm.data.vocabulary import FieldVocabulary, Vocabulary

__all__ = [
    "BatchConfig",
    "Dataset",
    "DatasetCard",
    "FieldSpec",
    "FieldVocabulary",
    "HistoryCollator",
    "LengthBucketSampler",
    "Source",
    "Split",
    "SplitConfig",
    "StoredHistories",
    "TrainingSequences",
    "Vocabulary",
    "encode_histories",
    "encode_user_history",
    "read_history",
    "write_dataset",
]

_HOMES = {
    "BatchConfig": "batches",
    "Dataset": "store",
    "DatasetCard": "store",
    "FieldSpec": "store",
    "FieldVocabulary": "vocabulary",
    "HistoryCollator": "collation",
    "LengthBucketSampler": "batches",
    "Source": "store",
    "Split": "splits",
    "SplitConfig": "splits",
    "StoredHistories": "collation",
    "TrainingSequences": "batches",
    "Vocabulary": "vocabulary",
    "encode_histories": "collation",
    "encode_user_history": "collation",
    "read_history": "history_file",
    "write_dataset": "store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'userllm.data' has no attribute {name!r}")
    return getattr(import_module(f"userllm.data.{_HOMES[name]}"), name)
