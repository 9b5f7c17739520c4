"""A history that is continued gives the embeddings of the whole history."""

import pytest
import torch

from userllm.encoders.state import EncoderState
from userllm.errors import UserError
from userllm.events import UNKNOWN_TIME

SETTINGS = [
    {"positions": "learned"},
    {"positions": "rotary", "norm": "post"},
    {"positions": "relative_time", "feed_forward_kind": "swiglu"},
]


@pytest.fixture(params=SETTINGS, ids=lambda settings: settings["positions"])
def encoder(request, make_encoder):
    encoder = make_encoder(**request.param)
    with torch.no_grad():  # so that positions and times matter
        for weight in encoder.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    return encoder


def same(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_one_more_event(encoder, stored):
    whole, _ = encoder(stored.batch([(7, 0, 12)]))
    before, state = encoder.extend(None, stored.batch([(7, 0, 11)]))
    last, after = encoder.extend(state, stored.batch([(7, 11, 12)]))
    same(before, whole[:, :11])
    same(last, whole[:, 11:])
    assert state.lengths.tolist() == [11] and after.lengths.tolist() == [12]  # the old state is what it was
    again, _ = encoder.extend(state, stored.batch([(7, 11, 12)]))
    assert torch.equal(again, last)


@torch.no_grad()
def test_many_events_one_by_one_and_in_pieces(encoder, stored):
    whole, _ = encoder(stored.batch([(7, 0, 12)]))
    for pieces in ([1] * 12, [5, 1, 4, 2], [0, 12]):
        state, at, parts = None, 0, []
        for size in pieces:
            new, state = encoder.extend(state, stored.batch([(7, at, at + size)]))
            parts.append(new[:, :size])
            at += size
        same(torch.cat(parts, dim=1), whole)


@torch.no_grad()
def test_company_and_padding_do_not_matter(encoder, stored):
    """Users of 9, 2 and no events, who add 3, 6 and 1, and one who adds none."""
    pasts = [(7, 0, 9), (4, 0, 2), (8, 0, 0), (9, 0, 5)]
    ends = [12, 8, 1, 5]
    _, state = encoder.extend(None, stored.batch(pasts))
    apart = [encoder.extend(None, stored.batch([row]))[1] for row in pasts]
    new = stored.batch([(user, stop, end) for (user, _, stop), end in zip(pasts, ends, strict=True)])
    for states in (
        state,
        EncoderState.together(apart),
        EncoderState.together([state.of(n) for n in range(4)]),
    ):
        embeddings, after = encoder.extend(states, new)
        assert after.lengths.tolist() == ends
        for place, (user, _, stop) in enumerate(pasts):
            end = ends[place]
            if end > stop:
                whole, _ = encoder(stored.batch([(user, 0, end)]))
                same(embeddings[place, : end - stop], whole[0, stop:])
        once_more, _ = encoder.extend(after.of(3), stored.batch([(9, 5, 6)]))
        whole, _ = encoder(stored.batch([(9, 0, 6)]))
        same(once_more[0], whole[0, 5:])


@torch.no_grad()
def test_gaps_between_events_count(make_encoder, stored):
    """With relative-time positions a new event after a long pause is another one than after a short pause."""
    encoder = make_encoder(positions="relative_time")
    for weight in encoder.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.2)
    whole = stored.batch([(7, 0, 6)])
    found = []
    for pause in (10, 10_000_000):
        whole.times[0, 5] = whole.times[0, 4] + pause
        _, state = encoder.extend(None, whole.prefixes(torch.tensor([5])))
        new = stored.batch([(7, 5, 6)])
        new.times = whole.times[:, 5:]
        found.append(encoder.extend(state, new)[0][0, 0])
        same(found[-1], encoder(whole)[0][0, 5])
    assert (found[0] - found[1]).abs().max() > 1e-3
    whole.times[0, 2] = UNKNOWN_TIME
    _, state = encoder.extend(None, whole.prefixes(torch.tensor([5])))
    same(encoder.extend(state, new)[0][0, 0], encoder(whole)[0][0, 5])


@torch.no_grad()
def test_what_cannot_be_continued_says_why(make_encoder, stored):
    batch = stored.batch([(7, 0, 3)])
    for kind, settings, reason in [
        ("autoregressive", {"count_from": "end"}, "count_from is end"),
        ("bert4rec", {}, "knows all events"),
        ("dual", {}, "one embedding of the whole history"),
    ]:
        encoder = make_encoder(kind, **settings)
        assert encoder.not_extended is not None
        with pytest.raises(UserError, match=reason):
            encoder.extend(None, batch)
    encoder = make_encoder(max_length=8)
    _, state = encoder.extend(None, stored.batch([(7, 0, 8)]))
    with pytest.raises(ValueError, match="9 events in all, the encoder sees 8 at most"):
        encoder.extend(state, stored.batch([(7, 8, 9)]))
