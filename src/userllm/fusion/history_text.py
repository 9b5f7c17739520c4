"""A history as text in the prompt: the papers' Text Prompt, and the short-term half of long + short term context.

Neither paper prints its format; the template is configuration and "ours". Every event's text is turned into tokens by
itself and the tokens are put together: an event's tokens do not depend on its neighbours, so they are made once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from userllm.errors import UserError
from userllm.events import HistoryBatch
from userllm.ranges import NonNegativeInt, PositiveInt


@dataclass
class SummaryConfig:
    """A language model's summary instead of the history itself (the papers' Text Summarization; all of it ours)."""

    lm: str | None = None
    """The language model that summarises, by any name ``lm.name`` takes; null: the run's own, as it was before
    training. It is not trained, and stays in memory beside the run's own."""
    instruction: str = "In one sentence, what kinds of movies does this user like?"
    """What it is asked behind the history's text, in its chat template where it has one."""
    new_tokens: PositiveInt = 48
    """Length of a summary at most, in its tokens. Greedy."""
    lead: str = "About this user:"
    """Text before the summary. The history's ``close`` follows."""
    batch: PositiveInt = 16
    """Summaries written at once."""


@dataclass
class HistoryTextConfig:
    """How a history is written out before the prompt."""

    events: NonNegativeInt = 0
    """Latest events written as text (paper: 50, 100, 200 for Text Prompt; 10 for "TP10"); 0: none."""
    lead: str = "Movies this user has watched, oldest first:"
    """Text before the first event (ours)."""
    event: str = " {title};"
    """Text of one event (ours); {title}, the encoder's fields ({rating}, {genres}) and ``texts`` are filled in."""
    texts: list[str] = field(default_factory=list)
    """Text fields of the events, such as a review, that stand in ``event``. White space counts as one space."""
    text_words: PositiveInt | None = None
    """Words of such a text at most, its first; null: all."""
    close: str = "\n"
    """Text after the last event (ours). The task's prompt follows."""
    max_tokens: PositiveInt = 1024
    """Tokens the whole may take; the oldest events are left out where it would take more."""
    summary: SummaryConfig | None = None
    """Show a summary of this text instead of the text; none by default. With ``contextualize.every`` fewer different
    summaries are needed."""


class HistoryText:
    """Writes histories as tokens.

    values: by field of the history batches, the text of each vocabulary id (id 0, padding, included); the item's go
    by the name "title". space: what the tokenizer needs before a word behind others; see
    ``language_models.word_start``. Raises UserError for a template that names anything else, that texts cannot be
    filled into, or that leaves no room for an event.
    """

    def __init__(
        self,
        config: HistoryTextConfig,
        values: Mapping[str, Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        space: str = " ",
    ):
        self.config = config
        self.values = dict(values)
        self.tokenizer = tokenizer
        self.space = space
        self.places = _places(config.event, [*self.values, *config.texts])
        self.lead = self._tokens(config.lead)
        self.close = self._tokens(config.close)
        self._events: dict[tuple[int | tuple[int, ...], ...], tuple[str, list[int]]] = {}
        if len(self.lead) + len(self.close) >= config.max_tokens:
            raise UserError(
                f"fusion.text.max_tokens {config.max_tokens} leaves no room beside lead and close "
                f"({len(self.lead) + len(self.close)} tokens)"
            )

    def __call__(self, histories: HistoryBatch, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [E, P] and mask [E, P], padded on the left, for E examples: row in B and events seen, both [E].

        A history without events has no text at all.
        """
        texts = [
            [*self.lead, *(token for _, tokens in events for token in tokens), *self.close] if events else []
            for events in self.events(histories, rows, ends)
        ]
        return padded_on_the_left(texts, rows.device)

    def written(self, histories: HistoryBatch, rows: Tensor, ends: Tensor) -> list[str]:
        """The same as texts, [E]; "" for a history without events."""
        lead, close = self.config.lead, self.config.close
        return [
            f"{lead}{''.join(text for text, _ in events)}{close}" if events else ""
            for events in self.events(histories, rows, ends)
        ]

    def events(
        self, histories: HistoryBatch, rows: Tensor, ends: Tensor
    ) -> Iterator[list[tuple[str, list[int]]]]:
        """Text and tokens of the events shown of each example's history, oldest first."""
        fields = [
            "item" if name == "title" else name for name in self.places if name not in self.config.texts
        ]
        columns = {name: histories.fields[name].tolist() for name in fields}
        shown = [name for name in self.places if name in self.config.texts]
        if shown and histories.texts is None:
            raise UserError(f"fusion.text.texts: nothing is known of these histories' texts ({shown[0]})")
        for row, end in zip(rows.tolist(), ends.tolist(), strict=True):
            room = self.config.max_tokens - len(self.lead) - len(self.close)
            kept: list[tuple[str, list[int]]] = []
            for place in range(end - 1, max(end - self.config.events, 0) - 1, -1):
                texts = {name: self._cut(histories.texts[row](name, place)) for name in shown}  # type: ignore[index]
                event = self._event([columns[name][row][place] for name in fields], texts)
                if len(event[1]) > room:
                    if not kept:  # the latest says more than no history at all
                        tokens = event[1][:room]
                        kept.append((str(self.tokenizer.decode(tokens)), tokens))
                    break
                room -= len(event[1])
                kept.append(event)
            yield kept[::-1]

    def _event(self, ids: list[int | list[int]], texts: Mapping[str, str]) -> tuple[str, list[int]]:
        key = tuple(tuple(i) if isinstance(i, list) else i for i in ids)
        if not texts and key in self._events:
            return self._events[key]
        shown = dict(texts)
        for name, value in zip([name for name in self.places if name not in texts], key, strict=True):
            several = value if isinstance(value, tuple) else (value,)
            shown[name] = ", ".join(self.values[name][v] for v in several if v != 0)
        text = self.config.event.format(**shown)
        event = text, self._tokens(text)
        if not texts:  # a text hardly comes twice
            self._events[key] = event
        return event

    def _cut(self, text: str) -> str:
        return " ".join(text.split()[: self.config.text_words])

    def _tokens(self, text: str) -> list[int]:
        if text.startswith(" "):
            text = f"{self.space}{text[1:]}"
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _places(event: str, known: Sequence[str]) -> list[str]:
    """The fields that a template names. Raises UserError where there is no such field, or it takes no text."""
    try:
        places = [name for _, name, _, _ in Formatter().parse(event) if name is not None]
        if unknown := [name for name in places if name not in known]:
            there = ", ".join(f"{{{name}}}" for name in known)
            raise UserError(f"fusion.text.event: no {{{unknown[0]}}}; there are {there}")
        event.format(**dict.fromkeys(places, "text"))
    except (ValueError, LookupError) as error:
        raise UserError(
            f"fusion.text.event {event!r}: {error}; write a field as {{title}} (all are texts) and a brace as {{{{"
        ) from error
    return places


def padded_on_the_left(texts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [E, P] of texts as tokens, and their mask [E, P]."""
    longest = max(map(len, texts), default=0)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros(len(texts), longest, dtype=torch.bool)
    for place, text in enumerate(texts):
        ids[place, longest - len(text) :] = torch.tensor(text, dtype=torch.long)
        mask[place, longest - len(text) :] = True
    return ids.to(device), mask.to(device)
