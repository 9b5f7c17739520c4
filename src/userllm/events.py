"""The types that flow through everything.

Shape legend, used in every docstring:

    B  users (histories) in a batch        U  width of a user embedding (encoder width)
    S  events of a history                 D  width of the language model
    F  fields of an event                  V  vocabulary of the language model
    M  user tokens (what the LM attends to)  T  text tokens
    K  cut-off of a ranking, or values of a multi-valued field
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING

from userllm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


UNKNOWN_TIME = -(2**63)
"""Stands in ``HistoryBatch.times`` for a time that is not known."""


TextOf = Callable[[str, int], str]
"""(text field, place in a history) -> that event's text, "" where it has none. Looked up only where it is shown."""


@dataclass(frozen=True)
class Event:
    """One interaction of a user with an item.

    ``item`` is the catalogue's raw id, or a title that only one item has. ``fields`` holds further event-level values
    by field name (``{"rating": 4.0}``). ``time`` is in seconds since 1970, or None where it is not known; so is a field
    whose value is None.
    """

    item: str
    time: int | None = None
    fields: Mapping[str, float | str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise UserError for an item that is no text, a time that is no number of seconds, and a field's value that is
        neither number nor text."""
        if not isinstance(self.item, str):
            raise UserError(
                f"Event({self.item!r}): an item is its raw id or its title, a text; give {str(self.item)!r}"
            )
        if not isinstance(self.fields, Mapping):
            raise UserError(f"Event({self.item!r}): fields is {repr(self.fields)[:60]}; give values by name")
        for name, value in self.fields.items():
            if not isinstance(name, str):
                raise UserError(f"Event({self.item!r}): {name!r} is no name of a field")
            if not isinstance(value, str | Real | None):
                raise UserError(
                    f"Event({self.item!r}): {name} is {repr(value)[:60]}; give a number, a text or None"
                )
        whole = isinstance(self.time, Integral) and not isinstance(self.time, bool)
        if self.time is not None and not (whole and abs(self.time) < 2**62):
            raise UserError(f"Event({self.item!r}): time is {self.time!r}; give whole seconds since 1970")


@dataclass(frozen=True)
class UserHistory:
    """A user's events, oldest first. A user with no events is a legal user."""

    events: Sequence[Event]
    user: str | None = None

    def __post_init__(self) -> None:
        """Raise UserError for what is no event, and for an event that is earlier than one before it: newest first would
        be read backwards."""
        if not isinstance(self.events, Sequence):  # an iterator would be used up here
            object.__setattr__(self, "events", list(self.events))
        latest: Event | None = None
        for place, event in enumerate(self.events):
            if not isinstance(event, Event):
                raise UserError(f"events[{place}] is {repr(event)[:60]}; give Event(item)")
            if event.time is None:
                continue
            if latest is not None and latest.time is not None and event.time < latest.time:
                raise UserError(
                    f"events[{place}] ({event.item!r}, time {event.time}) is earlier than {latest.item!r} (time "
                    f"{latest.time}) before it; sort the events by time, oldest first"
                )
            latest = event

    def __len__(self) -> int:
        return len(self.events)


@dataclass
class HistoryBatch:
    """Histories as vocabulary ids, padded on the right with 0.

    fields: by field name, [B, S] for single-valued and [B, S, K] for multi-valued fields, int64.
    mask:   [B, S] bool, True where there is an event.
    times:  [B, S] int64, seconds since 1970, ``UNKNOWN_TIME`` where that is not known and at padding; None only in
            batches made by hand, for an encoder that does not look at times.
    texts:  B look-ups of events' texts, which ``fusion.text`` may show; None where nothing is known of texts.
    """

    fields: dict[str, Tensor]
    mask: Tensor
    times: Tensor | None = None
    texts: Sequence[TextOf] | None = None

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Events per history, [B]."""
        return self.mask.sum(dim=1)

    def to(self, device) -> HistoryBatch:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device), self.texts)

    def select(self, rows: Tensor) -> HistoryBatch:
        """The histories at ``rows`` [R], repeated where a row is named twice."""
        texts = None if self.texts is None else [self.texts[row] for row in rows.tolist()]
        return self._each(lambda tensor: tensor[rows], texts)

    def prefixes(self, ends: Tensor) -> HistoryBatch:
        """Each history's first ``ends`` [B] events; what came after is padding, as if it had never been."""
        length = max(1, int(ends.max())) if len(ends) else 1
        mask = (self.mask & (self.mask.cumsum(1) <= ends[:, None]))[:, :length]
        fields = {
            name: ids[:, :length].masked_fill(~mask if ids.ndim == 2 else ~mask[..., None], 0)
            for name, ids in self.fields.items()
        }
        times = None if self.times is None else self.times[:, :length].masked_fill(~mask, UNKNOWN_TIME)
        return HistoryBatch(fields, mask, times, self.texts)

    def _each(self, change: Callable[[Tensor], Tensor], texts: Sequence[TextOf] | None) -> HistoryBatch:
        times = None if self.times is None else change(self.times)
        return HistoryBatch({k: change(v) for k, v in self.fields.items()}, change(self.mask), times, texts)
