"""Hidden events stay hidden, company and padding change nothing, and the loss is that of the hidden events."""

import pytest
import torch
from torch.nn import functional as F

from userllm.encoders import Bert4RecConfig, FieldShape
from userllm.errors import UserError
from userllm.events import HistoryBatch


@pytest.fixture
def encoder(make_encoder):
    return make_encoder("bert4rec")


def other_event(batch, position):
    """The same histories with another event at one position."""
    fields = {name: ids.clone() for name, ids in batch.fields.items()}
    fields["item"][:, position] = 2 + (fields["item"][:, position] - 1) % 20
    fields["rating"][:, position] = 2 + (fields["rating"][:, position] - 1) % 5
    fields["genres"][:, position] = fields["genres"][:, position].flip(-1)
    return HistoryBatch(fields, batch.mask)


@torch.no_grad()
def test_every_event_is_seen_from_every_position(encoder, stored):
    full = stored.batch([(7, 0, 9), (4, 0, 9)])
    before, mask = encoder(full)
    assert torch.equal(mask, full.mask)
    for position in range(9):
        after, _ = encoder(other_event(full, position))
        assert (after != before).any(-1).all()


@torch.no_grad()
@pytest.mark.parametrize("next_embedding", [False, True])
def test_padding_and_company_do_not_matter(make_encoder, stored, next_embedding):
    encoder = make_encoder("bert4rec", next_embedding=next_embedding)
    rows = [(7, 0, 9), (5, 0, 4), (3, 2, 3), (8, 0, 0)]
    together, mask = encoder(stored.batch([*rows, (6, 0, 11)]))
    assert mask.sum(1).tolist() == [n + next_embedding * (n > 0) for n in (9, 4, 1, 0, 11)]
    for b, row in enumerate(rows):
        alone, seen = encoder(stored.batch([row]))
        torch.testing.assert_close(together[b][mask[b]], alone[0][seen[0]], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(together).all()


@torch.no_grad()
def test_scores_of_a_prefix_do_not_know_what_came_after(encoder, stored):
    batch = stored.batch([(7, 0, 9), (5, 0, 4)])
    rows, ends = torch.tensor([0, 0, 1, 0, 1]), torch.tensor([9, 3, 4, 0, 1])
    scores = encoder.next_item_scores(batch, rows, ends)
    assert scores.shape == (5, 20)
    users = [7, 7, 5, 7, 5]
    for place, (user, end) in enumerate(zip(users, ends.tolist(), strict=True)):
        alone = stored.batch([(user, 0, end)])
        expected = encoder.next_item_scores(alone, torch.tensor([0]), alone.lengths)[0]
        torch.testing.assert_close(scores[place], expected, atol=1e-5, rtol=1e-5)
    shorter = encoder.next_item_scores(batch, torch.tensor([0]), torch.tensor([8]))[0]
    assert not torch.allclose(scores[0], shorter, atol=1e-3)


@torch.no_grad()
def test_the_next_embedding_is_what_the_scores_are_read_from(make_encoder, stored):
    encoder = make_encoder("bert4rec", next_embedding=True)
    batch = stored.batch([(7, 0, 9), (5, 0, 4)])
    embeddings, mask = encoder(batch)
    last = embeddings[torch.arange(2), mask.sum(1) - 1]
    expected = encoder.next_item_scores(batch, torch.arange(2), batch.lengths)
    torch.testing.assert_close(encoder.features.scores("item", last), expected, atol=1e-5, rtol=1e-5)
    assert not encoder.per_event


def test_the_loss_is_the_cross_entropy_of_hidden_events(encoder, stored, monkeypatch):
    batch = stored.next_events([(7, 0, 9), (5, 0, 4)])
    chunk = stored.batch([(7, 0, 9), (5, 0, 4)])
    hidden = torch.zeros_like(chunk.mask)
    hidden[0, [0, 4, 8]] = hidden[1, 2] = True
    monkeypatch.setattr(encoder, "hide", lambda mask: hidden)
    losses = encoder.next_event_losses(**batch)
    states = encoder._states(chunk, hidden)
    item = 0.0
    for b, s in torch.nonzero(hidden).tolist():
        logits = encoder.features.scores("item", states[b, s])
        item += float(F.cross_entropy(logits, chunk.fields["item"][b, s] - 2).detach()) / 4
    assert float(losses["item"].detach()) == pytest.approx(item, abs=1e-5)
    mean = torch.stack([losses[name] for name in ("item", "rating", "genres")]).mean()
    torch.testing.assert_close(losses["loss"], mean)
    # what is hidden cannot be read off the input, in no field
    same = encoder._states(other_event(chunk, 4), hidden)
    torch.testing.assert_close(same[0], states[0])
    assert not torch.allclose(same[1], states[1])


def test_what_is_hidden(make_encoder):
    encoder = make_encoder("bert4rec", hidden_share=0.3, last_share=0.0)
    lengths = torch.randint(1, 60, (400,))
    mask = torch.arange(60) < lengths[:, None]
    hidden = encoder.hide(mask)
    assert hidden.any(1).all() and not (hidden & ~mask).any()
    long = lengths > 20
    assert float(hidden[long].sum() / mask[long].sum()) == pytest.approx(0.3, abs=0.02)
    last = make_encoder("bert4rec", last_share=1.0).hide(mask)
    assert torch.equal(last, torch.arange(60) == lengths[:, None] - 1)


def test_it_learns(make_encoder, stored):
    encoder = make_encoder("bert4rec", hidden_share=0.5).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.01)
    batch = stored.next_events([(user, 0, 3) for user in range(24)])
    seen = []
    for _ in range(60):
        loss = encoder.next_event_losses(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert sum(seen[-5:]) < 0.8 * sum(seen[:5])
    assert all(not table.weight[0].any() for table in encoder.features.tables.values())


def test_defaults_and_settings_that_cannot_be(make_encoder, stored):
    config = Bert4RecConfig()
    assert (config.layers, config.width, config.heads, config.hidden_share) == (6, 128, 8, 0.2)
    layers = Bert4RecConfig(layers=2).build([FieldShape("item", False, 50)]).transformer.layers
    assert not torch.equal(layers[0].linear1.weight, layers[1].linear1.weight)
    with pytest.raises(UserError, match=r"encoder\.width 10 .* encoder\.heads 3"):
        make_encoder("bert4rec", width=10, heads=3)
    with pytest.raises(UserError, match=r"encoder\.field_weights.*'ratings'.*item, rating, genres"):
        make_encoder("bert4rec", field_weights={"ratings": 2.0})
    with pytest.raises(UserError, match=r"encoder\.hidden_share"):
        make_encoder("bert4rec", hidden_share=0.0)
    with pytest.raises(ValueError, match="9 events given, the encoder sees 5 at most"):
        make_encoder("bert4rec", max_length=5)(stored.batch([(7, 0, 9)]))
