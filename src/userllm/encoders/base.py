"""What userllm asks of a user encoder: ours, or one of your own.

    HistoryBatch -> (embeddings [B, M, U], mask [B, M])

An encoder is a ``torch.nn.Module`` below ``UserEncoder`` with four attributes and one call. Two further methods are
optional: ranking the catalogue by itself (a baseline, and the teacher of stage 2), and being pretrained by userllm.
A causal one may also go on from what it has read (``extend``).
``examples/own_encoder.py`` wraps an encoder that another library trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from userllm.encoders.state import EncoderState
from userllm.errors import UserError
from userllm.events import HistoryBatch


class UserEncoder(nn.Module, ABC):
    """Histories -> user embeddings. Set the attributes on the class or in ``__init__``."""

    width: int
    """U, the width of a user embedding."""
    max_length: int
    """Events seen at most; userllm never gives it more."""
    causal: bool
    """True: M == S, the mask is the batch's own, and embedding s knows events 0..s only, so that one call serves every
    prefix of a history. False: userllm calls the encoder once per example, with the history cut off there."""
    per_event: bool = True
    """Whether embedding s stands for event s; if not, attention to it explains nothing about events."""
    ranks_items: bool = False
    """Whether ``next_item_scores`` is there."""
    not_extended: str | None = "this kind of encoder keeps nothing of what it has read"
    """Why ``extend`` cannot go on from an earlier part of a history; None where it can."""
    needs_frequencies: bool = False
    """Whether stage 1 has to call ``use_frequencies`` before it begins."""
    answers: Tensor | None = None
    """Rows of the catalogue among which stage 1's loss tells the next item, [n]; None: all. See ``choose_among``."""

    @abstractmethod
    def forward(self, batch: HistoryBatch) -> tuple[Tensor, Tensor]:
        """Embeddings [B, M, U], the latest last, and their mask [B, M], padded on the right.

        What stands at padding is never read, but must be finite. Company and padding must not matter. A history without
        events is legal and should have no embeddings: then the language model is the one that knows nobody.
        """

    def next_item_scores(self, histories: HistoryBatch, rows: Tensor, ends: Tensor) -> Tensor:
        """Scores [E, items] of every catalogue item as the next event, in the catalogue's order; log-softmax is theirs.

        rows [E]: which history; ends [E]: how many of its events count, at least 1.
        """
        raise UserError(f"{type(self).__name__} cannot rank the catalogue by itself")

    def item_scores(self, embeddings: Tensor) -> Tensor | None:
        """The same scores [..., items] from embeddings [..., U], where those say it all; None where they do not."""
        return None

    def extend(self, state: EncoderState | None, batch: HistoryBatch) -> tuple[Tensor, EncoderState]:
        """Embeddings [B, S, U] of new events alone, as in their whole histories, and what to go on from the next time.

        state: after the histories' earlier events; None where the batch begins with their first. At most
        ``max_length`` events together. Raises UserError where ``not_extended`` says why not.
        """
        raise UserError(f"a history cannot be continued: {self.not_extended}")

    def next_event_losses(self, inputs: HistoryBatch, targets: HistoryBatch) -> dict[str, Tensor]:
        """What stage 1 minimises, under ``"loss"``, and its parts by name; in nats.

        ``targets`` holds, at each position of ``inputs``, the event that came next, and its own mask.
        """
        raise UserError(
            f"{type(self).__name__} is not pretrained by userllm; train it before and set pretrain: null"
        )

    def choose_among(self, answers: Tensor) -> None:
        """Keep all other items out of stage 1's loss, where they would be wrong answers; before ``use_frequencies``.

        answers: rows of the catalogue, [n], rising. Ranking is still over the whole catalogue.
        """
        self.answers = answers

    def among_answers(self, table: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What stage 1's loss is to see of the catalogue's table [V, ...] and of its right rows [N]."""
        if self.answers is None:
            return table, target
        answers = self.answers.to(table.device)
        return table[answers], torch.searchsorted(answers, target)

    def use_frequencies(self, counts: Mapping[str, Tensor]) -> None:
        """How often each value of a field occurs among the training targets.

        counts: by field, [size], indexed by vocabulary id; 0 at padding.
        """

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Weights that only score or pretrain; stage 2 leaves them as they are."""
        return iter(())
