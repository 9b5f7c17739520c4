"""The field ``time_gap``: how long before an event the user's previous one was. It follows from the events' times.

Ours; the papers' encoders know no time. A gap is known when its event is, so as an input it tells nothing of what comes
next; as a target it is the question *when*.
"""

from __future__ import annotations

import numpy as np

from userllm.data.vocabulary import TIME_GAP, UNKNOWN, FieldVocabulary
from userllm.events import UNKNOWN_TIME


def time_gap_ids(
    field: FieldVocabulary, times: np.ndarray, first: np.ndarray, before: np.ndarray | None = None
) -> np.ndarray:
    """Ids, same shape, of the gaps before events.

    times: [...], seconds since 1970 or ``UNKNOWN_TIME``. first: [...] bool, True where a user's history begins.
    before: [...], times of the events before; None where the events [events] lie one user after the other.
    A gap is unknown where either time is; an event that is earlier than the one before it has gap 0.
    """
    assert field.name == TIME_GAP
    before = np.roll(times, 1) if before is None else before
    known = (times != UNKNOWN_TIME) & (before != UNKNOWN_TIME)
    seconds = np.maximum(np.where(known, times, 0) - np.where(known, before, 0), 0)
    bounds = np.array([int(value) for value in field.values[1:]])  # of a saved vocabulary its own
    buckets = field.id_of(field.values[1]) + np.searchsorted(bounds, seconds, side="right") - 1
    return np.where(first, field.id_of(field.values[0]), np.where(known, buckets, UNKNOWN))
