"""A history summarised by a language model, as text before the prompt: the papers' Text Summarization (v2, Fig. 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from userllm.errors import UserError
from userllm.events import HistoryBatch
from userllm.fusion.history_text import HistoryText, HistoryTextConfig, padded_on_the_left

Summarize = Callable[[Sequence[str]], list[str]]
"""Histories as text in, one summary each out."""


class HistorySummary:
    """Writes summaries of histories as tokens, where ``HistoryText`` writes the histories.

    The summary is of what ``HistoryText`` would have written, word for word; ``summarize`` sees each text once a call.
    """

    def __init__(
        self,
        config: HistoryTextConfig,
        values: Mapping[str, Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        summarize: Summarize | None,
    ):
        if config.summary is None or summarize is None:
            raise UserError("fusion.text.summary needs a language model that summarises")
        self.config = config.summary
        self.history = HistoryText(config, values, tokenizer)
        self.tokenizer = tokenizer
        self.summarize = summarize
        self._tokens: dict[str, list[int]] = {"": []}

    def __call__(self, histories: HistoryBatch, rows: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [E, P] and mask [E, P], as of ``HistoryText``. A history without events has no text at all."""
        texts = self.history.written(histories, rows, ends)
        new = [text for text in dict.fromkeys(texts) if text not in self._tokens]
        for text, summary in zip(new, self.summarize(new) if new else [], strict=True):
            shown = f"{self.config.lead} {summary}{self.history.config.close}"
            self._tokens[text] = list(self.tokenizer(shown, add_special_tokens=False)["input_ids"])
        return padded_on_the_left([self._tokens[text] for text in texts], rows.device)
