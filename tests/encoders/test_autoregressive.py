"""The encoder sees the past only, whatever else is in the batch, and its loss is the papers'."""

import pytest
import torch
from torch.nn import functional as F

from userllm.encoders import AutoregressiveConfig, FieldShape
from userllm.errors import UserError
from userllm.events import HistoryBatch


def changed(batch, position):
    """The same histories with another event at one position."""
    fields = {name: ids.clone() for name, ids in batch.fields.items()}
    fields["item"][:, position] = 2 + (fields["item"][:, position] - 1) % 20
    fields["rating"][:, position] = 2 + (fields["rating"][:, position] - 1) % 5
    fields["genres"][:, position] = fields["genres"][:, position].flip(-1)
    return HistoryBatch(fields, batch.mask)


def prefix(batch, length):
    return HistoryBatch({name: ids[:, :length] for name, ids in batch.fields.items()}, batch.mask[:, :length])


@pytest.fixture
def full(stored):
    """Two histories of 9 events."""
    return stored.batch([(7, 0, 9), (4, 0, 9)])


def test_a_later_event_changes_no_earlier_output(make_encoder, full):
    encoder = make_encoder()
    with torch.no_grad():
        before = encoder(full)[0]
        for position in range(9):
            after = encoder(changed(full, position))[0]
            assert torch.equal(after[:, :position], before[:, :position])
            assert (after[:, position:] != before[:, position:]).any(-1).all()


def test_one_pass_equals_prefix_by_prefix(make_encoder, full):
    encoder = make_encoder()
    with torch.no_grad():
        whole = encoder(full)[0]
        for length in range(1, 10):
            last = encoder(prefix(full, length))[0][:, -1]
            torch.testing.assert_close(last, whole[:, length - 1], atol=1e-5, rtol=1e-5)


def test_padding_and_company_do_not_matter(make_encoder, stored):
    encoder = make_encoder()
    rows = [(7, 0, 9), (5, 0, 4), (3, 2, 3)]
    with torch.no_grad():
        together, mask = encoder(stored.batch([*rows, (6, 0, 11)]))
        assert mask.sum(1).tolist() == [9, 4, 1, 11]
        for row, (user, start, stop) in enumerate(rows):
            alone = encoder(stored.batch([(user, start, stop)]))[0][0]
            torch.testing.assert_close(together[row, : stop - start], alone, atol=1e-5, rtol=1e-5)


def test_the_order_of_a_fields_values_does_not_matter_and_none_is_zero(make_encoder, full):
    encoder = make_encoder()
    ids = {name: v.clone() for name, v in full.fields.items()}
    ids["genres"] = ids["genres"].flip(-1)
    with torch.no_grad():
        torch.testing.assert_close(encoder(HistoryBatch(ids, full.mask))[0], encoder(full)[0])
        embedded = encoder.features.tables["genres"](torch.tensor([3, 4])).mean(0)
        genres = torch.zeros(1, 1, 2, dtype=torch.long)
        base = {"item": torch.tensor([[2]]), "rating": torch.tensor([[2]])}
        none = encoder.features(base | {"genres": genres})
        two = encoder.features(base | {"genres": torch.tensor([[[3, 4]]])})
        weight = encoder.features.fuse.weight[:, -4:]  # the genres come last
        torch.testing.assert_close(two - none, (weight @ embedded)[None, None])


def test_the_loss_is_the_mean_over_fields_of_cross_entropy(make_encoder, stored):
    encoder = make_encoder()
    batch = stored.next_events([(7, 0, 9), (5, 0, 4), (10, 0, 2)])
    losses = encoder.next_event_losses(**batch)
    hidden = encoder(batch["inputs"])[0]
    sums, counts = {"item": 0.0, "rating": 0.0, "genres": 0.0}, dict.fromkeys(("item", "rating", "genres"), 0)
    for b, s in torch.nonzero(batch["targets"].mask).tolist():
        for name in sums:
            table = encoder.features.tables[name].weight[2:]
            log_p = F.log_softmax(encoder.features.heads[name](hidden[b, s]) @ table.T, -1)
            values = [v - 2 for v in batch["targets"].fields[name][b, s].reshape(-1).tolist() if v >= 2]
            if values:
                sums[name] -= float(sum(log_p[v] for v in values).detach()) / len(values)
                counts[name] += 1
    assert counts["item"] == 8 + 3 + 1
    assert counts["genres"] <= counts["item"]
    for name in sums:
        assert float(losses[name].detach()) == pytest.approx(sums[name] / counts[name], abs=1e-5)
    mean = sum(sums[name] / counts[name] for name in sums) / 3
    assert float(losses["loss"].detach()) == pytest.approx(mean, abs=1e-5)


def test_targets_without_a_value_do_not_count(make_encoder, stored):
    encoder = make_encoder()
    batch = stored.next_events([(7, 0, 9)])
    expected = encoder.next_event_losses(**stored.next_events([(7, 0, 5)]))
    for ids in batch["targets"].fields.values():
        ids[:, 4:] = 1  # unknown
    losses = encoder.next_event_losses(**batch)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    for ids in batch["targets"].fields.values():
        ids[:] = 1
    nothing = encoder.next_event_losses(**batch)
    assert all(float(value.detach()) == 0 for value in nothing.values())
    nothing["loss"].backward()
    assert all(w.grad is None or torch.isfinite(w.grad).all() for w in encoder.parameters())


def test_field_weights(make_encoder, stored):
    batch = stored.next_events([(7, 0, 9)])
    losses = make_encoder(field_weights={"item": 3.0, "rating": 0.0}).next_event_losses(**batch)
    torch.testing.assert_close(losses["loss"], (3 * losses["item"] + losses["genres"]) / 4)


def test_padding_embeds_to_nothing_even_after_training(make_encoder, stored):
    encoder = make_encoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1)
    for _ in range(3):
        encoder.next_event_losses(**stored.next_events([(7, 0, 9), (5, 0, 4)]))["loss"].backward()
        optimizer.step()
    assert all(not table.weight[0].any() for table in encoder.features.tables.values())


def test_item_scores_are_over_the_catalogue(make_encoder, full):
    encoder = make_encoder()
    scores = encoder.item_scores(encoder(full)[0][:, -1])
    assert scores.shape == (2, 20)
    hidden = encoder.features.heads["item"](encoder(full)[0][1, -1])
    torch.testing.assert_close(scores[1, 7], hidden @ encoder.features.tables["item"].weight[9])


def test_defaults_are_the_papers():
    config = AutoregressiveConfig()
    assert (config.layers, config.width, config.heads) == (6, 128, 8)
    encoder = config.build([FieldShape("item", False, 50), FieldShape("genres", True, 20)])
    assert len(encoder.blocks) == 6
    assert encoder.width == 128
    assert encoder.blocks[0].heads == 8


def test_settings_that_cannot_be_are_named(make_encoder, full):
    with pytest.raises(UserError, match=r"encoder\.width 10 .* encoder\.heads 3"):
        make_encoder(width=10, heads=3)
    with pytest.raises(UserError, match=r"encoder\.field_weights.*'ratings'.*item, rating, genres"):
        make_encoder(field_weights={"ratings": 2.0})
    with pytest.raises(ValueError, match="9 events given, the encoder sees 5 at most"):
        make_encoder(max_length=5)(full)


def test_dropout_is_off_outside_training(make_encoder, full):
    encoder = make_encoder(dropout=0.5)
    with torch.no_grad():
        assert torch.equal(encoder(full)[0], encoder(full)[0])
        encoder.train()
        assert not torch.equal(encoder(full)[0], encoder(full)[0])
