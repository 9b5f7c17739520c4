"""What is kept of one user, so that the language model can answer without their history being read again.

history --remember--> UserRecord --context_of--> what the LM is conditioned on
                          | extend: only the new events are read
                      UserRecord
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from userllm.encoders.state import EncoderState
from userllm.errors import UserError
from userllm.events import UNKNOWN_TIME, HistoryBatch
from userllm.fusion.attach import UserContext
from userllm.fusion.history_text import padded_on_the_left
from userllm.fusion.projection import UserTokens

if TYPE_CHECKING:
    from userllm.contextual import ContextualLM
    from userllm.serving.user_side import UserSide


@dataclass(frozen=True)
class Kept:
    """What to keep besides the user embeddings (and the user tokens, where a Perceiver or an MLP makes them)."""

    keys_values: bool = False
    """The cross-attention's keys and values of every fused layer: large, and no work is left but the LM's own."""
    state: bool = False
    """What the encoder has to know of the past to go on with new events alone."""


@dataclass
class UserRecord:
    """One user. A value: ``extend`` makes a new one.

    events: of the whole history. embeddings [S, U]: the latest user embeddings, latest last, as many as the LM attends
    to. seen: rows in the catalogue of all items the user has had.
    tokens [M, U]: user tokens, where they are more than embeddings and recency.
    keys_values [M, fused layers, 2, H, head width]; scores [items]: the encoder's, where ``fusion.catalogue`` hears
    them and they do not follow from the last embedding; text [P]: the history as token ids, where ``fusion.text``
    asks for it; state: see ``Kept``. digest: of the events it was made of, see ``serving.embed``.
    """

    events: int
    embeddings: Tensor
    seen: Tensor
    user: str | None = None
    tokens: Tensor | None = None
    keys_values: Tensor | None = None
    scores: Tensor | None = None
    text: Tensor | None = None
    state: EncoderState | None = None
    digest: bytes = b""

    def __len__(self) -> int:
        return self.events

    def columns(self) -> dict[str, Tensor]:
        """Everything but the user's name as tensors, each [n, ...]: what goes into a file."""
        columns = {
            "events": torch.tensor([self.events]),
            "digest": torch.tensor(list(self.digest), dtype=torch.uint8),
            "seen": self.seen.int(),
            "embeddings": self.embeddings,
        }
        if self.text is not None:
            columns["text"] = self.text.int()
        if self.scores is not None:
            columns["scores"] = self.scores[None]
        if self.tokens is not None:
            columns["tokens"] = self.tokens
        if self.keys_values is not None:
            columns["keys_values"] = self.keys_values
        if self.state is not None:
            length = int(self.state.lengths)
            kept = self.state.kept[:, :, 0, :, :length]
            columns["state"] = kept.permute(3, 0, 1, 2, 4)  # [S, blocks, 2, heads, head width]
            columns["times"] = self.state.times[0, :length]
        return columns

    @classmethod
    def from_columns(cls, user: str, columns: dict[str, Tensor]) -> UserRecord:
        """The inverse of ``columns``; floats come back as float32."""
        values = {name: c.float() if c.is_floating_point() else c for name, c in columns.items()}
        state, scores = None, values.get("scores")
        if "state" in values and len(values["times"]) == int(values["events"]):  # no rows: none was kept
            kept = values["state"].permute(1, 2, 3, 0, 4)[:, :, None]
            length = torch.tensor([len(values["times"])])
            state = EncoderState.of_histories(kept, values["times"][None], length)
        return cls(
            events=int(values["events"]),
            embeddings=values["embeddings"],
            seen=values["seen"].long(),
            user=user,
            tokens=values.get("tokens"),
            keys_values=values.get("keys_values"),
            scores=None if scores is None else scores[0],
            text=None if "text" not in values else values["text"].long(),
            state=state,
            digest=bytes(values["digest"].tolist()),
        )


@torch.no_grad()
def remember(
    side: UserSide, batch: HistoryBatch, events: Sequence[int], seen: Sequence[Tensor], keep: Kept
) -> list[UserRecord]:
    """Records of B histories, of which the batch holds the latest events the encoder sees.

    events [B]: of the whole histories; seen: by user, rows of the catalogue. Where ``keep.state`` asks for it, users
    whose history the encoder sees whole get a state, if the encoder can go on from one.
    """
    encoder, lengths = side.encoder, batch.lengths
    state = None
    if side.config.kind == "none":
        counts = torch.zeros_like(lengths)
        embeddings = torch.zeros(len(batch), 1, encoder.width, device=lengths.device)
    elif keep.state and encoder.not_extended is None:
        (embeddings, state), counts = encoder.extend(None, batch), lengths
    else:
        embeddings, mask = encoder(batch)
        counts = mask.sum(1)
    records = []
    for place, count in enumerate(counts.tolist()):
        latest = embeddings[place, max(0, count - side.window) : count].clone()
        record = UserRecord(events[place], latest, seen[place].long())
        if state is not None and events[place] == lengths[place] < encoder.max_length:
            record.state = state.of(place)
        records.append(record)
    if side.history_text is not None:
        everyone = torch.arange(len(batch), device=lengths.device)
        ids, real = side.history_text(batch, everyone, lengths)
        for record, own, there in zip(records, ids, real, strict=True):
            record.text = own[there]
    if side.config.catalogue is not None and not side.scores_follow:
        everyone = torch.arange(len(batch), device=lengths.device)
        scores = encoder.next_item_scores(batch, everyone, lengths.clamp_min(1))
        for record, own in zip(records, scores, strict=True):
            record.scores = own
    return _with_tokens(side, records, keep)


@torch.no_grad()
def extend(
    side: UserSide, records: Sequence[UserRecord], batch: HistoryBatch, seen: Sequence[Tensor], keep: Kept
) -> list[UserRecord]:
    """The users after the new events of ``batch``; nothing before those is encoded again.

    seen: by user, rows of the new events' items. The result is that of ``remember`` with the whole histories, to
    float tolerance. Raises UserError where it could not be: see ``why_not_extended``.
    """
    new = batch.lengths.tolist()
    states = []
    for record, added in zip(records, new, strict=True):
        if (reason := why_not_extended(side, record, added)) is not None:
            raise UserError(f"this user's history cannot be continued: {reason}; compute it anew")
        assert record.state is not None
        states.append(record.state)
    embeddings, state = side.encoder.extend(EncoderState.together(states).to(side.weight), batch)
    extended = []
    for place, (record, added) in enumerate(zip(records, new, strict=True)):
        both = torch.cat([record.embeddings, embeddings[place, :added].to(record.embeddings)])
        events = record.events + added
        extended.append(
            UserRecord(
                events,
                both[max(0, len(both) - side.window) :],
                torch.unique(torch.cat([record.seen, seen[place].to(record.seen)])),
                record.user,
                state=state.of(place) if events < side.encoder.max_length else None,
            )
        )
    return _with_tokens(side, extended, keep)


def why_not_extended(side: UserSide, record: UserRecord, new: int) -> str | None:
    """Why ``extend`` cannot take ``new`` events into a record; None where it can."""
    most = side.encoder.max_length
    if side.encoder.not_extended is not None:
        return side.encoder.not_extended
    if side.history_text is not None:
        return "fusion.text writes out earlier events"
    if record.events + new > most:
        return (
            f"{record.events} events and {new} new ones are more than the {most} the encoder sees, so its window "
            "moves, and with it every embedding in it"
        )
    return None if record.state is not None else "its record keeps no encoder state"


def _with_tokens(side: UserSide, records: list[UserRecord], keep: Kept) -> list[UserRecord]:
    """The records with user tokens, and keys and values, as far as they are kept."""
    blocks = side.blocks if keep.keys_values else {}
    if side.config.kind == "none" or (side.user_tokens.cheap and not blocks):
        return records
    tokens, mask = tokens_of(side.user_tokens, records)
    projected = [torch.stack(block.project_users(tokens)) for block in blocks.values()]
    for place, record in enumerate(records):
        real = mask[place]
        if not side.user_tokens.cheap:
            record.tokens = tokens[place, real]
        if projected:  # by block [2, B, H, M, head width] -> [M, blocks, 2, H, head width]
            own = torch.stack([both[:, place] for both in projected])
            record.keys_values = own.permute(3, 0, 1, 2, 4)[real]
    return records


def tokens_of(user_tokens: UserTokens, records: Sequence[UserRecord]) -> tuple[Tensor, Tensor]:
    """User tokens [B, M, U] of records that keep none, and their mask [B, M]."""
    weight = user_tokens.recency.weight
    counts = torch.tensor([len(record.embeddings) for record in records], device=weight.device)
    embeddings = pad_sequence([record.embeddings.to(weight) for record in records], batch_first=True)
    if embeddings.shape[1] == 0:  # somebody has to stand there to be masked
        embeddings = embeddings.new_zeros(len(records), 1, embeddings.shape[2])
    return user_tokens(embeddings, torch.arange(len(records), device=weight.device), counts)


@torch.no_grad()
def context_of(model: ContextualLM, records: Sequence[UserRecord]) -> UserContext:
    """What the language model is conditioned on: as ``model.context`` of the histories, to float tolerance."""
    device = model.lm.device
    known = torch.tensor([record.events > 0 for record in records], device=device)
    if model.config.kind == "none":
        tokens = torch.zeros(len(records), 0, model.encoder.width, device=device)
        mask = torch.zeros(len(records), 0, dtype=torch.bool, device=device)
    elif model.user_tokens.cheap:
        tokens, mask = tokens_of(model.user_tokens, records)
    else:
        weight = model.user_tokens.recency.weight
        tokens, mask = _padded([_required(r.tokens, "user tokens").to(weight) for r in records])
    text = None
    if model.history_text is not None:
        texts = [_required(record.text, "text of its history").tolist() for record in records]
        text = padded_on_the_left(texts, device)
    users = model.context_from(tokens, mask, text, _scores(model, records), known)
    if model.attachment.blocks and all(r.keys_values is not None or not r.events for r in records):
        some = next((r.keys_values for r in records if r.keys_values is not None), None)
        if some is not None:
            empty = some[:0]
            each = [empty if r.keys_values is None else r.keys_values for r in records]
            both, _ = _padded([kv.to(tokens) for kv in each], tokens.shape[1])
            keys_values = both.permute(2, 3, 0, 4, 1, 5)  # [blocks, 2, B, H, M, head width]
            users.keys_values = {
                index: (own[0], own[1])
                for index, own in zip(model.attachment.blocks, keys_values, strict=True)
            }
    return users


def _scores(model: ContextualLM, records: Sequence[UserRecord]) -> Tensor | None:
    if model.catalogue is None:
        return None
    if any(record.scores is not None for record in records):
        width = next(len(record.scores) for record in records if record.scores is not None)
        nothing = torch.zeros(width)
        return torch.stack([(nothing if r.scores is None else r.scores).to(model.lm.device) for r in records])
    weight = model.user_tokens.recency.weight
    nobody = torch.zeros(1, model.encoder.width)
    last = torch.cat([(r.embeddings[-1:] if len(r.embeddings) else nobody).to(weight) for r in records])
    scores = model.encoder.item_scores(last) if model.encoder.causal else None
    return _required(scores, "scores of the catalogue")


def _padded(parts: Sequence[Tensor], length: int = 1) -> tuple[Tensor, Tensor]:
    """Parts [n, ...] as [B, M, ...], padded on the left with 0, and the mask [B, M]; M at least ``length``."""
    most = max(length, *(len(part) for part in parts))
    whole = parts[0].new_zeros(len(parts), most, *parts[0].shape[1:])
    mask = torch.zeros(len(parts), most, dtype=torch.bool, device=whole.device)
    for place, part in enumerate(parts):
        whole[place, most - len(part) :] = part
        mask[place, most - len(part) :] = True
    return whole, mask


def _required(value: Tensor | None, what: str) -> Tensor:
    if value is None:
        raise UserError(f"this record holds no {what}: it was made by another model")
    return value


def last_time(record: UserRecord) -> int | None:
    """When the user's latest event was; None where that is not known."""
    if record.state is None or record.events == 0:
        return None
    time = int(record.state.times[0, record.events - 1])
    return None if time == UNKNOWN_TIME else time


def named(record: UserRecord, user: str, digest: bytes) -> UserRecord:
    """The record with its user's name and the digest of the events it was made of."""
    return replace(record, user=user, digest=digest)
