"""UserLLM: a user encoder, a fusion, and a pretrained language model that answers for *that* user."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from userllm.contextual import ContextualLM
from userllm.data.collation import HistoryCollator
from userllm.data.titles import listed
from userllm.data.vocabulary import Vocabulary
from userllm.decoding.next_token import TextDecoding
from userllm.encoders import EncoderConfig, TextEncoder, UserEncoder
from userllm.encoders.text_start import TextStart
from userllm.errors import UserError
from userllm.events import Event, HistoryBatch, UserHistory
from userllm.fusion.attach import UserContext
from userllm.fusion.config import FusionConfig
from userllm.fusion.source import decoder_start
from userllm.hub import download, is_repo_id, upload
from userllm.language_models.adapter import Adapter
from userllm.language_models.end_tokens import end_tokens
from userllm.language_models.pretrained import LanguageModelConfig, ResolvedLM, load
from userllm.language_models.summaries import Summarizer
from userllm.model_card import write_description
from userllm.saved_model import (
    FORMAT_VERSION,
    TEXT_START,
    check_replaceable,
    described_encoder,
    field_shapes,
    file_sha256,
    fill_weights,
    package_version,
    read_description,
    saved_fusion,
    saved_reader,
    where_from,
)
from userllm.serving.record import Kept, UserRecord, context_of, extend, last_time, remember, why_not_extended
from userllm.serving.user_side import UserSide
from userllm.tasks import ClosedTask, Task, TaskConfig, build_task
from userllm.tensor_file import give_usual_rights, save_tensors
from userllm.text_in_lm import TextInLM

Strategy = Literal["full", "lora", "enc", "proj"]
_USERS = 64
"""Users answered at a time, however many are asked about: each has keys and values of a prompt."""

__all__ = ["Attended", "FusionConfig", "Recommendation", "UserLLM", "encoder_for"]


@dataclass(frozen=True)
class Recommendation:
    """An answer of a closed task: the catalogue's raw id (or the label), its text, its log-likelihood in nats."""

    item: str
    title: str
    log_likelihood: float


@dataclass(frozen=True)
class Attended:
    """How much of the language model's attention a past event got: a share of 1 over the events it saw."""

    event: Event
    title: str
    weight: float


class UserLLM(ContextualLM):
    """A contextualised language model with everything it needs to answer: catalogue, vocabulary, tasks.

    collator: turns histories into batches; its item table is the catalogue. reference: where the LM came from.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encoder: UserEncoder,
        fusion: FusionConfig,
        tasks: Mapping[str, Task],
        collator: HistoryCollator,
        reference: ResolvedLM,
        strategy: Strategy = "enc",
        adapter: Adapter | None = None,
    ):
        summarizer = summarizer_of(fusion, reference)
        super().__init__(lm, tokenizer, encoder, fusion, tasks, event_texts(collator), summarizer)
        self.summarizer = summarizer
        self.collator = collator
        self.reference = reference
        self.strategy: Strategy = strategy
        self.adapter = adapter
        self.text_start: TextStart | None = None
        """What an embedding of a new title needs, where item embeddings started from the titles; see ``growing``."""
        self.run: dict[str, Any] = {}
        """What is known of the run that made this model: dataset, split, results. For its card; see ``model_card``."""

    # ---- answers --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, history: UserHistory) -> Tensor:
        """User embeddings [M, U] of one history, the latest last; of most encoders one per event seen (v1 section 3.1).
        Raises UserError for what is no history."""
        embeddings, mask = self.encoder.eval()(self._batch([history]))
        return embeddings[0][mask[0]]

    @torch.no_grad()
    def remember(self, history: UserHistory, *, keys_values: bool = False, state: bool = False) -> UserRecord:
        """What answers need of a user, computed once; ``recommend``, ``score`` and ``generate`` take it for a history.

        keys_values, state: see ``serving.record.Kept``; with a state ``extend`` can go on from it. Raises UserError for
        what is no history.
        """
        self.eval()
        record, *_ = remember(
            UserSide.of(self), self._batch([history]), [len(history)], [self._seen(history)],
            Kept(keys_values, state),
        )  # fmt: skip
        record.user = history.user
        return record

    @torch.no_grad()
    def extend(self, record: UserRecord, events: Sequence[Event]) -> UserRecord:
        """The user after new events, oldest first: what ``remember`` of the whole history gives, to float tolerance.

        Only the new events are encoded. Raises UserError where that cannot be exact, with the reason, and where the
        record was made without ``state=True``.
        """
        added = UserHistory(events)  # says what is no event
        self.eval()
        side, keep = UserSide.of(self), Kept(record.keys_values is not None, True)
        if (reason := why_not_extended(side, record, len(added))) is not None:
            raise UserError(f"this user's history cannot be continued: {reason}; use remember(history)")
        latest = last_time(record) if record.events else None
        first = next((event for event in added.events if event.time is not None), None)
        if latest is not None and first is not None and first.time is not None and first.time < latest:
            raise UserError(
                f"{first.item!r} (time {first.time}) is earlier than the latest event of the record (time {latest}); "
                "a history is continued by later events: use remember(history)"
            )
        before = [Event("", latest)] if record.events else []  # a time gap is from here on
        new = UserHistory([*before, *added.events])
        batch = self._batch([new], len(added)) if len(added) else self._batch([UserHistory([])])
        extended, *_ = extend(side, [record], batch, [self._seen(added)], keep)
        return extended

    @overload
    def recommend(
        self, history: UserHistory | UserRecord, k: int = 10, *, task: str = "next_item", beams: int | None = None,
        exclude_seen: bool = True,
    ) -> list[Recommendation]: ...  # fmt: skip
    @overload
    def recommend(
        self, history: Sequence[UserHistory | UserRecord], k: int = 10, *, task: str = "next_item",
        beams: int | None = None, exclude_seen: bool = True,
    ) -> list[list[Recommendation]]: ...  # fmt: skip
    def recommend(
        self,
        history: UserHistory | UserRecord | Sequence[UserHistory | UserRecord],
        k: int = 10,
        *,
        task: str = "next_item",
        beams: int | None = None,
        exclude_seen: bool = True,
    ) -> list[Recommendation] | list[list[Recommendation]]:
        """The k best answers to a closed task, best first: for one user, or one list per user.

        A user is a history, or what ``remember`` or a ``UserStore`` keeps of one. What is unknown in a history is named
        in a warning. ``beams`` defaults to max(k, 20). Raises UserError for an unknown task, k < 1 or beams < 1.
        """
        histories = _users(history)
        asked = self._task(task)
        _whole_number(k, "k", "ask for at least one answer")
        if beams is not None:
            _whole_number(beams, "beams", "the search needs at least one")
        if not histories:
            return []
        exclude = asked.config.kind == "next_item" and exclude_seen
        k = min(k, len(asked.answers))
        lists: list[list[Recommendation]] = []
        for some in _parts(histories):
            excluded = self._excluded(some, len(asked.answers)) if exclude else None
            found = self.rank_answers(task, self.users(some), k, beams or max(k, 20), excluded)
            lists += [
                [self._recommendation(asked, a, s) for a, s in zip(answers, scores, strict=True) if a >= 0]
                for answers, scores in zip(found.answers.tolist(), found.scores.tolist(), strict=True)
            ]
        return lists[0] if isinstance(history, UserHistory | UserRecord) else lists

    def _excluded(self, users: Sequence[UserHistory | UserRecord], items: int) -> Tensor:
        """Which of the catalogue's items each user has had, [B, items]."""
        excluded = torch.zeros(len(users), items, dtype=torch.bool, device=self.lm.device)
        for b, one in enumerate(users):
            excluded[b, one.seen if isinstance(one, UserRecord) else self._seen(one)] = True
        return excluded

    def recommend_without_user(self, k: int = 10, *, task: str = "next_item") -> list[Recommendation]:
        """What the LM, knowing nobody, finds most likely among the same answers: the base LM, if its own weights were
        not trained. Raises UserError as ``recommend``."""
        asked = self._task(task)
        _whole_number(k, "k", "ask for at least one answer")
        scores, best = self.eval().all_log_likelihoods(task, None).topk(min(k, len(asked.answers)))
        return [
            self._recommendation(asked, a, s) for a, s in zip(best.tolist(), scores.tolist(), strict=True)
        ]

    @torch.no_grad()
    def score(
        self,
        history: UserHistory | UserRecord | Sequence[UserHistory | UserRecord],
        items: Sequence[str] | None = None,
        *,
        task: str = "next_item",
        block: int = 256,
    ) -> Tensor:
        """Exact log-likelihoods, in nats, of given answers: [A] for one user, [B, A] for a list of users.

        items: raw ids or unique titles of the catalogue in any order (of another task than next item: its answers);
        the whole catalogue, in its order, by default. What the user has had already is scored like the rest. block:
        texts advanced at once, which bounds the memory. Raises UserError naming the items that are unknown.
        """
        asked = self._answers_of(self._task(task), items)
        _whole_number(block, "block", "at least one text is advanced at once")
        alone, histories = isinstance(history, UserHistory | UserRecord), _users(history)
        scores = torch.empty(0, len(asked))
        if histories:
            each = [
                self.score_answers(task, self.users(some), asked, block).cpu() for some in _parts(histories)
            ]
            scores = torch.cat(each)
        return scores[0] if alone else scores

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        history: UserHistory | UserRecord | None,
        *,
        max_new_tokens: int = 32,
        num_beams: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        chat: bool = False,
    ) -> str:
        """Free text for a user (None: the base LM). Greedy unless told otherwise.

        chat: put the prompt into the LM's chat template; the text then ends with a turn, too. The decoding settings are
        these and no others: of the LM's own generation_config only the tokens that end a turn are heard. Raises
        UserError for an empty prompt, settings out of range, several users, and ``chat`` without a template.
        """
        if not isinstance(prompt, str):
            raise UserError(f"the prompt is {repr(prompt)[:60]}; give one text")
        if any(0xD800 <= ord(letter) < 0xE000 for letter in prompt):
            raise UserError(
                f"the prompt {repr(prompt)[:60]} holds half a character; give text that UTF-8 can hold"
            )
        TextDecoding(max_new_tokens, sample=do_sample, temperature=temperature).check()
        _whole_number(num_beams, "num_beams", "it must be at least 1")
        self.eval()
        text = prompt
        if chat:
            if self.tokenizer.chat_template is None:
                raise UserError(f"{self.reference.name} has no chat template; ask without chat")
            message = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        # a chat template writes its own special tokens
        ids = (
            self.tokenizer(str(text), add_special_tokens=False)["input_ids"]
            if chat
            else self.read_as(str(text))
        )
        ids = torch.tensor([ids], dtype=torch.long, device=self.lm.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if inputs["input_ids"].shape[1] == 0:
            raise UserError("the prompt is empty; the language model needs at least one token")
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=do_sample,
            temperature=temperature if do_sample else 1.0,
            top_k=0 if do_sample else 50,
            top_p=1.0,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        users = None if history is None else self.users([_one(history)])
        if self.has_encoder:
            settings.decoder_start_token_id = decoder_start(self.lm)
            source = self.read_source(inputs["input_ids"], None if users is None else users.prefix)
            inputs = {"encoder_outputs": BaseModelOutput(source.states), "attention_mask": source.mask.long()}
            return self._generated(inputs, settings, users, 0, chat)
        begun = 0
        if (users is not None and users.prefix is not None) or (
            self.reads_ahead and inputs["input_ids"].shape[1] > 1
        ):
            cache, mask = self.read_prompt(inputs["input_ids"][:, :-1], users)
            begun = 0 if mask is None else mask.shape[1] + 1 - inputs["input_ids"].shape[1]
            # what was read as embeddings has no token ids: any will do, they are not read again
            inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (begun, 0))
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            cache.batch_repeat_interleave(num_beams)
            inputs["past_key_values"] = cache
        length = inputs["input_ids"].shape[1]
        if self._position_limit is not None:
            self._check_length(self._position_limit, length + max_new_tokens - 1, None, None)
        return self._generated(inputs, settings, users, length, chat)

    def _generated(
        self,
        inputs: Mapping[str, Any],
        settings: GenerationConfig,
        users: UserContext | None,
        read: int,
        chat: bool,
    ) -> str:
        """What transformers writes, without the ``read`` tokens it repeats."""
        with self.conditioned_or_not(users):  # no other thread's turn meanwhile
            if chat:
                settings.eos_token_id = end_tokens(self.lm, self.tokenizer)
            shipped, self.lm.generation_config = self.lm.generation_config, GenerationConfig()
            try:  # transformers fills what ``settings`` leaves open from the LM's own configuration
                output = self.lm.generate(**inputs, generation_config=settings)  # type: ignore[operator]
            finally:
                self.lm.generation_config = shipped
        return str(self.tokenizer.decode(output[0, read:], skip_special_tokens=True))

    @torch.no_grad()
    def explain(self, history: UserHistory, *, task: str = "next_item") -> list[Attended]:
        """Which past events the LM attended to when it began its answer, latest last.

        Attention of the prompt's last token, averaged over heads and over the fused layers, each layer weighted by the
        size of its gate. Raises UserError with a Perceiver in between: latents stand for no single event.
        """
        if self.config.perceiver is not None:
            raise UserError(
                "explain: a Perceiver mixes events before the LM sees them; train without it to explain"
            )
        if self.config.kind != "cross_attention":
            raise UserError(f"explain: fusion.kind {self.config.kind} has no cross-attention to look at")
        if not self.encoder.per_event:
            raise UserError(
                "explain: this encoder's embeddings stand for no single event; an autoregressive one's do"
            )
        self._task(task)
        self.eval()
        users = self.context(self._batch([history]))
        users.recorded = {}
        with self.attending(users):
            TextInLM(self, 1, task, context=users).start(self.answers[task].prompt_ids)
        gates = {index: abs(value) for index, value in self.gates.items()}
        whole = sum(gates.values())
        share = {index: value / whole if whole > 0 else 1 / len(gates) for index, value in gates.items()}
        weights = sum(share[index] * seen[-1][0, -1] for index, seen in users.recorded.items())
        assert isinstance(weights, Tensor)
        kept = list(history.events)[-min(self.config.events, self.encoder.max_length) :]
        tail = weights[len(weights) - len(kept) :].tolist() if kept else []
        return [Attended(e, self.title(e.item), w) for e, w in zip(kept, tail, strict=True)]

    def title(self, item: str) -> str:
        """An item's title; its id where the catalogue does not know it."""
        row = self.collator.row_of(item)
        return str(self.collator.items["title"][row]) if row < self.collator.num_items else item

    @torch.no_grad()
    def users(self, who: Sequence[UserHistory | UserRecord]) -> UserContext:
        """What ``conditioned`` takes, of users as histories or as they were remembered."""
        self.eval()
        histories = [one for one in who if isinstance(one, UserHistory)]
        if len(histories) == len(who):
            return self.context(self._batch(histories))
        return context_of(self, [self.remember(one) if isinstance(one, UserHistory) else one for one in who])

    def _batch(self, histories: Sequence[UserHistory], latest: int | None = None) -> HistoryBatch:
        """The histories' latest events, as many as the encoder sees, or ``latest``. Raises UserError for what is no
        history."""
        for history in histories:
            if not isinstance(history, UserHistory):
                raise UserError(f"{repr(history)[:60]} is no history; give a UserHistory")
        batch, unread = self.collator.from_histories(histories, latest or self.encoder.max_length)
        if unread:
            warnings.warn(str(unread), stacklevel=4)
        return batch.to(self.lm.device)

    def _seen(self, history: UserHistory) -> Tensor:
        """Rows of the catalogue that stand in a history, each once."""
        rows = {self.collator.row_of(event.item) for event in history.events} - {self.collator.num_items}
        return torch.tensor(sorted(rows), dtype=torch.long)

    def _task(self, name: str) -> ClosedTask:
        if name not in self.tasks:
            raise UserError(
                f"this model was not trained for a task {name!r}; it knows {', '.join(self.tasks)}"
            )
        if name not in self.closed_tasks:
            raise UserError(
                f"task {name} is answered in free text; use generate with a prompt such as "
                f"{self.tasks[name].config.prompt!r}"
            )
        return self.closed_tasks[name]

    @property
    def first_closed_task(self) -> str:
        """The first task that has known answers. Raises UserError where the model was trained for free text only."""
        if not self.closed_tasks:
            raise UserError(f"tasks {', '.join(self.tasks)} are answered in free text; use generate")
        return next(iter(self.closed_tasks))

    def _answers_of(self, task: ClosedTask, items: Sequence[str] | None) -> Tensor:
        """Numbers [A] of the answers that go by these names."""
        if items is None:
            return torch.arange(len(task.answers), device=self.lm.device)
        if isinstance(items, str):
            raise UserError(f"items is the text {items!r}; give a list of ids or titles")
        if task.config.kind == "next_item":
            rows, known = [self.collator.row_of(item) for item in items], self.collator.num_items
            give = "give ids of the catalogue, or titles that only one item has"
        else:
            number = {answer: n for n, answer in enumerate(task.answers)}
            rows, known = [number.get(item, len(number)) for item in items], len(number)
            give = f"its answers are {listed(task.answers)}"
        if unknown := list(dict.fromkeys(str(i) for i, row in zip(items, rows, strict=True) if row == known)):
            raise UserError(f"unknown to task {task.name}: {listed(unknown)}; {give}")
        return torch.tensor(rows, dtype=torch.long, device=self.lm.device)

    def _recommendation(self, task: ClosedTask, answer: int, score: float) -> Recommendation:
        text = task.answers[answer]
        item = str(self.collator.items["id"][answer]) if task.config.kind == "next_item" else text
        return Recommendation(item, text, score)

    # ---- saving and loading ---------------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str, name: str | None = None) -> None:
        """Write one folder that ``from_pretrained`` reads: weights as safetensors, the rest as JSON and Parquet.

        A frozen LM is stored as a reference with its hash, a LoRA adapter as a plain peft folder, a fully trained LM
        as a Hugging Face folder. A README.md says what it is, under ``name`` (by default the folder's). The folder
        appears whole or not at all; an earlier model in it is replaced. Raises UserError where something else is there,
        or beside the earlier model.
        """
        folder = Path(folder).resolve()  # what a link leads to is replaced, and not the link
        check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            partial = Path(scratch) / "model"
            partial.mkdir()
            save_tensors(self.encoder.state_dict(), partial / "encoder.safetensors")
            save_tensors(self.fusion_weights(), partial / "fusion.safetensors")
            if self.text_start is not None:
                self.text_start.save(partial / TEXT_START)
            if isinstance(self.encoder, TextEncoder):
                self.encoder.save_texts(partial / "sentences")
            self.collator.vocabulary.save(partial / "vocabulary.json")
            self.collator.items.write_parquet(partial / "items.parquet")
            with self.attachment.detached():
                if self.strategy == "lora" and self.adapter is not None:
                    self.adapter.save(partial / "adapter")
                elif self.strategy == "full":
                    self.lm.save_pretrained(partial / "lm")
                    self.tokenizer.save_pretrained(partial / "lm")
            description = {
                "format_version": FORMAT_VERSION,
                "created_by": f"userllm {package_version()}",
                "strategy": self.strategy,
                "lm": {
                    "name": where_from(self.reference),
                    "source": self.reference.source,
                    "sha256": self.reference.sha256,
                    "revision": self.reference.revision,
                    "dtype": str(self.lm.dtype).removeprefix("torch."),
                    # what the weights' own precision does by itself is not asked for again
                    "products": self.reference.products if self.lm.dtype == torch.float32 else "float32",
                },
                "encoder": described_encoder(self.encoder),
                "fields": [asdict(field) for field in field_shapes(self.collator.vocabulary)],
                "vocabulary": file_sha256(partial / "vocabulary.json"),
                "fusion": asdict(self.config),
                "tasks": {name: asdict(task.config) for name, task in self.tasks.items()},
                "run": self.run,
            }
            write_description(partial, description, name or folder.name)
            give_usual_rights(partial, partial / "config.json")
            replaced = Path(scratch) / "replaced"
            if folder.exists():
                folder.rename(replaced)
            try:
                partial.rename(folder)
            except OSError:
                if replaced.exists():
                    replaced.rename(folder)
                raise

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        commit_message: str = "Upload a userllm model",
        create_pr: bool = False,
    ) -> str:
        """Upload what ``save_pretrained`` writes to a model repository of the Hugging Face hub; returns its address.

        The repository is made where there is none, as ``private`` says (None: as the hub does by default, which may
        be public). The catalogue goes along: look at your dataset's terms first. Raises UserError within seconds
        where the hub cannot be reached or refuses.
        """
        return upload(
            lambda folder: self.save_pretrained(folder, name=repo_id),
            repo_id,
            revision=revision,
            token=token,
            private=private,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        lm: str | None = None,
        encoder: UserEncoder | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> UserLLM:
        """Load what ``save_pretrained`` wrote: a folder, or a model on the Hugging Face hub by its id, OWNER/NAME.

        lm: where the language model is, if not where it was; of a model of strategy full it lies in the folder.
        encoder: an encoder of your own, which userllm cannot build; it gets the saved weights. revision, token: of a
        model on the hub (a folder of that name comes first).
        Raises UserError where the folder is no model, the hub cannot be reached or refuses, the language model's
        weights are not the ones the model was trained with, another one is given to a model of strategy full, or
        encoder or vocabulary does not fit.
        """
        if not Path(folder).exists() and is_repo_id(str(folder)):
            folder = download(str(folder), revision, token)
        folder = Path(folder)
        file, saved = folder / "config.json", read_description(folder)
        strategy: Strategy = saved["strategy"]
        if strategy == "full" and lm is not None:
            raise UserError(
                f"{file}: its language model was trained with it and lies in {folder / 'lm'}; leave out lm, which is "
                f"{lm!r}"
            )
        where = str(folder / "lm") if strategy == "full" else lm or saved["lm"]["name"]
        products = saved["lm"].get("products", "float32")  # older folders do not say
        asked = LanguageModelConfig(name=where, dtype=saved["lm"]["dtype"], products=products)
        if where == saved["lm"]["name"]:
            asked.revision = saved["lm"].get("revision")  # folders written by userllm 0.1.0 do not say
        base, tokenizer, reference = load(asked)
        if strategy == "full":  # where the LM came from, not where it was put
            origin = saved["lm"]
            told = {key: origin.get(key) for key in ("name", "source", "sha256", "revision")}
            reference = replace(reference, **told)
        if strategy != "full" and reference.sha256 != saved["lm"]["sha256"]:
            raise UserError(
                f"{file}: trained with {saved['lm']['name']} (sha256 {saved['lm']['sha256'][:12]}...), but {where} has "
                f"sha256 {reference.sha256[:12]}...; give the original language model"
            )
        adapter = Adapter.load(base, folder / "adapter") if strategy == "lora" else None
        encoder, collator = saved_reader(folder, saved, encoder)
        tasks = {
            n: build_task(n, TaskConfig(**config), collator.items) for n, config in saved["tasks"].items()
        }
        model = cls(
            base,
            tokenizer,
            encoder,
            saved_fusion(saved["fusion"]),
            tasks,
            collator,
            reference,
            strategy,
            adapter,
        )
        fill_weights(model.fusion_weights(), folder / "fusion.safetensors")
        if (folder / TEXT_START).is_file():
            model.text_start = TextStart.load(folder / TEXT_START)
        model.run = saved.get("run", {})  # folders written by userllm 0.1.0 have none
        model.requires_grad_(False)
        return model.eval()

    def fusion_weights(self) -> dict[str, Tensor]:
        """What the fusion has learned, by name; the tensors are the model's own."""
        weights = {f"user_tokens.{name}": value for name, value in self.user_tokens.state_dict().items()}
        if self.soft_prompt is not None:
            weights |= {f"soft_prompt.{name}": value for name, value in self.soft_prompt.state_dict().items()}
        if self.catalogue is not None:
            weights |= {f"catalogue.{name}": value for name, value in self.catalogue.state_dict().items()}
        for index, block in self.attachment.blocks.items():
            weights |= {f"blocks.{index}.{name}": value for name, value in block.state_dict().items()}
        return weights


def encoder_for(vocabulary: Vocabulary, config: EncoderConfig) -> UserEncoder:
    """An encoder with random weights for a vocabulary's fields."""
    return config.build(field_shapes(vocabulary))


def summarizer_of(fusion: FusionConfig, own: ResolvedLM) -> Summarizer | None:
    """What writes the summaries that stand before the prompt, if any do: by default the LM itself, before training."""
    if (config := fusion.text.summary) is None:
        return None
    lm = LanguageModelConfig(name=own.name, revision=own.revision)
    if config.lm is not None:
        lm = LanguageModelConfig(name=config.lm)
    lm.products = own.products
    return Summarizer(lm, config.instruction, config.new_tokens, config.batch)


def event_texts(collator: HistoryCollator) -> dict[str, list[str]]:
    """By field of the history batches, what its vocabulary ids read like; the item's title goes by "title"."""
    texts = {f.name: ["", "unknown", *f.values] for f in collator.vocabulary}
    titles = dict(zip(collator.items["id"].to_list(), collator.items["title"].to_list(), strict=True))
    items = collator.vocabulary["item"].values
    return texts | {"title": ["", "something unknown", *(str(titles[i]) for i in items)]}


def _parts(users: Sequence[UserHistory | UserRecord]) -> Iterator[Sequence[UserHistory | UserRecord]]:
    """Users as many at a time as are answered together."""
    for start in range(0, len(users), _USERS):
        yield users[start : start + _USERS]


def _whole_number(value: object, what: str, why: str) -> None:
    """Raise UserError for what is no whole number from 1 on."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise UserError(f"{what} is {value!r}; {why}")


def _users(
    who: UserHistory | UserRecord | Sequence[UserHistory | UserRecord],
) -> list[UserHistory | UserRecord]:
    """One user or several as a list. Raises UserError for anything else."""
    several = [who] if isinstance(who, UserHistory | UserRecord) else who
    if not isinstance(several, Sequence) or not all(
        isinstance(one, UserHistory | UserRecord) for one in several
    ):
        raise UserError(
            f"{repr(who)[:60]} is no user; give a UserHistory, what remember or a store keeps of one, or a list "
            "of these"
        )
    return list(several)


def _one(who: UserHistory | UserRecord) -> UserHistory | UserRecord:
    """One user. Raises UserError for several, or anything else."""
    if isinstance(who, UserHistory | UserRecord):
        return who
    raise UserError(
        f"{repr(who)[:60]} is not one user; give a UserHistory, or what remember or a store keeps of one"
    )
