"""A run from raw data to a report: five stages, each skipped when its result is there and its settings are the same.

runs/<name>/  dataset -> pretrain/encoder -> contextualize/model -> metrics.json, examples.json -> report.html
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml
from safetensors.torch import load_file, save_file

from userllm import processes
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
from userllm.evaluation.knowledge import knowledge_kept
from userllm.evaluation.labels import NAMES, LabelScores
from userllm.evaluation.open import OpenEvaluator, TextMetric, Texts
from userllm.evaluation.questions import Ask, Question
from userllm.evaluation.rating_agreement import RatingReader
from userllm.evaluation.text_metrics import distinct, length, rouge
from userllm.events import UserHistory
from userllm.freed_memory import hand_back, keep_freed_memory
from userllm.language_models.adapter import Adapter
from userllm.language_models.pretrained import load, resolve
from userllm.language_models.sentences import find_sentence_encoder
from userllm.language_models.text_embeddings import text_embeddings
from userllm.model import TEXT_START, Recommendation, UserLLM, encoder_for
from userllm.model_card import add_to_description
from userllm.report import write_report
from userllm.tasks import GenrePreference, OpenTask, Review, build_task
from userllm.training.contextualize import contextualize, load_trained
from userllm.training.pretrain import pretrain
from userllm.training.sharding import kept, whole
from userllm.training.strategy import apply_strategy, trainable_parameters
from userllm.training.trainer import set_seed

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
        self.folder.mkdir(parents=True, exist_ok=True)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if processes.device().type == "cpu":
            keep_freed_memory()
        file, text = self.folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            _write(file, text)

    def through(self, last: str = "report") -> Path:
        """Do every stage up to and including ``last``; what is done already is skipped. Returns the run folder."""
        if last not in STAGES:
            raise UserError(f"no stage {last!r}; the stages are {', '.join(STAGES)}")
        if STAGES.index(last) >= STAGES.index("contextualize"):
            # a language model that cannot be had is found out now, not after stage 1
            with processes.main_first():  # which downloads it, if need be
                resolve(self.config.lm)
        for stage in STAGES[: STAGES.index(last) + 1]:
            getattr(self, f"do_{stage}")()
        return self.folder

    # ---- stages ---------------------------------------------------------------------------------------------------

    def do_data(self) -> None:
        """Prepare or open the dataset."""
        with self._stage("data", ["data"], lambda: self._dataset_folder_known()) as todo:
            if todo:
                processes.told(self._prepare_data)
        self.open_data()
        say(f"data: {self.dataset.card.name}, {self.dataset.num_events:,} events; {self.split.describe()}")

    def open_data(self) -> None:
        """Open the dataset that was prepared."""
        self.dataset = Dataset.open(self._dataset_folder())
        used = json.loads((self.folder / "dataset.json").read_text())
        if used.get("fingerprint", self.dataset.card.fingerprint) != self.dataset.card.fingerprint:
            raise UserError(
                f"{self.dataset.folder}: has changed since this run began; start a run of another name, or take new "
                f"items into its model with `userllm grow {self.folder}`"
            )
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
            with processes.main_first():
                self.texts = self._encode_texts(self.config.encoder)

    def do_pretrain(self) -> None:
        """Stage 1; with ``pretrain: null`` the encoder stays random."""
        from_text = (
            isinstance(self.config.encoder, AutoregressiveConfig) and self.config.encoder.item_start == "text"
        )
        keys = ["data", "split", "encoder", "pretrain", "seed", *(["lm"] if from_text else [])]
        file = self.folder / "pretrain" / "encoder" / "encoder.safetensors"
        with self._stage("pretrain", keys, file.exists) as todo:
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
                _write(self.folder / "pretrain" / "log_history.json", json.dumps(history, indent=1))
                weights = {n: kept(whole(w)) for n, w in encoder.state_dict().items()}
                if processes.is_main():
                    save_file(weights, file.with_suffix(".partial"))
                    os.replace(file.with_suffix(".partial"), file)

    def do_contextualize(self) -> None:
        """Stage 2."""
        keys = ["data", "split", "encoder", "pretrain", "seed", "lm", "fusion", "tasks", "contextualize"]
        done = self.folder / "contextualize" / "model" / "config.json"
        with self._stage("contextualize", keys, done.exists) as todo:
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
                _write(self.folder / "contextualize" / "log_history.json", json.dumps(history, indent=1))
                _write(self.folder / "contextualize" / "trainable.json", json.dumps(counts))
                if processes.is_main():
                    if self.fsdp:  # nowhere is this one whole
                        model = self.build_model()
                        load_trained(model, self.folder / "contextualize")
                    model.run = self._data_facts()
                    del model.run["dataset"][
                        "source"
                    ]  # a model may go elsewhere: where the files lay here stays here
                    model.save_pretrained(done.parent, name=self.config.name)

    def do_evaluate(self) -> None:
        """Metrics of every task, and three users' answers."""
        keys = [
            "data", "split", "encoder", "pretrain", "seed", "lm", "fusion", "tasks", "contextualize", "evaluation",
        ]  # fmt: skip
        with self._stage("evaluate", keys, (self.folder / "metrics.json").exists) as todo:
            if todo:
                self._need("dataset", "data")
                evaluator, open_evaluator = self.evaluators()
                model = evaluator.model
                if self.answering is not None:
                    asked = [*evaluator.questions(), *open_evaluator.questions()]
                    evaluator.ask = open_evaluator.ask = self.answering(asked)
                tasks = {name: evaluator.evaluate(name) for name in model.closed_tasks}
                nobody = {
                    name: _best(model.closed_tasks[name].answers, evaluator.without_user[name])
                    for name in tasks
                }
                written, of_texts = self._evaluate_texts(open_evaluator)
                tasks |= written
                rows = pl.concat([evaluator.per_user(), *of_texts], how="diagonal")
                processes.told(lambda: self._write_evaluation(model, tasks, nobody, rows, evaluator))
        processes.told(self._refresh_timings)

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
            own = data.path is not None or data.descriptions is not None
            if own or not (folder / "card.json").is_file():
                folder = self.folder / "dataset" if own else folder
                if data.release == RELEASE:
                    prepare_synthetic(folder)
                elif data.release == REVIEWS:
                    prepare_synthetic_reviews(folder)
                else:
                    prepare(
                        str(data.release), [str(data.path)] if data.path else [], folder,
                        descriptions=data.descriptions, reviews=data.reviews,
                    )  # fmt: skip
        used = {"folder": str(folder.resolve()), "fingerprint": Dataset.open(folder).card.fingerprint}
        _write(self.folder / "dataset.json", json.dumps(used))

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

    def _example(
        self, model: UserLLM, nobody: dict[str, list[dict[str, Any]]], row: np.ndarray
    ) -> dict[str, Any]:
        user, start, stop = (int(x) for x in row)
        history: UserHistory = self.dataset.history(user, start, stop)
        target = self.dataset.history(user, stop, stop + 1).events[0]
        try:
            task = "next_item" if "next_item" in model.closed_tasks else model.first_closed_task
            weights = {id(a.event): a.weight for a in model.explain(history, task=task)}
        except UserError:
            weights = {}  # a Perceiver stands between, or nothing is asked: the report says that none were recorded
        window = self.split.visible(model.window)
        answers = {}
        for name, closed in model.closed_tasks.items():
            truth = int(closed.targets(self.dataset, np.array([user]), np.array([stop]), window)[0])
            answers[name] = {
                "truth": closed.answers[truth] if truth >= 0 else None,
                "with_user": [_answer(r) for r in model.recommend(history, 5, task=name)],
                "without_user": nobody[name],
            }
        return {
            "user": self.dataset.user_ids[user],
            "history": [
                {
                    "title": model.title(e.item),
                    "rating": e.fields.get("rating"),
                    "time": e.time,
                    "attention": weights.get(id(e)),
                }
                for e in history.events
            ],
            "target": model.title(target.item),
            "tasks": answers,
        }

    def _write_evaluation(
        self,
        model: UserLLM,
        tasks: dict[str, Any],
        nobody: dict[str, list[dict[str, Any]]],
        rows: pl.DataFrame,
        evaluator: ClosedEvaluator,
    ) -> None:
        examples = [self._example(model, nobody, row) for row in evaluator.rows[:3]]
        _write(self.folder / "examples.json", json.dumps(examples, indent=1, ensure_ascii=False))
        rows.write_parquet(self.folder / "per_user.parquet")
        metrics = self._metrics(model, tasks, evaluator)
        metrics["knowledge"] = self._knowledge(model, evaluator)
        _write(self.folder / "metrics.json", json.dumps(metrics, indent=1))
        results = {key: metrics[key] for key in ("tasks", "knowledge", "commit", "date", "hardware")}
        add_to_description(self.folder / "contextualize" / "model", results, self.config.name)

    def _evaluate_texts(self, evaluator: OpenEvaluator) -> tuple[dict[str, Any], list[pl.DataFrame]]:
        """Entries of the tasks that are answered in free text, and each task's numbers by user; the texts themselves
        go to texts/TASK.jsonl."""
        entries, rows = {}, []
        for name, task in evaluator.model.open_tasks.items():
            texts = evaluator.write(name)
            lines = [json.dumps(line, ensure_ascii=False) for line in evaluator.as_lines(texts)]
            _write(self.folder / "texts" / f"{name}.jsonl", "\n".join(lines))
            entries[name] = evaluator.measure(texts, self._text_metrics(task, texts))
            labels = None
            if isinstance(task, GenrePreference):
                entries[name] |= self._label_entries(task, texts)
                labels = LabelScores(task).names
            rows.append(evaluator.per_user(name, texts, labels))
        return entries, rows

    def _label_entries(self, task: GenrePreference, texts: Texts) -> dict[str, Any]:
        """Answers that are the same for everyone, which join the texts, and every system's scores label by label."""
        scores = LabelScores(task)
        training = task.examples(self.dataset, self.split.users, self.split.train_end, 0)
        labels = {
            system: scores.table(texts.targets, written)
            for (system, decoding), written in texts.written.items()
            if decoding == "greedy"
        }
        entries: dict[str, Any] = {"labels": labels}
        for system, text in scores.constants([one.target for one in training if one is not None]).items():
            texts.written[system, "greedy"] = [text] * len(texts.targets)
            texts.measured[system] = measured = dict(scores(texts.targets, texts.written[system, "greedy"]))
            entries[system] = {name: measured[name].as_dict() for name in NAMES}  # type: ignore[union-attr]
        return entries

    def _text_metrics(self, task: OpenTask, texts: Texts) -> list[TextMetric]:
        """What is measured of a task's texts."""
        if isinstance(task, GenrePreference):
            return [LabelScores(task)]
        metrics: list[TextMetric] = [rouge, length, distinct]
        if isinstance(task, Review) and (rating := task.config.rating) in self.dataset.event_fields:
            reader = RatingReader.of_training_events(self.dataset, self.split, task.config.target, rating)
            events = self.dataset.offsets[texts.rows[:, 0]] + texts.rows[:, 2]
            metrics.append(reader.agreement(self.dataset.events[rating][events]))
        return metrics

    def _data_facts(self) -> dict[str, Any]:
        card = self.dataset.card
        return {
            "dataset": {
                "name": card.name,
                "fingerprint": card.fingerprint,
                "users": card.users,
                "items": card.items,
                "events": card.events,
                "source": asdict(card.source),
            },
            "split": {
                "kind": self.config.split.kind,
                "fingerprint": self.split.fingerprint,
                "tie_rule": card.tie_rule,
                "part": self.config.evaluation.part,
            },
        }

    def _metrics(self, model: UserLLM, tasks: dict[str, Any], evaluator: ClosedEvaluator) -> dict[str, Any]:
        frozen = self.config.contextualize.strategy.name in ("enc", "proj")
        trained = self.folder / "contextualize" / "training.json"  # older versions wrote none
        return {
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": hardware(),
            **self._data_facts(),
            "lm": {
                "name": model.reference.name,
                "source": model.reference.source,
                "sha256": model.reference.sha256,
                "parameters": _lm_parameters(model),
                "frozen": frozen,
            },
            "summaries": None if model.summarizer is None else model.summarizer.described(),
            "trainable": json.loads((self.folder / "contextualize" / "trainable.json").read_text()),
            "gates": [{"layer": layer, "value": value} for layer, value in model.gates.items()],
            "training": json.loads(trained.read_text()) if trained.exists() else None,
            "catalogue_weights": [] if model.catalogue is None else model.catalogue.weights(),
            "timings_s": {},
            "cpu_s": {},
            "peak_rss_mb": peak_rss_mb(),
            "tasks": tasks,
            "notes": self._notes(model, evaluator),
        }

    def _notes(self, model: UserLLM, evaluator: ClosedEvaluator) -> list[str]:
        config = self.config.evaluation
        notes = [f"{evaluator.available} users can be evaluated; each task says n of N"]
        if model.closed_tasks:
            notes += [
                "next items already in the history are excluded for every system"
                if config.exclude_seen
                else "items already in the history may be recommended again",
                f"beam search with {config.beams} beams over the catalogue's trie; a target outside "
                f"the list of {config.list_length} counts as a miss",
                "among equal scores the item that comes first in the catalogue wins",
                *_catalogue_note(model),
            ]
        if model.open_tasks:
            notes += [
                "texts: every system gets the same prompt; no user is the base LM, which was not trained on such "
                "texts; another user's history is the trained model with the wrong user",
                "ROUGE: F-measure against the whole text the user wrote, rouge-score without stemming; gains compare "
                "greedy texts pair by pair",
                "log-likelihoods are of a text's first tokens, as many as the task's target_tokens",
            ]
        return notes

    def _knowledge(self, model: UserLLM, evaluator: ClosedEvaluator) -> dict[str, Any] | None:
        if model.has_encoder:
            return None  # it does not continue texts, so there is no perplexity of one
        config = self.config.evaluation
        say("knowledge: a general English text, before and after")
        original = load(self.config.lm)[0].to(model.lm.device) if model.strategy == "full" else None  # type: ignore[arg-type]
        with torch.no_grad():
            rows = evaluator.rows[: config.knowledge_users]
            users = model.context(self.stored.batch(rows).to(model.lm.device))
        return knowledge_kept(model, users, original, config.knowledge_tokens)

    # ---- bookkeeping ----------------------------------------------------------------------------------------------

    @contextmanager
    def _stage(self, name: str, keys: list[str], exists: Callable[[], bool]):
        """Yields whether the stage has to be done; remembers its settings and seconds once it is.

        A stage whose settings changed starts anew: what the old settings left in its folder is removed.
        """
        records = processes.told(lambda: self._begun(name, keys, exists))
        if records is None:
            say(f"{name}: done before, skipped")
            yield False
            return
        began, cpu_began = time.time(), time.process_time()
        yield True
        cpu = processes.total(time.process_time() - cpu_began)
        records[name] |= {
            "done": True,
            "seconds": round(records[name]["seconds"] + time.time() - began, 1),
            "cpu_seconds": round(records[name]["cpu_seconds"] + cpu, 1),
            "peak_rss_mb": peak_rss_mb(),
        }
        _write(self.folder / "stages.json", json.dumps(records, indent=1))
        hand_back()
        processes.wait()
        say(f"{name}: {records[name]['seconds']:.0f} s")

    def _begun(self, name: str, keys: list[str], exists: Callable[[], bool]) -> dict[str, Any] | None:
        """What is known of all stages, with this one begun; None where it is done."""
        record_file = self.folder / "stages.json"
        records: dict[str, Any] = json.loads(record_file.read_text()) if record_file.exists() else {}
        # null counts as absent: a newer userllm with one more optional setting still knows what an older one did
        chosen = _without_nulls({k: self.plain.get(k) for k in keys})
        settings = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
        record = records.get(name, {})
        if record.get("settings") == settings and record.get("done") and exists():
            return None
        if record.get("settings") != settings and name in ("pretrain", "contextualize"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        before = record if record.get("settings") == settings else {}
        spent, cpu = before.get("seconds", 0.0), before.get("cpu_seconds", 0.0)
        records[name] = {"settings": settings, "done": False, "seconds": spent, "cpu_seconds": cpu}
        _write(record_file, json.dumps(records, indent=1))
        return records

    def _refresh_timings(self) -> None:
        """metrics.json is written inside the stage whose seconds it should tell."""
        file = self.folder / "metrics.json"
        metrics, records = json.loads(file.read_text()), json.loads((self.folder / "stages.json").read_text())
        metrics["timings_s"] = {name: record["seconds"] for name, record in records.items()}
        metrics["cpu_s"] = {name: record.get("cpu_seconds") for name, record in records.items()}
        metrics["peak_rss_mb"] = max(record.get("peak_rss_mb", 0) for record in records.values())
        _write(file, json.dumps(metrics, indent=1))

    def _dataset_folder(self) -> Path:
        return Path(json.loads(self._need_file("dataset.json", "data").read_text())["folder"])

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


def say(text: str) -> None:
    """Progress for a person, from the main process."""
    if processes.is_main():
        print(text, flush=True)


def commit() -> str:
    """The commit of the code that runs, with "+changes" where files differ from it; "unknown" outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "."], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def hardware() -> str:
    """Processor, cores and memory, and the GPU where there is one."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model)
    except OSError:
        model = f"{model} (no /proc/cpuinfo)"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    gpu += f", {processes.count()} processes" if processes.count() > 1 else ""
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.0f} GiB{gpu}"


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _lm_parameters(model: UserLLM) -> int:
    with model.attachment.detached():
        return sum(p.numel() for n, p in model.lm.named_parameters() if "lora_" not in n)


def _answer(recommendation: Recommendation) -> dict[str, Any]:
    return {"text": recommendation.title, "log_likelihood": recommendation.log_likelihood}


def _best(answers: list[str], scores: torch.Tensor) -> list[dict[str, Any]]:
    """The five best answers by scores [N]."""
    values, best = scores.topk(min(5, len(answers)))
    pairs = zip(values.tolist(), best.tolist(), strict=True)
    return [{"text": answers[n], "log_likelihood": value} for value, n in pairs]


def _catalogue_note(model: UserLLM) -> list[str]:
    if model.catalogue is None:
        return []
    said = ", ".join(f"{weight:.2f}" for weight in model.catalogue.weights())
    return [
        "where a title is written, the encoder's log-probability is added to the LM's logit with weight "
        f"{said} (first token, second, ...; fusion.catalogue)"
    ]


def _without_nulls(settings: Any) -> Any:
    if not isinstance(settings, dict):
        return settings
    return {name: _without_nulls(value) for name, value in settings.items() if value is not None}


def _write(file: Path, text: str) -> None:
    if not processes.is_main():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
    os.replace(partial, file)
