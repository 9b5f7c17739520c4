"""The settings of the autoregressive encoder: the defaults stay what they were, each other value does what it says."""

import pytest
import torch

from userllm.encoders import AutoregressiveConfig, FieldShape
from userllm.errors import UserError
from userllm.events import HistoryBatch


def made_batch(shift):
    """Three histories of 8, 5 and 1 events, made without a random number."""
    steps = torch.arange(8)[None] + 3 * torch.arange(3)[:, None] + shift
    mask = torch.arange(8) < torch.tensor([8, 5, 1])[:, None]
    genres = torch.stack([2 + steps % 7, (steps % 3 > 0) * (2 + steps % 6)], -1)
    fields = {
        "item": (2 + steps % 28) * mask,
        "rating": (2 + steps % 5) * mask,
        "genres": genres * mask[..., None],
    }
    return HistoryBatch(fields, mask)


def test_the_defaults_are_what_they_were_before_there_were_settings():
    """Weights, outputs, losses and gradients (dropout included) of the first release, written down."""
    torch.manual_seed(0)
    fields = [FieldShape("item", False, 30), FieldShape("rating", False, 7), FieldShape("genres", True, 9)]
    sizes = {"layers": 2, "width": 16, "heads": 2, "feed_forward": 24, "item_width": 12, "field_width": 4}
    encoder = AutoregressiveConfig(**sizes, max_length=10).build(fields)
    assert len(encoder.state_dict()) == 38
    weights = sum(float(weight.double().abs().sum()) for weight in encoder.state_dict().values())
    assert weights == pytest.approx(709.2504343484834, rel=1e-7)
    with torch.no_grad():
        output = encoder.eval()(made_batch(0))
    last = torch.stack([output[0, 7, :3], output[1, 4, :3]])
    written = [[-0.02199352, 0.31368578, -1.18985534], [0.24005774, 0.45522493, -1.06857526]]
    torch.testing.assert_close(last, torch.tensor(written))
    torch.manual_seed(1)
    losses = encoder.train().next_event_losses(made_batch(0), made_batch(1))
    losses["loss"].backward()
    expected = {"loss": 2.31157374, "item": 3.36017179, "rating": 1.64240992, "genres": 1.93213952}
    assert {name: float(value.detach()) for name, value in losses.items()} == pytest.approx(
        expected, rel=1e-5
    )
    gradients = sum(float(weight.grad.double().abs().sum()) for weight in encoder.parameters())
    assert gradients == pytest.approx(63.0706267927022, rel=1e-4)


def test_positions_counted_from_the_end(make_encoder, stored):
    """The latest event has position 0 whatever stands beside it; nothing else of the encoder changes."""
    encoder = make_encoder(count_from="end")
    forwards = make_encoder()
    rows = [(7, 0, 9), (5, 0, 4), (3, 2, 3)]
    batch = stored.batch(rows)
    with torch.no_grad():
        for b, (user, start, stop) in enumerate(rows):
            n = stop - start
            alone = encoder(stored.batch([(user, start, stop)]))[0]
            torch.testing.assert_close(encoder(batch)[b, :n], alone, atol=1e-5, rtol=1e-5)
            forwards.positions.weight[:n] = encoder.positions.weight[:n].flip(0)
            torch.testing.assert_close(forwards(stored.batch([(user, start, stop)]))[0], alone)
        prefix = encoder(stored.batch([(7, 0, 5)]))[0, -1]
        assert not torch.allclose(prefix, encoder(batch)[0, 4], atol=1e-3), "a prefix is not yet at its end"


def test_a_field_of_weight_0_is_read_but_its_loss_is_not_computed(make_encoder, stored, monkeypatch):
    encoder = make_encoder(field_weights={"genres": 0.0})
    scored = []
    scores = encoder.features.scores
    monkeypatch.setattr(
        encoder.features, "scores", lambda name, hidden: scored.append(name) or scores(name, hidden)
    )
    losses = encoder.next_event_losses(**stored.next_events([(7, 0, 9)]))
    assert set(losses) == {"loss", "item", "rating"}
    assert scored == []
    torch.testing.assert_close(losses["loss"], (losses["item"] + losses["rating"]) / 2)
    losses["loss"].backward()
    assert encoder.features.tables["genres"].weight.grad.any()
    assert encoder.features.heads["genres"].weight.grad is None
    with pytest.raises(UserError, match=r"field_weights: every field's weight is 0"):
        make_encoder(field_weights={"item": 0, "rating": 0, "genres": 0})


def test_the_loss_in_bfloat16_is_close(make_encoder, stored):
    batch = stored.next_events([(7, 0, 9), (5, 0, 4)])
    exact, rounded = make_encoder(), make_encoder(loss_precision="bfloat16")
    losses = [encoder.next_event_losses(**batch) for encoder in (exact, rounded)]
    assert losses[0]["item"] != losses[1]["item"]
    torch.testing.assert_close(losses[0]["item"], losses[1]["item"], rtol=1e-2, atol=0)
    assert losses[0]["rating"] == losses[1]["rating"]
