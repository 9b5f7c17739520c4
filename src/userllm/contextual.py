"""A language model that knows its user: the arithmetic of User-LLM, on tensors.

    events -> user embeddings -> user tokens -> a contextualised LM -> text or items

User tokens come in by cross-attention between layers or as soft prompts before the text; latest events may also be
written out as text before the prompt. What stands before the prompt is the user's ``Prefix``.

``model.UserLLM`` puts histories, titles, saving and loading around it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from userllm.closed_answers import answer_losses, scores_of_answers
from userllm.decoding.answers import Advice, ClosedAnswers, LogitHead
from userllm.decoding.beam_search import Ranking, search_answers
from userllm.decoding.next_token import TextDecoding
from userllm.decoding.prefix_tree import NodeMasses, PrefixTree
from userllm.encoders import UserEncoder
from userllm.errors import UserError
from userllm.events import HistoryBatch
from userllm.free_text import text_losses, write_texts
from userllm.fusion.attach import Attachment, UserContext, find_layers
from userllm.fusion.catalogue import CatalogueWeights, LikelyItems
from userllm.fusion.config import FusionConfig
from userllm.fusion.cross_attention import CrossAttentionBlock
from userllm.fusion.history_summary import HistorySummary, Summarize
from userllm.fusion.history_text import HistoryText
from userllm.fusion.prefix import Prefix, position_ids
from userllm.fusion.projection import UserTokens
from userllm.fusion.soft_prompt import SoftPrompt
from userllm.fusion.source import Source, decoder_start, has_encoder, no_prefix, read_source
from userllm.language_models.positions import position_limit
from userllm.language_models.word_start import lead
from userllm.lower_states import LowerStates
from userllm.tasks import ClosedTask, OpenTask, Task
from userllm.text_in_lm import TextInLM, TextTreeInLM, reads_trees


class ContextualLM(nn.Module):
    """A language model contextualised by user embeddings (User-LLM section 3).

    lm: any Hugging Face causal LM, or an encoder-decoder of the T5 family, with its LoRA adapter already in, if any; it
    is changed in place by wrappers that ``self.attachment.detach()`` takes off again. encoder: see ``encoders.base``.
    tasks: by name, closed and open ones.
    event_texts: by field, "title" for the item, the text of each vocabulary id; needed for ``fusion.text`` only.
    summarize: histories as text to summaries; needed for ``fusion.text.summary`` only.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encoder: UserEncoder,
        fusion: FusionConfig,
        tasks: Mapping[str, Task],
        event_texts: Mapping[str, Sequence[str]] | None = None,
        summarize: Summarize | None = None,
    ):
        super().__init__()
        fusion.check()
        self.has_encoder = has_encoder(lm)
        layers = DynamicCache(config=lm.config).layers
        if not all(
            isinstance(x, DynamicLayer) and not isinstance(x, LinearAttentionCacheLayerMixin) for x in layers
        ):
            raise UserError(
                f"{type(lm).__name__} keeps a recurrent state; userllm needs an LM with attention in every layer"
            )
        self.lm = lm
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.config = fusion
        self.tasks = dict(tasks)
        text_config = lm.config.get_text_config()
        self.user_tokens = UserTokens.of(fusion, encoder.width)
        blocks = {
            index: CrossAttentionBlock(fusion.block, text_config.hidden_size, encoder.width)
            for index in fusion.layer_indices(len(find_layers(lm)))
        }
        some_text = tokenizer("a", add_special_tokens=True)["input_ids"]
        first, last = some_text[:1], some_text[-1:]  # type: ignore[index]
        self._opening: list[int] = first if first == [tokenizer.bos_token_id] else []
        ends = last == [tokenizer.eos_token_id]
        self._closing: list[int] = last if self.has_encoder and ends else []
        self.lead = lead(tokenizer)
        self._ends_prompts = ends and not self.has_encoder
        self.soft_prompt = None
        if fusion.kind == "soft_prompt":
            some = torch.linspace(0, text_config.vocab_size - 1, 1000, device=lm.device).long()
            words = self._embed(some).detach().float()
            # an LM may project its input embeddings to the hidden size (opt-350m)
            self.soft_prompt = SoftPrompt(
                fusion.soft_prompt,
                fusion.projection,
                encoder.width,
                words.shape[-1],
                float(words.pow(2).mean().sqrt()),
            )
        self.history_text: HistoryText | HistorySummary | None = None
        if fusion.text.summary is not None:
            self.history_text = HistorySummary(fusion.text, event_texts or {}, tokenizer, summarize)
        elif fusion.text.events > 0:
            self.history_text = HistoryText(fusion.text, event_texts or {}, tokenizer, self.lead)
        self.head = LogitHead.of(lm)
        self._questions: dict[str, Tensor] = {}
        self.answers = {name: self._closed_answers(task) for name, task in self.closed_tasks.items()}
        self.attachment = Attachment(lm, blocks)
        self.catalogue = self._catalogue()
        self.lower: dict[str, LowerStates] = {}
        self._prompts: dict[str, DynamicCache] = {}
        self.lm_is_frozen = False

    def train(self, mode: bool = True) -> ContextualLM:
        """Training mode, except that a frozen LM and a frozen encoder stay as they answer (no dropout)."""
        super().train(mode)
        if self.lm_is_frozen:
            self.lm.eval()
        if not any(weight.requires_grad for weight in self.encoder.parameters()):
            self.encoder.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ContextualLM:
        """Behind ``to``, ``double`` and so on: the answers follow the LM; stored states are dropped if it changed."""
        before = self.lm.device, self.lm.dtype
        super()._apply(fn, recurse)
        if (self.lm.device, self.lm.dtype) != before:
            self.follow_lm()
        return self

    def follow_lm(self) -> None:
        """Take the answers to where the LM is now; drop what was stored of it."""
        self.answers = {name: closed.to(self.lm.device) for name, closed in self.answers.items()}
        self._questions = {name: ids.to(self.lm.device) for name, ids in self._questions.items()}
        self.forget_lower_states()

    @property
    def closed_tasks(self) -> dict[str, ClosedTask]:
        """The tasks with a closed set of answers."""
        return {name: task for name, task in self.tasks.items() if isinstance(task, ClosedTask)}

    @property
    def open_tasks(self) -> dict[str, OpenTask]:
        """The tasks that are answered in free text."""
        return {name: task for name, task in self.tasks.items() if isinstance(task, OpenTask)}

    # ---- users ----------------------------------------------------------------------------------------------------

    def context(
        self, histories: HistoryBatch, rows: Tensor | None = None, ends: Tensor | None = None
    ) -> UserContext:
        """Users the LM can be conditioned on: one per history, or one per (row [E], events seen [E])."""
        if rows is None:
            rows = torch.arange(len(histories), device=histories.mask.device)
        if ends is None:
            ends = histories.lengths[rows]
        causal = self.encoder.causal
        if self.config.kind == "none":
            embeddings = torch.zeros(len(rows), 0, self.encoder.width, device=rows.device)
            tokens, mask = embeddings, torch.zeros(len(rows), 0, dtype=torch.bool, device=rows.device)
        elif causal:  # one pass over a history knows what each of its prefixes would give
            embeddings, _ = self.encoder(histories)
            tokens, mask = self.user_tokens(embeddings, rows, ends)
        else:
            embeddings, seen = self.encoder(histories.select(rows).prefixes(ends))
            everyone = torch.arange(len(rows), device=rows.device)
            tokens, mask = self.user_tokens(embeddings, everyone, seen.sum(1))
        text = None if self.history_text is None else self.history_text(histories, rows, ends)
        scores = None
        if self.catalogue is not None:
            at_least_one = ends.clamp_min(1)
            scores = self.encoder.item_scores(embeddings[rows, at_least_one - 1]) if causal else None
            if scores is None:
                scores = self.encoder.next_item_scores(histories, rows, at_least_one)
        return self.context_from(tokens, mask, text, scores, ends > 0)

    def context_from(
        self,
        tokens: Tensor,
        mask: Tensor,
        text: tuple[Tensor, Tensor] | None,
        scores: Tensor | None,
        known: Tensor,
    ) -> UserContext:
        """The context of B users, from what is known of them by now.

        tokens [B, M, U], mask [B, M]. text: their histories as token ids and mask, each [B, P], where ``fusion.text``
        asks for that. scores [B, items]: the encoder's, for ``fusion.catalogue``. known [B]: who has a history.
        """
        users = UserContext(tokens, mask, self._prefix(tokens, mask, text))
        if self.catalogue is not None and scores is not None:
            users.likely = LikelyItems(NodeMasses(self._titles, torch.softmax(scores.float(), -1)), known)
        return users

    def _catalogue(self) -> CatalogueWeights | None:
        if self.config.catalogue is None:
            return None
        if not any(self.names_items(name) for name in self.closed_tasks):
            raise UserError("fusion.catalogue needs a task of kind next_item: its answers are the titles")
        if not self.encoder.ranks_items:
            raise UserError("fusion.catalogue needs an encoder that ranks the catalogue; this one cannot")
        return CatalogueWeights(self.config.catalogue)

    def advice(self, task: str, users: UserContext | None, rows: Tensor | None = None) -> Advice | None:
        """The encoder's say in a task's choices. rows [Q]: the text of each, where every text has a user of its own or
        all have one; by default each user has as many choices as the next.
        """
        weights, likely = self.catalogue, None if users is None else users.likely
        if weights is None or likely is None or not self.names_items(task):
            return None

        def advice(logits: Tensor, nodes: Tensor, within: Tensor, children: Tensor) -> Tensor:
            if rows is None:
                owners = torch.arange(len(nodes), device=nodes.device) // (len(nodes) // len(likely))
            else:
                owners = rows if len(likely) > 1 else torch.zeros_like(rows)
            return weights(logits, likely, owners, nodes, within, children)

        return advice

    def names_items(self, task: str) -> bool:
        """Whether the task's answers are the catalogue's titles."""
        return self.tasks[task].config.kind == "next_item"

    @property
    def _titles(self) -> PrefixTree:
        """The tree of the titles: the same for every task that names items."""
        return next(closed.tree for name, closed in self.answers.items() if self.names_items(name))

    def _prefix(self, tokens: Tensor, mask: Tensor, text: tuple[Tensor, Tensor] | None) -> Prefix | None:
        """What stands before the prompt: the LM's own opening tokens, soft prompts, the history's text."""
        if not self.config.has_prefix:
            return None
        opening = no_prefix(self._embed(self.opening), len(tokens))
        parts = [(opening.embeddings, opening.mask)]
        if self.soft_prompt is not None:
            parts += self.soft_prompt(tokens, mask)
        if text is not None:
            parts.append((self._embed(text[0]), text[1]))
        return Prefix.of(parts)

    @property
    def opening(self) -> Tensor:
        """Tokens that the tokenizer puts before any text (a BOS, or none), [O]."""
        return torch.tensor(self._opening, dtype=torch.long, device=self.lm.device)

    @property
    def closing(self) -> Tensor:
        """Tokens that the tokenizer puts behind any text that an LM's encoder reads (end of text, or none), [C]."""
        return torch.tensor(self._closing, dtype=torch.long, device=self.lm.device)

    def question(self, task: str) -> Tensor:
        """The prompt of a closed task as the LM reads it, [P]."""
        return self._questions[task] if self.has_encoder else self.answers[task].prompt_ids

    def _embed(self, ids: Tensor) -> Tensor:
        """The LM's token embeddings, as its first layer would take them."""
        return self.lm.get_input_embeddings()(ids)  # type: ignore[operator]

    @contextmanager
    def conditioned(self, users: UserContext) -> Iterator[UserContext]:
        """The LM attends to these users inside the ``with`` block: R text rows, R a multiple of the users. Other
        threads' calls of it wait.

        For calls of your own. Every token attends then, with ``attend="answer"``, too, where ``generate`` lets the
        prompt's last one begin. Raises UserError where something of the users stands before the prompt, which such a
        call would not read.
        """
        if users.prefix is not None:
            raise UserError(
                "something of these users stands before the prompt (soft prompts, or a history as text), and a call of "
                "the language model would not read that; use generate, recommend or score"
            )
        with self.attending(users) as context:
            yield context

    @contextmanager
    def attending(self, users: UserContext) -> Iterator[UserContext]:
        """``conditioned`` for those who see to the users' prefix themselves."""
        with self.attachment.conditioned(users) as context:
            yield context

    @contextmanager
    def without_user(self) -> Iterator[None]:
        """The LM is the base LM inside the ``with`` block."""
        with self.attachment.without_user():
            yield

    @contextmanager
    def conditioned_or_not(self, users: UserContext | None) -> Iterator[None]:
        if users is None:
            with self.without_user():
                yield
        else:
            with self.attending(users):
                yield

    @property
    def window(self) -> int:
        """How many of a history's latest events the LM can attend to."""
        return min(self.config.events, self.encoder.max_length)

    # ---- free text ------------------------------------------------------------------------------------------------

    def text_losses(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        users: UserContext | None,
        most: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood [E], in nats, of texts behind prompts, and their tokens [E]; see ``free_text``."""
        return text_losses(self, prompts, targets, users, most)

    def write_texts(
        self,
        prompts: Sequence[str],
        users: UserContext | None,
        decoding: TextDecoding,
        numbers: Sequence[int] | None = None,
    ) -> list[str]:
        """One new text behind each prompt; see ``free_text``."""
        return write_texts(self, prompts, users, decoding, numbers)

    # ---- closed answers -------------------------------------------------------------------------------------------

    def answer_log_likelihood(self, task: str, answers: Tensor, users: UserContext | None) -> Tensor:
        """Log-likelihood [E], in nats, of given answers [E], teacher-forced.

        users: one per answer, one for all, or None for the base LM.
        """
        return -self.answer_losses(task, answers, users)[0]

    def answer_losses(
        self,
        task: str,
        answers: Tensor,
        users: UserContext | None,
        teacher: Tensor | None = None,
        together: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Negative log-likelihood [E] of answers, and cross-entropy [E] against a teacher's distribution [E, N]; see
        ``closed_answers``."""
        return answer_losses(self, task, answers, users, teacher, together)

    def rank_answers(
        self,
        task: str,
        users: UserContext,
        k: int,
        beams: int | None = None,
        excluded: Tensor | None = None,
    ) -> Ranking:
        """The k best answers per user by constrained beam search; see ``decoding.beam_search.search_answers``."""
        with torch.no_grad(), self.attending(users):
            texts = TextTreeInLM if self.reads_trees else TextInLM
            return search_answers(
                texts(self, len(users), task, context=users),
                self.answers[task],
                self.head,
                len(users),
                k,
                beams,
                excluded,
                self.advice(task, users),
            )

    def score_answers(
        self, task: str, users: UserContext | None, answers: Tensor | None = None, block: int = 256
    ) -> Tensor:
        """Exact log-likelihood [B, A], in nats, of answers [A] (all by default) per user; None: the base LM, B = 1. See
        ``closed_answers``."""
        return scores_of_answers(self, task, users, answers, block)

    def all_log_likelihoods(self, task: str, users: UserContext | None, batch: int = 64) -> Tensor:
        """Log-likelihood of every answer, [N], for one user (or for the base LM): every text is scored once."""
        if users is not None and len(users) != 1:
            raise ValueError(f"all answers are scored for one user at a time, not for {len(users)}")
        everything = torch.arange(len(self.answers[task]), device=self.answers[task].prompt_ids.device)
        order = torch.argsort(self.answers[task].reach, stable=True)  # alike lengths together
        scores = torch.empty(len(everything), device=everything.device)
        with torch.no_grad():
            for part in everything[order].split(batch):
                scores[part] = self.answer_log_likelihood(task, part, users)
        return scores

    def prompt_cache(self, task: str, rows: int, replayed: bool) -> DynamicCache:
        """Keys and values of a task's prompt but its last token, read without a user, for ``rows`` texts.

        replayed: layers below the first fused one will be replayed, so all they need is a stand-in of the right length.
        """
        prompt = self.answers[task].prompt_ids[:-1]
        stored = self._prompts[task] if task in self._prompts else self._read_without_user(prompt[None])
        # layers are copied whole: one of sliding attention holds fewer tokens than it has read, and has to know both
        cache = copy.copy(stored)
        cache.layers = [copy.copy(layer) for layer in stored.layers]
        if replayed:
            for layer in cache.layers[: self.attachment.first]:
                assert isinstance(layer, DynamicLayer) and layer.keys is not None
                layer.keys = layer.values = torch.zeros(1, 1, layer.keys.shape[2], 1, device=prompt.device)
        cache.batch_repeat_interleave(rows)
        return cache

    @property
    def reads_ahead(self) -> bool:
        """Whether the prompt but its last token is read before anything attends to user tokens."""
        return self.config.attend == "answer" and len(self.attachment.blocks) > 0 and not self.has_encoder

    @cached_property
    def reads_trees(self) -> bool:
        """See ``text_in_lm.reads_trees``, which is asked once."""
        return reads_trees(self)

    def source_of(self, task: str, users: UserContext | None, rows: int) -> Source:
        """What an encoder-decoder LM's decoder reads from when it answers a closed task, for ``rows`` texts.

        Each distinct text is encoded once: one per user if something of theirs stands before the prompt, else one.
        """
        prefix = None if users is None else users.prefix
        question = self.question(task)[None]
        return self.read_source(question, prefix).repeated(rows)

    def read_source(self, input_ids: Tensor, prefix: Prefix | None) -> Source:
        """Encoder states of texts [R, T] behind prefixes of B users, R dividing B or a multiple of it."""
        before = no_prefix(self._embed(self.opening), len(input_ids)) if prefix is None else prefix
        input_ids = input_ids.expand(max(len(input_ids), len(before)), -1)
        text, mask = self.after_prefix(before, input_ids)
        return read_source(self.lm, Prefix(text, mask))

    def read_prompt(self, input_ids: Tensor, users: UserContext | None) -> tuple[DynamicCache, Tensor | None]:
        """Keys and values of texts [R, T] behind the users' prefix, and the mask [R, P + T] where there is a prefix.

        With ``attend="answer"`` they are read without attending to user tokens.
        """
        prefix = None if users is None else users.prefix
        if prefix is None:
            return self._read_without_user(input_ids), None
        cache = DynamicCache(config=self.lm.config)
        text, mask = self.after_prefix(prefix, input_ids)
        if text.shape[1] > 0:
            with self.conditioned_or_not(None if self.reads_ahead else users):
                self.hidden(text, None, cache, mask)
        return cache, mask

    def after_prefix(self, prefix: Prefix, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [R, P + T - O, D] and mask of prefix and texts [R, T]; the O opening tokens lead the prefix,
        and are left out of texts that begin with them."""
        opening = self.opening
        if torch.equal(input_ids[:, : len(opening)], opening.expand(len(input_ids), -1)):
            input_ids = input_ids[:, len(opening) :]
        whole = prefix.repeated(len(input_ids)).then(self._embed(input_ids))
        return whole.embeddings, whole.mask

    def _read_without_user(self, input_ids: Tensor) -> DynamicCache:
        """Keys and values of texts [R, T], read by the base LM."""
        cache = DynamicCache(config=self.lm.config)
        with self.without_user():
            self.hidden(input_ids, None, cache)
        return cache

    @property
    def _checkpointed(self) -> bool:
        return any(
            getattr(layer, "gradient_checkpointing", False) for layer in self.attachment.layers.modules()
        )

    def hidden(
        self,
        text: Tensor,
        states: Tensor | None = None,
        cache: DynamicCache | EncoderDecoderCache | None = None,
        mask: Tensor | None = None,
        source: Source | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states [R, T, D] of token ids [R, T] or embeddings [R, T, D].

        source: what the decoder of an encoder-decoder LM reads from, one per text; ``mask`` means nothing to it.

        mask: of everything read so far and of this text, where there is padding on the left. Padding on the right
        needs none: no position sees it. With ``positions`` [R, T], the text is several texts side by side, and the mask
        [R, T, S] says of each of its tokens what it sees of everything read so far and of this text.
        """
        if cache is not None and self.lm.training and self._checkpointed:
            raise UserError(
                'gradient checkpointing drops the keys and values that fusion.attend "answer" needs; use "text"'
            )
        if self._position_limit is not None:
            read = 0 if cache is None else cache.get_seq_length()
            self._check_length(self._position_limit, read + text.shape[1], mask, positions)
        left = {}
        if source is not None:
            left = {"encoder_hidden_states": source.states, "encoder_attention_mask": source.mask.long()}
        elif mask is not None and positions is not None:
            closed = torch.zeros(mask.shape, dtype=self.lm.dtype, device=mask.device)
            closed = closed.masked_fill(~mask, torch.finfo(self.lm.dtype).min)
            left = {"attention_mask": closed[:, None], "position_ids": positions}
        elif mask is not None:
            left = {"attention_mask": mask.long(), "position_ids": position_ids(mask)[:, -text.shape[1] :]}
        given = {"input_ids" if text.ndim == 2 else "inputs_embeds": text}
        with self.attachment.replaying(states):
            output = self.lm.get_decoder()(
                **given, **left, past_key_values=cache, use_cache=cache is not None, return_dict=True
            )
        return output.last_hidden_state

    @cached_property
    def _position_limit(self) -> int | None:
        return position_limit(self.lm)

    def _check_length(self, limit: int, length: int, mask: Tensor | None, positions: Tensor | None) -> None:
        """Raises UserError for texts that go on where the LM has no positions; ``length`` counts padding."""
        if positions is not None:
            length = int(positions.max()) + 1
        elif mask is not None:
            length = int(mask.sum(1).max())
        if length > limit:
            raise UserError(
                f"{type(self.lm).__name__} reads texts of {limit:,} tokens, and this one has {length:,}; shorten "
                "prompts, titles or histories as text (fusion.text.max_tokens), or write fewer tokens"
            )

    def read_as(self, prompt: str) -> list[int]:
        """A prompt's token ids, with what the tokenizer puts around it; without an end of text that a causal LM would
        have to go on behind."""
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=True)["input_ids"]  # type: ignore[assignment]
        return ids[:-1] if self._ends_prompts and ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def _closed_answers(self, task: ClosedTask) -> ClosedAnswers:
        tree = PrefixTree.from_texts(task.answers, self.tokenizer, self.lead)
        prompt = self.read_as(task.config.prompt)
        if not prompt:
            raise UserError(
                f"task {task.name}: its prompt is empty; the language model needs at least one token"
            )
        ids = torch.tensor(prompt, device=self.lm.device)
        if (
            self.has_encoder
        ):  # the decoder's text begins with its start token, the prompt is what it reads from
            self._questions[task.name] = ids
            ids = ids.new_tensor([decoder_start(self.lm)])
        return ClosedAnswers(ids, tree, task.config.normalization)

    # ---- states below the first fused layer -----------------------------------------------------------------------

    def store_lower_states(self, batch: int = 64) -> None:
        """Compute, once per distinct text, what a frozen LM makes of each closed task before the user comes in.

        That is every trie node's state below the first fused layer (not for a task that scores over the whole
        vocabulary, which reads every node, nor where the first layer is fused) and, with ``attend="answer"``, the
        prompt's keys and values. Call ``forget_lower_states`` before the LM changes. Where something of the user stands
        before the prompt nothing can be stored, and of an encoder-decoder LM nothing is.
        """
        if self.config.has_prefix or self.has_encoder:
            return
        for name, closed in self.answers.items():
            if self.reads_ahead and len(closed.prompt_ids) > 1 and name not in self._prompts:
                with torch.no_grad():
                    self._prompts[name] = self._read_without_user(closed.prompt_ids[None, :-1])
            if self.attachment.first == 0 or closed.normalization == "vocabulary" or name in self.lower:
                continue
            self.lower[name] = LowerStates.stored(closed, self.attachment, self.lm, batch)

    def forget_lower_states(self) -> None:
        """Drop what ``store_lower_states`` stored (because the LM is about to change)."""
        self.lower.clear()
        self._prompts.clear()

    def check_head(self) -> None:
        """Compare the logits with the LM's own forward pass: of the first closed task's tokens, or of all.

        Raises UserError where this LM does something to its logits that ``LogitHead`` does not know.
        """
        closed = next(iter(self.answers.values()), None)
        end = torch.tensor([self.tokenizer.eos_token_id], device=self.lm.device)
        ids = (end if closed is None else closed.prompt_ids)[None]
        given, source = {"input_ids": ids}, None
        if self.has_encoder:
            asked = next(iter(self._questions.values()), end)[None]
            ids = torch.tensor([[decoder_start(self.lm)]], device=self.lm.device)
            given = {"input_ids": asked, "decoder_input_ids": ids}
        with torch.no_grad(), self.without_user():
            if self.has_encoder:
                source = self.read_source(given["input_ids"], None)
            whole = self.lm(**given).logits[0, -1].float()
            tokens = (
                torch.arange(len(whole), device=whole.device) if closed is None else closed.tree.vocabulary
            )
            mine = self.head(self.hidden(ids, source=source)[0, -1], tokens).float()
        if not torch.allclose(whole[tokens], mine, rtol=1e-3, atol=1e-3):
            raise UserError(
                f"{type(self.lm).__name__} changes its logits in a way userllm does not reproduce"
            )

    @property
    def gates(self) -> dict[int, float]:
        """tanh(alpha) per fused layer (User-LLM v2, section 4.4)."""
        return {index: block.gate_value for index, block in self.attachment.blocks.items()}
