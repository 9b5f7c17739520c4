"""What a causal encoder keeps of a history, so that later events can be encoded without encoding the past again.

Event s looks at events 0..s only, so keys and values of the past stay what they are when new events follow: a new event
needs its own queries, keys and values, and one look at what is kept. The result is that of encoding the whole
history, up to the order in which floats are added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from userllm.events import UNKNOWN_TIME

KeysValues = tuple[Tensor, Tensor]


@dataclass
class EncoderState:
    """B histories as a causal encoder has read them. A value: to extend it leaves it as it is.

    keys_values: by block, each [B, heads, S, head width], keys already turned by their positions if the encoder turns
    them. times [B, S]: see ``HistoryBatch``. lengths [B]: how many of the S are events; what stands behind is padding.
    """

    keys_values: list[KeysValues]
    times: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def of(self, user: int) -> EncoderState:
        """One of the histories, without padding and in memory of its own, so that the others can go."""
        own, length = slice(user, user + 1), int(self.lengths[user])
        return EncoderState(
            [(k[own, :, :length].clone(), v[own, :, :length].clone()) for k, v in self.keys_values],
            self.times[own, :length].clone(),
            self.lengths[own].clone(),
        )

    def to(self, like: Tensor) -> EncoderState:
        """On the device, and of the floating point type, of another tensor."""
        return EncoderState(
            [(k.to(like), v.to(like)) for k, v in self.keys_values],
            self.times.to(like.device),
            self.lengths.to(like.device),
        )

    @classmethod
    def together(cls, states: list[EncoderState]) -> EncoderState:
        """Several users' states as one, padded on the right."""
        longest = max(state.times.shape[1] for state in states)

        def padded(parts: list[Tensor], dim: int, value: int = 0) -> Tensor:
            sizes = [(0, 0) * (part.ndim - 1 - dim) + (0, longest - part.shape[dim]) for part in parts]
            return torch.cat(
                [torch.nn.functional.pad(p, s, value=value) for p, s in zip(parts, sizes, strict=True)]
            )

        blocks = zip(*(state.keys_values for state in states), strict=True)
        return cls(
            [(padded([k for k, _ in one], 2), padded([v for _, v in one], 2)) for one in blocks],
            padded([state.times for state in states], 1, UNKNOWN_TIME),
            torch.cat([state.lengths for state in states]),
        )


class Past:
    """How n new events of each history look at what is kept and at one another, for one pass through the blocks.

    state: None where nothing has been read before. times [B, n], lengths [B] of the new events.
    """

    def __init__(self, state: EncoderState | None, times: Tensor, lengths: Tensor):
        new = times.shape[1]
        self.state = state
        self.before = torch.zeros_like(lengths) if state is None else state.lengths
        kept = 0 if state is None else state.times.shape[1]
        whole = max(1, int((self.before + lengths).max()))
        at = torch.arange(whole, device=times.device)
        # where each event of the joined history stands in [kept | new]; None: one after the other already
        self._take: Tensor | None = None
        if whole < kept + new or bool((self.before != kept).any()):
            later = kept + at - self.before[:, None]
            self._take = torch.where(at < self.before[:, None], at, later).clamp_max(kept + new - 1)
        steps = torch.arange(new, device=times.device)
        self.places = (self.before[:, None] + steps).clamp_max(whole - 1)  # the last only at padding
        """[B, n]: the new events' positions in their histories."""
        self.distance = self.places[..., None] - at
        """[B, n, past and new]: how many events after the other one; negative: the other comes later."""
        self.times = self._joined(None if state is None else state.times, times, 1)
        """[B, past and new]"""
        self.lengths = self.before + lengths
        self._new: list[KeysValues] = []

    @property
    def allowed(self) -> Tensor:
        """[B, n, past and new]"""
        return self.distance >= 0

    def join(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Keys and values of the next block, of past and new events, [B, heads, past and new, head width]."""
        past = (None, None) if self.state is None else self.state.keys_values[len(self._new)]
        keys, values = self._joined(past[0], keys, 2), self._joined(past[1], values, 2)
        self._new.append((keys, values))
        return keys, values

    def after(self) -> EncoderState:
        """The state once every block has joined."""
        return EncoderState(self._new, self.times, self.lengths)

    def _joined(self, kept: Tensor | None, new: Tensor, dim: int) -> Tensor:
        both = new if kept is None else torch.cat([kept, new], dim=dim)
        if self._take is None:
            return both
        shape, wanted = [len(both)] + [1] * (both.ndim - 1), list(both.shape)
        shape[dim] = wanted[dim] = self._take.shape[1]
        return both.gather(dim, self._take.view(shape).expand(wanted))
