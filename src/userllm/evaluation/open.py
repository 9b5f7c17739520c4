"""Evaluation of tasks that are answered in free text: User-LLM against itself with the wrong user, and the base LM.

Every system gets the same prompts. "no_user" is the base LM with the prompt alone: it has not been trained on such
texts, so beating it says little about users. "user_llm_shuffled" is the trained model with somebody else's history: it
knows the kind of text as well as User-LLM does, and what it lacks is the user. Where a task knows a text of the user's
that could simply be copied ("own_last"), so does the evaluation; "other_last" copies somebody else's.

What is measured of the texts is a list of functions, ``(targets, texts) -> by name`` one number per text, or one number
of all texts together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import torch

from userllm import processes
from userllm.data.collation import StoredHistories
from userllm.data.splits import Split
from userllm.data.store import Dataset
from userllm.decoding.next_token import TextDecoding
from userllm.errors import UserError
from userllm.evaluation.metrics import Estimate, bootstrap_mean, paired_gain
from userllm.evaluation.questions import Answers, Ask, Question, joined
from userllm.evaluation.users import EvaluatedUsers, EvaluationConfig
from userllm.freed_memory import hand_back_if_scarce
from userllm.fusion.attach import UserContext
from userllm.model import UserLLM
from userllm.tasks import TextExample

TextMetric = Callable[[Sequence[str], Sequence[str]], Mapping[str, np.ndarray | Estimate | float]]
"""(targets, texts) -> by name: one number per text [n], which gets an interval and is compared text by text; an
``Estimate`` of all texts; or a plain number of all texts, where an interval would mean nothing."""

RIVALS = {"over_shuffled": "user_llm_shuffled", "over_no_user": "no_user"}
"""Whom User-LLM is compared with, by what the comparison is called."""


@dataclass
class Texts:
    """What was asked and written: user rows [n, 3], examples [n], texts by system and decoding (of the first users
    only, perhaps), losses by system; and what was measured of the texts, by system and metric."""

    rows: np.ndarray
    examples: list[TextExample]
    written: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    nats: dict[str, np.ndarray] = field(default_factory=dict)
    read: dict[str, np.ndarray] = field(default_factory=dict)
    """By system, tokens the LM reads before its answer, soft prompts included [n]."""
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0))
    measured: dict[str, dict[str, np.ndarray | Estimate | float]] = field(default_factory=dict)

    @property
    def targets(self) -> list[str]:
        return [example.target for example in self.examples]


class OpenEvaluator:
    """Evaluates the open tasks of a model on one part of a split.

    metrics: what is measured of the texts of a task; see ``TextMetric``.
    """

    def __init__(
        self,
        model: UserLLM,
        dataset: Dataset,
        split: Split,
        stored: StoredHistories,
        users: EvaluatedUsers,
        config: EvaluationConfig,
        seed: int,
        progress: Callable[[str], None] = print,
        ask: Ask = processes.spread,
    ):
        self.model, self.dataset, self.split, self.stored = model, dataset, split, stored
        self.users, self.config, self.seed, self.progress, self.ask = users, config, seed, progress, ask
        self._known = cache(self._asked)
        self.decodings: dict[str, TextDecoding] = {"greedy": config.text.greedy}
        if config.text.sampled is not None:
            self.decodings["sampled"] = config.text.sampled

    def _asked(self, name: str) -> tuple[Texts, np.ndarray]:
        """What is asked of whom, and the rows of somebody else for each."""
        task = self.model.open_tasks[name]
        rows = self.users.rows
        window = self.split.visible(self.model.window)
        asked = task.examples(self.dataset, rows[:, 0], rows[:, 2], window)
        places = np.flatnonzero([example is not None for example in asked])
        most = self.config.text.users
        if most is not None and most < len(places):
            order = np.random.default_rng([self.seed, 17]).permutation(len(places))
            places = np.sort(places[order[:most]])  # a smaller sample lies inside every larger one
        if len(places) < 2:
            raise UserError(f"evaluation of {name}: {len(places)} users have a text; it takes at least two")
        texts = Texts(rows[places], [example for p in places if (example := asked[p]) is not None])
        return texts, rows[self.users.other[places]]

    @property
    def _systems(self) -> list[str]:
        return ["user_llm", *(["user_llm_shuffled"] if self.config.other_user else []), "no_user"]

    def _of(self, name: str, system: str) -> list[Question]:
        starts = range(0, len(self._known(name)[0].rows), self.config.batch)
        return [Question(name, system, start) for start in starts]

    def questions(self) -> list[Question]:
        """All that will be asked of the language model."""
        return [
            q for name in self.model.open_tasks for system in self._systems for q in self._of(name, system)
        ]

    def write(self, name: str) -> Texts:
        """Every system's texts. Raises UserError where not two users have something to write."""
        task = self.model.open_tasks[name]
        texts, other = self._known(name)
        self.progress(f"{name}: texts for {len(texts.rows)} of {self.users.available} users")
        copied_of = {"own_last": texts.rows} | ({"other_last": other} if self.config.other_user else {})
        for system in self._systems:
            said = joined(self.ask(self._of(name, system), self.answer))
            texts.nats[system], texts.tokens, texts.read[system] = said["nats"], said["tokens"], said["read"]
            for decoding in self.decodings:
                texts.written[system, decoding] = [text for text in said[decoding] if text is not None]
        for system, histories in copied_of.items():
            if (copies := task.copied(self.dataset, histories[:, 0], histories[:, 2])) is not None:
                texts.written[system, "greedy"] = copies
        return texts

    @torch.no_grad()
    def answer(self, question: Question) -> Answers:
        """What a system says to one batch of users: the likelihood of their own text, and new ones by decoding.

        A text of a decoding that is not for this user is None.
        """
        hand_back_if_scarce()
        self.model.eval()
        texts, other = self._known(question.task)
        start, most = question.start, self.model.open_tasks[question.task].config.target_tokens
        part = slice(start, start + self.config.batch)
        prompts = [example.prompt for example in texts.examples[part]]
        users = None  # "no_user" is the base LM
        if question.system != "no_user":
            histories = (other if question.system == "user_llm_shuffled" else texts.rows)[part]
            users = self.model.context(self.stored.batch(histories).to(self.model.lm.device))
        nll, tokens = self.model.text_losses(prompts, texts.targets[part], users, most)
        answers = {
            "nats": nll.double().cpu().numpy(),
            "tokens": tokens.cpu().numpy(),
            "read": self._tokens_read(prompts, users),
        }
        for name, decoding in self.decodings.items():
            count = len(prompts)
            if name == "sampled" and self.config.text.sampled_users is not None:
                count = max(0, min(count, self.config.text.sampled_users - start))
            answers[name] = np.full(len(prompts), None)
            if count > 0:
                some = users
                if users is not None:
                    some = users.select(torch.arange(count, device=users.mask.device))
                numbers = range(start, start + count)
                answers[name][:count] = self.model.write_texts(prompts[:count], some, decoding, numbers)
        return answers

    def _tokens_read(self, prompts: Sequence[str], users: UserContext | None) -> np.ndarray:
        asked = self.model.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        lengths = np.array([len(ids) for ids in asked]) + len(self.model.opening) + len(self.model.closing)  # type: ignore[arg-type]
        if users is None or users.prefix is None:
            return lengths
        return lengths + (users.prefix.mask.sum(1) - len(self.model.opening)).cpu().numpy()

    def measure(self, texts: Texts, metrics: Sequence[TextMetric]) -> dict[str, Any]:
        """The entry of a task in metrics.json; what it was made from stays in ``texts.measured``.

        Systems are called as with closed tasks; those with drawn texts end in "_sampled", and "target" is what the
        users wrote themselves. ``gain`` compares the greedy texts pair by pair, ``gain_nats`` the likelihoods.
        """
        entry: dict[str, Any] = {
            "n": len(texts.rows),
            "N": self.users.available,
            "decoding": {
                name: asdict(decoding) | {"users": len(texts.written["user_llm", name])}
                for name, decoding in self.decodings.items()
            },
            "whole": {},
        }
        texts.measured = measured = {
            _called(system, decoding): _measured(texts.targets[: len(said)], said, metrics)
            for (system, decoding), said in texts.written.items()
        }
        measured["target"] = _measured(texts.targets, texts.targets, metrics)
        for called, values in measured.items():
            entry[called] = {}
            for name, value in values.items():
                if isinstance(value, Estimate):
                    entry[called][name] = value.as_dict()
                elif isinstance(value, np.ndarray):
                    entry[called][name] = bootstrap_mean(value).as_dict()
                else:
                    entry["whole"].setdefault(called, {})[name] = value
        for system, nats in texts.nats.items():
            entry[system]["log_likelihood"] = bootstrap_mean(-nats).as_dict()
            entry[system]["nats_per_token"] = bootstrap_mean(nats / texts.tokens).as_dict()
            entry[system]["prompt_tokens"] = bootstrap_mean(texts.read[system]).as_dict()
        own = measured["user_llm"]
        rivals = {over: rival for over, rival in RIVALS.items() if rival in measured}
        entry["gain"] = {
            over: {
                name: paired_gain(value, against).as_dict()
                for name, value in own.items()
                if isinstance(value, np.ndarray) and isinstance(against := measured[rival][name], np.ndarray)
            }
            for over, rival in rivals.items()
        }
        entry["gain_nats"] = {
            over: paired_gain(texts.nats[rival], texts.nats["user_llm"]).as_dict()
            for over, rival in rivals.items()
        }
        return entry

    def per_user(
        self, name: str, texts: Texts, labels: Callable[[Sequence[str]], list[list[str]]] | None = None
    ) -> pl.DataFrame:
        """What was measured of every text: task, user (raw id), system, log_likelihood, and a column per metric that
        has one number per text; null where a system has no likelihood. Call ``measure`` first.

        labels: those that texts name; then "target" and "named" hold the labels of a user's target and text.
        """
        ids = np.array(self.dataset.user_ids)[texts.rows[:, 0]]
        said = {"target": texts.targets} | {_called(*key): one for key, one in texts.written.items()}
        parts = []
        for system, values in texts.measured.items():
            columns = {metric: value for metric, value in values.items() if isinstance(value, np.ndarray)}
            if system in texts.nats:
                columns["log_likelihood"] = -texts.nats[system]
            n = len(said[system])  # the first users only, perhaps
            facts: dict[str, Any] = {"task": [name] * n, "user": ids[:n].tolist(), "system": [system] * n}
            frame = pl.DataFrame(facts | columns)
            if labels is not None:
                named = {"target": labels(texts.targets[:n]), "named": labels(said[system])}
                frame = frame.hstack(pl.DataFrame(named, schema=dict.fromkeys(named, pl.List(pl.String))))
            parts.append(frame)
        return pl.concat(parts, how="diagonal")

    def as_lines(self, texts: Texts) -> list[dict[str, Any]]:
        """One record per user: prompt, target and every system's text."""
        return [
            {
                "user": self.dataset.user_ids[int(row[0])],
                "prompt": example.prompt,
                "target": example.target,
                **{_called(*key): said[n] for key, said in texts.written.items() if n < len(said)},
            }
            for n, (row, example) in enumerate(zip(texts.rows, texts.examples, strict=True))
        ]


def _called(system: str, decoding: str) -> str:
    return system if decoding == "greedy" else f"{system}_{decoding}"


def _measured(
    targets: list[str], texts: list[str], metrics: Sequence[TextMetric]
) -> dict[str, np.ndarray | Estimate | float]:
    return {name: value for metric in metrics for name, value in metric(targets, texts).items()}
