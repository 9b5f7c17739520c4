"""Many users on a Ray cluster, by Ray Data: their embeddings, and the answers an evaluation asks for.

Needs the extra ``ray``. Workers load the model themselves and read the dataset's memory-mapped columns, so
run folder, dataset and cache have to be where every machine sees them. Work is cut into the same batches however many
workers there are, and each batch is computed by one of them: the numbers are those of one process, bit for bit, where
the processors are of one kind and ``threads`` is the same.

Without an address in RAY_ADDRESS, or a cluster that was connected to before, Ray starts on this machine.
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from userllm import processes
from userllm.config import RunConfig
from userllm.data.batches import alike_in_length
from userllm.data.collation import StoredHistories
from userllm.data.store import Dataset
from userllm.encoders import UserEncoder
from userllm.errors import UserError
from userllm.evaluation.questions import Answers, Ask, Question
from userllm.pipeline import Run
from userllm.saved_model import read_description, saved_reader
from userllm.serving.embed import rows_of_items

SHARD = 1024
"""Users that a worker embeds at once."""
BATCH_EVENTS = 8192
"""Events, padding included, that go through the encoder at once."""


# ---- user embeddings ----------------------------------------------------------------------------------------------


@torch.no_grad()
def last_embeddings(encoder: UserEncoder, stored: StoredHistories, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """The last user embedding [n, U] of each history (user, start, stop) [n, 3], and whether it has one [n].

    Of a causal encoder it knows the whole history; a history without events has none, but zeros. Histories of alike
    length go through the encoder together.
    """
    device = next(encoder.parameters()).device
    found = torch.zeros(len(rows), encoder.width)
    known = torch.zeros(len(rows), dtype=torch.bool)
    for places in alike_in_length((rows[:, 2] - rows[:, 1]).tolist(), BATCH_EVENTS):
        embeddings, mask = encoder(stored.batch(rows[places]).to(device))
        last = embeddings[torch.arange(len(places), device=device), (mask.sum(1) - 1).clamp_min(0)]
        known[places] = mask.any(1).cpu()
        found[places] = (last.float() * mask.any(1, keepdim=True)).cpu()
    return found, known


class Embedder:
    """The user embeddings of a dataset by a saved model, a shard of users at a time. The language model is not loaded.

    folder: a saved model. data: a prepared dataset. threads: CPU threads; torch's choice by None. Raises UserError
    where the dataset lacks a field of events that the model reads, or the model knows none of its items.
    """

    def __init__(self, folder: Path, data: Path, shard: int = SHARD, threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(threads)
        encoder, collator = saved_reader(folder, read_description(folder), None)
        self.encoder = encoder.requires_grad_(False).eval().to(processes.device())
        self.dataset = Dataset.open(data)
        fields = [field.name for field in collator.event_fields]
        rows = rows_of_items(collator, self.dataset, fields)
        self.stored = StoredHistories(self.dataset, collator.vocabulary, collator, rows)
        self.shard = shard

    @property
    def shards(self) -> int:
        """How many shards the dataset's users make."""
        return math.ceil(self.dataset.num_users / self.shard)

    def of_shard(self, number: int) -> pl.DataFrame:
        """One row per user: user (raw id), events (all of theirs), embedding [U] or null for a user without events."""
        users = np.arange(number * self.shard, min((number + 1) * self.shard, self.dataset.num_users))
        lengths = self.dataset.lengths[users].astype(np.int64)
        rows = np.stack([users, np.maximum(0, lengths - self.encoder.max_length), lengths], axis=1)
        found, known = last_embeddings(self.encoder, self.stored, rows)
        embeddings = pl.Series("embedding", found.numpy())
        return pl.DataFrame(
            {
                "user": [self.dataset.user_ids[user] for user in users],
                "events": lengths,
                "embedding": embeddings,
            }
        ).with_columns(pl.when(pl.Series(known.numpy())).then("embedding"))


def embed_users(
    folder: Path,
    data: Path,
    out: Path,
    workers: int,
    *,
    gpus: float = 0,
    shard: int = SHARD,
    threads: int | None = 1,
) -> int:
    """Write the embeddings of all of a dataset's users (``Embedder``) as Parquet files into a new folder ``out``.

    One file per shard, user after user; they appear when all are written. workers: of the Ray cluster, each with a
    copy of the encoder, one CPU and ``gpus`` GPUs. Returns the number of users. Raises UserError where ``out`` is
    there already, or nobody can be embedded.
    """
    if out.exists():
        raise UserError(f"{out}: is there already; give a new folder")
    ray_data = _ray_data()
    folder, data, partial_out = (
        folder.resolve(),
        data.resolve(),
        out.resolve().with_name(f".{out.name}.partial"),
    )
    shutil.rmtree(partial_out, ignore_errors=True)
    partial_out.mkdir(parents=True)
    users = Dataset.open(data).num_users
    shards = [{"shard": number} for number in range(math.ceil(users / shard))]
    build = partial(Embedder, folder, data, shard, threads)
    written = _spread(ray_data, shards, _EmbeddingWorker, (build, partial_out), workers, gpus)
    done = sum(int(row["users"]) for row in written.iter_rows())
    partial_out.rename(out)
    return done


class _EmbeddingWorker:
    def __init__(self, build: Callable[[], Embedder], out: Path):
        self.embedder, self.out = build(), out

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = [self._write(int(number)) for number in batch["shard"]]
        return {"users": np.array(rows)}

    def _write(self, number: int) -> int:
        frame = self.embedder.of_shard(number)
        file = self.out / f"{number:06d}.parquet"
        frame.write_parquet(file.with_suffix(".partial"))  # a worker that died may have begun it
        file.with_suffix(".partial").replace(file)
        return len(frame)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def answering(run: Run, workers: int, gpus: float = 0) -> Callable[[Sequence[Question]], Ask]:
    """For ``Run.answering``: who answers an evaluation's questions. Each worker loads the run's model."""

    def answer_all(questions: Sequence[Question]) -> Ask:
        ray_data = _ray_data()
        asked = [{"number": number} | asdict(question) for number, question in enumerate(questions)]
        what = (run.config, run.plain, run.folder.resolve().parent)
        answered = _spread(ray_data, asked, _AnswerWorker, what, workers, gpus)
        known = {questions[int(row["number"])]: _unpacked(row["answers"]) for row in answered.iter_rows()}
        return lambda wanted, _: [known[question] for question in wanted]

    return answer_all


class _AnswerWorker:
    def __init__(self, config: RunConfig, plain: dict[str, Any], root: Path):
        run = Run(config, plain, root)
        run.open_data()
        self.closed, self.open = run.evaluators()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        answers = []
        for task, system, start in zip(batch["task"], batch["system"], batch["start"], strict=True):
            question = Question(str(task), str(system), int(start))
            asked = self.closed if question.task in self.closed.model.closed_tasks else self.open
            answers.append(_packed(asked.answer(question)))
        packed = np.empty(len(answers), dtype=object)
        packed[:] = answers
        return {"number": batch["number"], "answers": packed}


def _packed(answers: Answers) -> bytes:
    """As an Arrow file: every number keeps its type and its bits."""
    buffer = io.BytesIO()
    columns = {n: value.tolist() if value.dtype == object else value for n, value in answers.items()}
    pl.DataFrame(
        columns, schema_overrides={n: pl.String for n, v in answers.items() if v.dtype == object}
    ).write_ipc(buffer)
    return buffer.getvalue()


def _unpacked(packed: bytes) -> Answers:
    frame = pl.read_ipc(io.BytesIO(packed))
    return {
        column.name: np.array(column.to_list(), dtype=object)
        if column.dtype == pl.String
        else column.to_numpy()
        for column in frame
    }


# ---- Ray ------------------------------------------------------------------------------------------------------------


def _ray_data() -> Any:
    """Ray Data, connected to a cluster."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("Ray is not installed; in the clone: pip install -e '.[ray]'") from error
    if not ray.is_initialized():
        ray.init()
    return ray.data


def _spread(
    ray_data: Any, rows: list[dict[str, Any]], worker: type, what: tuple[Any, ...], workers: int, gpus: float
) -> Any:
    """What so many workers, each built of ``what``, make of the rows, one row at a time.

    The rows are there from the start: a task that read them would need a CPU beside the workers'.
    """
    if workers < 1:
        raise UserError(f"{workers} Ray workers; at least one is needed")
    place: dict[str, Any] = {"num_cpus": 1} if gpus == 0 else {"num_gpus": gpus}
    return ray_data.from_items(rows, override_num_blocks=min(len(rows), 16 * workers)).map_batches(
        worker,
        fn_constructor_args=what,
        compute=ray_data.ActorPoolStrategy(size=workers),
        batch_size=1,
        **place,
    )
