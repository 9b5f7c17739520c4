"""A run's whole configuration: the dataclasses of the rooms it goes through, under one roof."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from userllm.data.sources.reviews_config import ReviewsConfig
from userllm.data.sources.table_config import TableConfig
from userllm.data.splits import SplitConfig
from userllm.encoders import AutoregressiveConfig, EncoderConfig
from userllm.errors import UserError
from userllm.evaluation.users import EvaluationConfig
from userllm.fusion.config import FusionConfig
from userllm.language_models.pretrained import LanguageModelConfig
from userllm.ranges import NonNegativeInt, PositiveInt, check_ranges
from userllm.tasks import TaskConfig
from userllm.training.contextualize import ContextualizeConfig
from userllm.training.pretrain import PretrainConfig


@dataclass
class DataConfig:
    """Which prepared dataset a run uses."""

    release: str | None = "movielens-1m"
    """A data set userllm finds by itself (movielens-100k, movielens-1m, rent-the-runway), one that needs ``path``
    (movielens, amazon, google-local), or "synthetic" or "synthetic-reviews", small ones that it makes, for smoke runs;
    null with ``folder``."""
    path: Path | None = None
    """Raw files of ``release`` ("movielens" for any release): a folder or a zip; of amazon and google-local a folder, a
    file or a pattern. Found by userllm if null."""
    reviews: ReviewsConfig | None = None
    """What is kept of amazon and google-local, and how they are read; null keeps everything."""
    folder: Path | None = None
    """A dataset prepared before; overrides ``release``."""
    descriptions: Path | None = None
    """A CSV file (also gzipped) with MovieLens's movieId and an overview: the movies' field ``description``."""
    table: TableConfig | None = None
    """Your own event log, prepared as `userllm data prepare table` does; overrides ``release``."""
    fields: list[str] = field(default_factory=lambda: ["item", "rating", "genres"])
    """Fields the encoder reads and predicts, the item first (paper: name, rating, genre). Any declared field, and
    ``time_gap``: how long before an event the user's previous one was (ours)."""


@dataclass
class RunConfig:
    """Everything ``userllm run`` needs."""

    name: str = "run"
    """Results go to runs/<name>."""
    seed: NonNegativeInt = 0
    """Seed of every random choice."""
    threads: PositiveInt | None = None
    """CPU threads; torch's choice if null."""
    data: DataConfig = field(default_factory=DataConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    encoder: EncoderConfig = field(default_factory=AutoregressiveConfig)
    pretrain: PretrainConfig | None = field(default_factory=PretrainConfig)
    """Stage 1; null leaves the encoder random (the papers' "RD")."""
    lm: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    tasks: dict[str, TaskConfig] = field(default_factory=lambda: {"next_item": TaskConfig()})
    """Tasks by name; one model is trained on their mixture and evaluated on each."""
    contextualize: ContextualizeConfig = field(default_factory=ContextualizeConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        """Raise UserError for settings out of range, or that cannot go together, before any work is done."""
        check_ranges(self)
        if not _plain(self.name):
            raise UserError(f"name is {self.name!r}; give the plain name of a folder, it will be runs/<name>")
        for name in self.tasks:
            if not _plain(name):
                raise UserError(
                    f"tasks: {name!r} is a task's name; give a plain one, files are called after it"
                )
        if self.data.release is None and self.data.folder is None and self.data.table is None:
            raise UserError(
                "data: give release (movielens-1m, ...), folder (a prepared dataset) or table (your own)"
            )
        if self.data.table is not None and not self.data.table.path:
            raise UserError("data.table.path: give the files of your table")
        if self.data.fields[:1] != ["item"] or len(set(self.data.fields)) < len(self.data.fields):
            raise UserError(f"data.fields is {self.data.fields}; give the item first, and every field once")
        if not any(task.weight > 0 for task in self.tasks.values()):
            raise UserError("tasks: give at least one task with a weight above 0")
        self.fusion.check()
        self.evaluation.text.check()
        encoder, split = self.encoder, self.split
        if encoder.width % encoder.heads:
            raise UserError(
                f"encoder.width {encoder.width} is not a multiple of encoder.heads {encoder.heads}"
            )
        longest = split.window if split.kind == "paper" else encoder.max_length
        if longest > encoder.max_length:
            raise UserError(f"encoder.max_length {encoder.max_length} is below split.window {split.window}")
        if self.data.descriptions is not None and (self.data.folder or self.data.table) is not None:
            raise UserError(
                "data.descriptions goes with data.release; a dataset of yours brings a description field of its own"
            )
        if encoder.kind == "dual":
            if encoder.label not in self.data.fields:
                raise UserError(f"encoder.label {encoder.label} is not one of data.fields")
            if encoder.label != "item" and any(task.teacher > 0 for task in self.tasks.values()):
                raise UserError(
                    f"encoder.label {encoder.label}: cannot rank items for a teacher; set tasks.*.teacher to 0"
                )
        if self.pretrain is not None:
            batch = self.pretrain.batch
            if (batch.events is None) == (batch.sequences is None):
                raise UserError("pretrain.batch: give either events or sequences, and null for the other")
            if batch.events is not None and batch.events < longest:
                raise UserError(
                    f"pretrain.batch.events {batch.events} cannot hold one history of {longest} events"
                )


def _plain(name: str) -> bool:
    """Whether a file or folder can have this name, without leading elsewhere."""
    return name not in ("", ".", "..") and Path(name).name == name
