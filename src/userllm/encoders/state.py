"""What a causal encoder keeps of a history, so that later events can be encoded without encoding the past again.

Event s looks at events 0..s only, so keys and values of the past stay what they are when new events follow: a new event
needs its own queries, keys and values, and one look at what is kept. The result is that of encoding the whole
history, up to the order in which floats are added.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from userllm.events import UNKNOWN_TIME

_TAKING = threading.Lock()
"""While a history takes places in memory that others may go on from, too."""
ROOM = 64
"""Events that a state has room for when it is made or has become full: it is copied once in so many events."""


@dataclass
class EncoderState:
    """B histories as a causal encoder has read them. A value: to extend it leaves it as it is.

    kept [blocks, 2, B, heads, room, head width]: keys and values, the keys already turned by their positions if the
    encoder turns them. times [B, room]: see ``HistoryBatch``. lengths [B]: how many of the places are events.
    written [B]: how many are taken, by this state or by one that went on from it in the same memory.
    """

    kept: Tensor
    times: Tensor
    lengths: Tensor
    written: Tensor

    @classmethod
    def of_histories(cls, kept: Tensor, times: Tensor, lengths: Tensor) -> EncoderState:
        """Of keys and values [blocks, 2, B, heads, S, head width] and times [B, S], with room for more."""
        return cls(kept, times, lengths, lengths.clone()).with_room(int(lengths.max()) + 1)

    def __len__(self) -> int:
        return len(self.lengths)

    def with_room(self, most: int) -> EncoderState:
        """A copy in memory of its own, with room for ``most`` events and some more."""
        room = -(-most // ROOM) * ROOM
        length = min(self.times.shape[1], room)
        kept = self.kept.new_zeros(*self.kept.shape[:4], room, self.kept.shape[5])
        kept[..., :length, :] = self.kept[..., :length, :]
        times = self.times.new_full((len(self), room), UNKNOWN_TIME)
        times[:, :length] = self.times[:, :length]
        return EncoderState(kept, times, self.lengths, self.lengths.clone())

    def of(self, user: int) -> EncoderState:
        """One of the histories, in memory of its own, so that the others can go."""
        if len(self) == 1:
            return self
        own = slice(user, user + 1)
        one = EncoderState(self.kept[:, :, own], self.times[own], self.lengths[own], self.written[own])
        return one.with_room(int(one.lengths) + 1)

    def to(self, like: Tensor) -> EncoderState:
        """On the device, and of the floating point type, of another tensor."""
        device = like.device
        return EncoderState(
            self.kept.to(like), self.times.to(device), self.lengths.to(device), self.written.to(device)
        )

    @classmethod
    def together(cls, states: list[EncoderState]) -> EncoderState:
        """Several users' states as one."""
        if len(states) == 1:
            return states[0]
        room = max(state.times.shape[1] for state in states)
        more = [room - state.times.shape[1] for state in states]
        kept = [F.pad(state.kept, (0, 0, 0, n)) for state, n in zip(states, more, strict=True)]
        times = [
            F.pad(state.times, (0, n), value=UNKNOWN_TIME) for state, n in zip(states, more, strict=True)
        ]
        lengths = torch.cat([state.lengths for state in states])
        return cls(torch.cat(kept, dim=2), torch.cat(times), lengths, lengths.clone())


class Reading:
    """New events of B histories on their way through the blocks, and what is kept of the past that they look at.

    state: None where nothing has been read before. times [B, n], mask [B, n]: of the new events. most: events of a
    history. Raises ValueError where past and new are more.
    """

    def __init__(self, state: EncoderState | None, times: Tensor, mask: Tensor, most: int):
        steps = torch.arange(mask.shape[1], device=mask.device)
        lengths = mask.sum(1)
        self.times = times
        """[B, K]: past and new, K events or places in all."""
        self.places = steps.expand(len(mask), -1)
        """[B, n]: the new events' positions in their histories."""
        self.lengths = lengths if state is None else state.lengths + lengths
        """[B]: past and new."""
        self.distance: Tensor | None = None
        """[B, n, K]: how many events after the other one; negative: the other comes later. None: nothing is kept."""
        self.causal = state is None
        """Whether each new event looks at itself and what stands before it: nothing is kept."""
        self.mask: Tensor | None = None
        """[B, 1, n, K]: what a new event looks at; None: everything, or as ``causal`` says."""
        self._new: list[Tensor] = []
        self._after: EncoderState | None = None
        if (whole := max(1, int(self.lengths.max()))) > most:
            raise ValueError(f"{whole} events in all, the encoder sees {most} at most")
        if state is None:
            return
        with _TAKING:
            if whole > state.times.shape[1] or bool((state.written != state.lengths).any()):
                state = state.with_room(
                    whole
                )  # no room, or another history went on from here in the same memory
            state.written += lengths
        self._after = EncoderState(state.kept, state.times, self.lengths, state.written)
        self.places = (state.lengths[:, None] + steps).clamp_max(whole - 1)  # the last only at padding
        self._real, self._whole = mask, whole
        self._rows, step = torch.nonzero(mask, as_tuple=True)
        self._at = self.places[self._rows, step]
        self._only = slice(int(state.lengths[0]), int(self.lengths[0]))
        state.times[self._rows, self._at] = times[mask]
        self.times = state.times[:, :whole]
        self.distance = self.places[..., None] - torch.arange(whole, device=mask.device)
        if mask.shape[1] > 1 or bool((self.lengths < whole).any()):
            self.mask = (self.distance >= 0)[:, None]

    def join(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, n, head width] of the next block, and those of the past with them: K for n."""
        both = torch.stack([keys, values])
        if self._after is not None:
            kept = self._after.kept[len(self._new)]  # [2, B, heads, room, head width]
            if len(self._real) == 1:  # the same as below, as one copy
                kept[..., self._only, :] = both[..., : len(self._at), :]
            else:
                kept[:, self._rows, :, self._at] = both.permute(1, 3, 0, 2, 4)[self._real].to(kept)
            both = kept[..., : self._whole, :]
        self._new.append(both)
        return both[0], both[1]

    def after(self) -> EncoderState:
        """The state once every block has joined."""
        if self._after is None:
            return EncoderState.of_histories(torch.stack(self._new), self.times, self.lengths)
        return self._after
