"""A run from raw data to a report: five stages, each skipped when its result is there and its settings are the same.

runs/<name>/  dataset -> pretrain/encoder -> contextualize/model -> metrics.json, examples.json -> report.html
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from userllm import processes
from userllm.bfloat16 import multiplies
from userllm.config import RunConfig
from userllm.data.collation import HistoryCollator, StoredHistories
from userllm.data.sources.by_name import prepare
from userllm.data.sources.fetch import cache_folder
from userllm.data.sources.synthetic import (
    RELEASE,
    REVIEWS,
    prepare_synthetic,
    prepare_synthetic_reviews,
)
from userllm.data.sources.table import prepare_table
from userllm.data.splits import Split
from userllm.data.store import Dataset
from userllm.data.text_store import TextStore
from userllm.data.unseen_items import apart
from userllm.data.vocabulary import Vocabulary
from userllm.encoders import AutoregressiveConfig, AutoregressiveEncoder, TextConfig, TextEncoder, UserEncoder
from userllm.encoders.text_start import TextStart
from userllm.errors import UserError
from userllm.evaluation.closed import ClosedEvaluator
from userllm.evaluation.open import OpenEvaluator
from userllm.evaluation.questions import Ask, Question
from userllm.freed_memory import keep_freed_memory
from userllm.json_file import ANEW, read_object
from userllm.language_models.adapter import Adapter
from userllm.language_models.pretrained import load, resolve
from userllm.language_models.sentences import find_sentence_encoder
from userllm.language_models.text_embeddings import text_embeddings
from userllm.model import UserLLM, encoder_for
from userllm.pipeline.evaluate import Evaluation
from userllm.pipeline.facts import data_facts
from userllm.pipeline.stages import Stages, say, write
from userllm.report import write_report
from userllm.report.current import MEASURED_BY
from userllm.saved_model import TEXT_START
from userllm.tasks import OpenTask, build_task
from userllm.tensor_file import save_tensors
from userllm.training.contextualize import contextualize, load_trained
from userllm.training.pretrain import pretrain
from userllm.training.sharding import kept, whole
from userllm.training.strategy import apply_strategy, trainable_parameters
from userllm.training.trainer import set_seed

_SHORT = 2.0
"""Seconds to wait for a run that is just ending in the same folder."""

STAGES = ("data", "pretrain", "contextualize", "evaluate", "report")


class Run:
    """One run folder and the stages that fill it. ``plain`` is the resolved configuration as plain values.

    Several processes go through the stages together (``processes``): the main one prepares data and writes files.
    fsdp: in training the model's weights, gradients and optimiser state are spread over them.

    answering: given all questions of the evaluation, who answers them; None: these processes (see ``scale_out``).
    """

    answering: Callable[[Sequence[Question]], Ask] | None = None

    def __init__(
        self, config: RunConfig, plain: dict[str, Any], root: Path = Path("runs"), fsdp: bool = False
    ):
        processes.start()
        self.config = config
        self.fsdp = fsdp
        self.folder = root / config.name
        self.plain = plain
        self.stages = Stages(self.folder, plain)
        self.folder.mkdir(parents=True, exist_ok=True)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if processes.device().type == "cpu":
            keep_freed_memory()

    def through(self, last: str = "report") -> Path:
        """Do every stage up to and including ``last``; what is done already is skipped. Returns the run folder.

        Raises UserError for an unknown stage, and where another run is at work in the folder.
        """
        if last not in STAGES:
            raise UserError(f"no stage {last!r}; the stages are {', '.join(STAGES)}")
        with self._alone():
            self._go_through(last)
        return self.folder

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two runs in one folder would overwrite each other's checkpoints. A killed one leaves no lock behind."""
        lock = FileLock(self.folder / ".lock", timeout=_SHORT)

        def take() -> None:
            try:
                lock.acquire()
            except Timeout:
                raise UserError(
                    f"{self.folder}: another run is at work in it; wait for its end, or give this one another name "
                    "(name=...)"
                ) from None

        processes.told(take)
        try:
            yield
        finally:
            lock.release()

    def _write_config(self) -> None:
        file = self.folder / "config.yaml"
        text = yaml.safe_dump(self.plain, sort_keys=False, allow_unicode=True)
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write(file, text)

    def _go_through(self, last: str) -> None:
        if STAGES.index(last) >= STAGES.index("contextualize"):
            # a language model that cannot be had is found out now, not after stage 1
            with processes.main_first():  # which downloads it, if need be
                resolve(self.config.lm)
        self.do_data()
        self._write_config()  # not before: a run that is refused its data stays the run it was
        for stage in STAGES[1 : STAGES.index(last) + 1]:
            getattr(self, f"do_{stage}")()

    # ---- stages ---------------------------------------------------------------------------------------------------

    def do_data(self) -> None:
        """Prepare or open the dataset."""
        with self.stages.stage("data", ["data"], lambda: self._dataset_folder_known()) as todo:
            if todo:
                processes.told(self._prepare_data)
        self.open_data()
        say(f"data: {self.dataset.card.name}, {self.dataset.num_events:,} events; {self.split.describe()}")

    def open_data(self) -> None:
        """Open the dataset that was prepared."""
        self.dataset = Dataset.open(self._dataset_folder())
        processes.told(self._check_unchanged)
        if self.config.split.kind == "unseen_items":
            with processes.main_first():
                self.dataset = apart(self.dataset, self.config.split.unseen, self.folder / "unseen_items")
        self.split: Split = self.config.split.build(self.dataset)
        self.vocabulary = Vocabulary.from_dataset(self.dataset, tuple(self.config.data.fields))
        self.stored = StoredHistories(self.dataset, self.vocabulary)
        for name, config in self.config.tasks.items():
            task = build_task(name, config, self.dataset.items)
            if isinstance(task, OpenTask):  # what it asks for and the dataset lacks is found out now
                user, _, stop = self.split.examples("test")[:1].T
                task.examples(self.dataset, user, stop, 1)
        if isinstance(self.config.encoder, TextConfig):
            if self.config.encoder.products == "bfloat16" and not multiplies(processes.device()):
                say("encoder.products: float32, since this processor has no bfloat16")
            with processes.main_first():
                self.texts = self._encode_texts(self.config.encoder)

    def _check_unchanged(self) -> None:
        """Raises UserError where a stage was begun with other data."""
        used = read_object(self.folder / "dataset.json", ANEW)
        # an older userllm wrote down no hash of the catalogue
        if all(used.get(name) in (None, now) for name, now in _identity(self.dataset).items()):
            return
        if (self.folder / "pretrain").exists():
            raise UserError(
                f"{self.dataset.folder}: has changed since this run began; start a run of another name, or take new "
                f"items into its model with `userllm grow {self.folder}`"
            )
        self._use(self.dataset.folder)  # mended before anything was made of it

    def do_pretrain(self) -> None:
        """Stage 1; with ``pretrain: null`` the encoder stays random."""
        from_text = (
            isinstance(self.config.encoder, AutoregressiveConfig) and self.config.encoder.item_start == "text"
        )
        keys = ["data", "split", "encoder", "pretrain", "seed", *(["lm"] if from_text else [])]
        file = self.folder / "pretrain" / "encoder" / "encoder.safetensors"
        with self.stages.stage("pretrain", keys, file.exists) as todo:
            if todo:
                self._need("dataset", "data")
                set_seed(self.config.seed)
                encoder = encoder_for(self.vocabulary, self.config.encoder)
                self._give_texts(encoder)
                file.parent.mkdir(parents=True, exist_ok=True)
                if from_text:
                    self._start_from_text(encoder, file.parent / TEXT_START)
                say(f"pretrain: encoder of {sum(p.numel() for p in encoder.parameters()):,} parameters")
                history: list[dict[str, float]] = []
                if self.config.pretrain is not None:
                    history = pretrain(
                        encoder, self.dataset, self.split, self.stored, self.config.pretrain,
                        self.folder / "pretrain", self.config.seed, self.fsdp,
                    )  # fmt: skip
                write(self.folder / "pretrain" / "log_history.json", json.dumps(history, indent=1))
                weights = {n: kept(whole(w)) for n, w in encoder.state_dict().items()}
                if processes.is_main():
                    save_tensors(weights, file)

    def do_contextualize(self) -> None:
        """Stage 2."""
        keys = ["data", "split", "encoder", "pretrain", "seed", "lm", "fusion", "tasks", "contextualize"]
        done = self.folder / "contextualize" / "model" / "config.json"
        with self.stages.stage("contextualize", keys, done.exists) as todo:
            if todo:
                self._need("dataset", "data")
                model = self.build_model()
                counts = trainable_parameters(model)
                say("contextualize: trainable " + ", ".join(f"{g} {n:,}" for g, n in counts.items()))
                set_seed(self.config.seed)
                history = contextualize(
                    model, self.dataset, self.split, self.stored, self.config.contextualize,
                    self.folder / "contextualize", self.config.seed, fsdp=self.fsdp,
                )  # fmt: skip
                write(self.folder / "contextualize" / "log_history.json", json.dumps(history, indent=1))
                write(self.folder / "contextualize" / "trainable.json", json.dumps(counts))
                if processes.is_main():
                    if self.fsdp:  # nowhere is this one whole
                        model = self.build_model()
                        load_trained(model, self.folder / "contextualize")
                    model.run = data_facts(self.config, self.dataset, self.split)
                    # a model may go elsewhere: where the files lay here stays here
                    del model.run["dataset"]["source"]
                    model.save_pretrained(done.parent, name=self.config.name)

    def do_evaluate(self) -> None:
        """Metrics of every task, and three users' answers."""
        with self.stages.stage("evaluate", MEASURED_BY, (self.folder / "metrics.json").exists) as todo:
            if todo:
                self._need("dataset", "data")
                closed, texts = self.evaluators()
                if self.answering is not None:
                    asked = [*closed.questions(), *texts.questions()]
                    closed.ask = texts.ask = self.answering(asked)
                evaluation = Evaluation(self.folder, self.config, closed, texts)
                evaluation.ask()
                processes.told(evaluation.write)
        processes.told(lambda: self.stages.tell_times(self.folder / "metrics.json"))

    def do_report(self) -> None:
        """report.html and report.md, always written anew."""
        self._need_file("metrics.json", "evaluate")
        say(f"report: {processes.told(lambda: write_report(self.folder))}")

    # ---- parts ----------------------------------------------------------------------------------------------------

    def _prepare_data(self) -> None:
        data = self.config.data
        folder = data.folder
        if folder is None and data.table is not None:
            folder = self.folder / "dataset"
            prepare_table(data.table, folder, self.config.name)
        elif folder is None:
            folder = cache_folder() / "datasets" / str(data.release)
            if data.path is not None or data.descriptions is not None:
                folder = self.folder / "dataset"
                self._prepare_release(folder)
            elif not (folder / "card.json").is_file():
                folder.parent.mkdir(parents=True, exist_ok=True)
                # other runs may want the same dataset now: one prepares it, and they wait
                with FileLock(folder.with_name(f".{folder.name}.preparing")):
                    if not (folder / "card.json").is_file():
                        self._prepare_release(folder)
        self._use(folder)

    def _prepare_release(self, folder: Path) -> None:
        """The dataset called ``data.release`` in ``folder``."""
        data = self.config.data
        if data.release == RELEASE:
            prepare_synthetic(folder)
        elif data.release == REVIEWS:
            prepare_synthetic_reviews(folder)
        else:
            prepare(
                str(data.release), [str(data.path)] if data.path else [], folder,
                descriptions=data.descriptions, reviews=data.reviews,
            )  # fmt: skip

    def _use(self, folder: Path) -> None:
        """This is the run's dataset, as it is now."""
        used = {"folder": str(folder.resolve()), **_identity(Dataset.open(folder))}
        write(self.folder / "dataset.json", json.dumps(used))

    def load_encoder(self) -> UserEncoder:
        """The encoder of stage 1."""
        encoder = encoder_for(self.vocabulary, self.config.encoder)
        encoder.load_state_dict(
            load_file(self._need_file("pretrain/encoder/encoder.safetensors", "pretrain"))
        )
        self._give_texts(encoder)
        return encoder

    def evaluators(self) -> tuple[ClosedEvaluator, OpenEvaluator]:
        """What measures the trained model, which is loaded for it."""
        model = UserLLM.from_pretrained(self.folder / "contextualize" / "model")
        model.to(processes.device()).store_lower_states()
        encoder = self.load_encoder().to(processes.device())
        config, seed = self.config.evaluation, self.config.seed
        closed = ClosedEvaluator(model, encoder, self.dataset, self.split, self.stored, config, seed, say)
        return closed, OpenEvaluator(
            model, self.dataset, self.split, self.stored, closed.users, config, seed, say
        )

    def _encode_texts(self, config: TextConfig) -> TextStore:
        """The store beside the dataset, with every text the encoder will ask for."""
        found = find_sentence_encoder(config.sentences)
        store = TextStore.open(
            self._dataset_folder() / "sentences" / config.sentences.replace("/", "--"), found.card
        )
        texts = [
            text for column in config.texts(self.dataset.items, self.vocabulary).values() for text in column
        ]
        if missing := len(store.missing(texts)):
            say(f"data: {missing:,} distinct texts to encode with {config.sentences}, into {store.folder}")
            device = "cuda" if torch.cuda.is_available() else "cpu"
            began = time.time()
            store.add(
                texts,
                found.load().to(device).encode,
                lambda done, of: say(f"  {done:,} of {of:,}, {done / (time.time() - began):.0f} texts/s"),
            )
        return store

    def _give_texts(self, encoder: UserEncoder) -> None:
        """A text encoder reads the catalogue's texts from the store; any other needs none."""
        if isinstance(encoder, TextEncoder):
            encoder.use(self.texts, encoder.config.texts(self.dataset.items, self.vocabulary))

    def _start_from_text(self, encoder: UserEncoder, file: Path) -> None:
        """Item embeddings from the titles; what a new title's embedding needs is written to ``file``."""
        config = self.config.encoder
        assert isinstance(config, AutoregressiveConfig) and isinstance(encoder, AutoregressiveEncoder)
        lm, tokenizer, _ = load(self.config.lm)
        titles = self.dataset.items["title"].to_list()
        vectors = text_embeddings(lm, tokenizer, titles, config.item_text)
        start = TextStart.fit(vectors, config.item_width)
        encoder.features.start("item", start.rows(vectors))
        if processes.is_main():
            start.save(file)

    def build_model(self) -> UserLLM:
        """The model that stage 2 begins with: the encoder as stage 1 left it, everything else of the fusion untrained.
        Raises UserError as loading the language model does."""
        config, items = self.config, self.dataset.items
        lm, tokenizer, reference = load(config.lm)
        strategy = config.contextualize.strategy
        set_seed(config.seed)
        adapter = Adapter.add(lm, strategy.lora) if strategy.name == "lora" else None
        tasks = {name: build_task(name, task, items) for name, task in config.tasks.items()}
        collator: HistoryCollator = self.stored.collator
        model = UserLLM(
            lm,
            tokenizer,
            self.load_encoder(),
            config.fusion,
            tasks,
            collator,
            reference,
            strategy.name,
            adapter,
        )
        start = self.folder / "pretrain" / "encoder" / TEXT_START
        if start.is_file():
            model.text_start = TextStart.load(start)
        model.check_head()
        apply_strategy(model, strategy.name, adapter)
        return model

    # ---- bookkeeping ----------------------------------------------------------------------------------------------

    def _dataset_folder(self) -> Path:
        return Path(read_object(self._need_file("dataset.json", "data"), ANEW, "folder")["folder"])

    def _dataset_folder_known(self) -> bool:
        return (self.folder / "dataset.json").exists() and (self._dataset_folder() / "card.json").exists()

    def _need(self, attribute: str, stage: str) -> None:
        if not hasattr(self, attribute):
            getattr(self, f"do_{stage}")()

    def _need_file(self, name: str, stage: str) -> Path:
        file = self.folder / name
        if not file.exists():
            if not processes.is_main():
                raise UserError(f"{file} is not there: run folders must be where all processes see them")
            raise UserError(
                f"{file} is not there yet; run the stage {stage!r} first (userllm {stage} CONFIG)"
            )
        return file


def _identity(dataset: Dataset) -> dict[str, str | None]:
    """Which data these are: the events, and the catalogue whose rows the trained weights belong to."""
    return {"fingerprint": dataset.card.fingerprint, "catalogue": dataset.card.catalogue}
