"""Raw files -> a prepared dataset on disk -> splits and batches."""

from userllm.data.batches import BatchConfig, LengthBucketSampler, TrainingSequences
from userllm.data.collation import HistoryCollator, StoredHistories, encode_histories, encode_user_history
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
    "write_dataset",
]
