"""Each field is a sequence of its own, every prefix has its user, and sampled negatives estimate the full softmax."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from userllm.encoders import DualConfig
from userllm.encoders.dual import FieldSequence, sampled_logits
from userllm.errors import UserError
from userllm.training.pretrain import training_counts


@pytest.fixture
def encoder(make_encoder):
    return make_encoder("dual", heads=4)


def test_events_without_a_value_are_no_part_of_a_fields_sequence():
    ids = torch.tensor([[[3, 0], [0, 0], [2, 4], [5, 0]], [[0, 0], [1, 0], [0, 0], [0, 0]]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    genres = FieldSequence.from_events(ids, mask)
    assert genres.ids.tolist() == [[[3, 0], [2, 4], [5, 0]], [[1, 0], [0, 0], [0, 0]]]
    assert genres.seen.tolist() == [[0, 1, 1, 2, 3], [0, 0, 1, 1, 1]]
    ratings = FieldSequence.from_events(torch.tensor([[2, 1, 4, 3], [5, 2, 9, 9]]), mask)
    assert ratings.ids.tolist() == [[2, 1, 4, 3], [5, 2, 0, 0]]
    assert ratings.seen.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 2, 2]]


@torch.no_grad()
def test_fields_may_have_other_lengths_and_times(encoder):
    """Seven items, two ratings: at each moment the tower knows what had come by then, and nothing that came later."""
    item = torch.tensor([[2, 3, 4, 5, 6, 7, 8]])
    rating = torch.tensor([[4, 2]])
    genres = torch.zeros(1, 1, 2, dtype=torch.long)
    seen = {"item": [0, 3, 5, 7], "rating": [0, 0, 1, 2], "genres": [0, 0, 0, 0]}

    def tower(**ids):
        return encoder.user_tower(
            {name: FieldSequence(values, torch.tensor([seen[name]])) for name, values in ids.items()}
        )[0]

    before = tower(item=item, rating=rating, genres=genres)
    assert before.shape == (4, 1, 16)
    later = rating.clone()
    later[0, 1] = 6
    after = tower(item=item, rating=later, genres=genres)
    assert torch.equal(after[:3], before[:3])
    assert not torch.allclose(after[3], before[3])
    padded = tower(item=F.pad(item, (0, 4)), rating=F.pad(rating, (0, 1)), genres=genres)
    torch.testing.assert_close(padded, before)


@torch.no_grad()
@pytest.mark.parametrize("embeddings", [1, 3])
def test_one_pass_equals_prefix_by_prefix_in_any_company(make_encoder, stored, embeddings):
    encoder = make_encoder("dual", heads=4, embeddings=embeddings)
    batch = stored.batch([(7, 0, 9), (5, 0, 4), (6, 0, 11), (8, 0, 0)])
    whole = encoder.prefix_embeddings(batch)
    assert whole.shape == (4, 12, embeddings, 16)
    for row, (user, length) in enumerate([(7, 9), (5, 4), (6, 11)]):
        for end in range(1, length + 1):
            alone, mask = encoder(stored.batch([(user, 0, end)]))
            assert mask.all() and alone.shape == (1, embeddings, 16)
            torch.testing.assert_close(alone[0], whole[row, end], atol=1e-5, rtol=1e-5)
    together, mask = encoder(batch)
    assert mask.tolist() == [[True] * embeddings] * 3 + [[False] * embeddings]
    torch.testing.assert_close(together[3], whole[0, 0])  # a user of whom nothing is known yet
    scores = encoder.next_item_scores(batch, torch.tensor([2, 0]), torch.tensor([11, 3]))
    expected = torch.stack(
        [(whole[2, 11] @ encoder.label_tower().T), (whole[0, 3] @ encoder.label_tower().T)]
    )
    torch.testing.assert_close(scores, expected.max(1).values)
    assert scores.shape == (2, 20)


@pytest.mark.parametrize("label", ["item", "rating", "genres"])
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_cross_entropy_of_the_next_label(make_encoder, stored, label, training):
    encoder = make_encoder("dual", heads=4, label=label).train(training)
    batch = stored.next_events([(7, 0, 9), (5, 0, 4), (10, 0, 2)])
    losses = encoder.next_event_losses(**batch)
    total, count = 0.0, 0
    for b, s in torch.nonzero(batch["targets"].mask).tolist():
        user = encoder.prefix_embeddings(batch["inputs"])[b, s + 1, 0]
        log_p = torch.log_softmax(encoder.label_tower() @ user, 0)
        for value in batch["targets"].fields[label][b, s].reshape(-1).tolist():
            if value >= 2:
                total, count = total - float(log_p[value - 2].detach()), count + 1
    assert losses.keys() == {"loss", label}
    assert float(losses["loss"].detach()) == pytest.approx(total / count, abs=1e-5)


def test_with_several_embeddings_the_fitting_one_learns(make_encoder, stored):
    encoder = make_encoder("dual", heads=4, embeddings=3).train()
    batch = stored.next_events([(7, 0, 9)])
    users = encoder.prefix_embeddings(batch["inputs"])[:, 1:][batch["targets"].mask]
    labels, target = (
        encoder.label_tower().detach(),
        batch["targets"].fields["item"][batch["targets"].mask] - 2,
    )
    expected = torch.stack(
        [
            F.cross_entropy((labels @ max(user, key=lambda u: float(u @ labels[t])))[None], t[None])
            for user, t in zip(users.detach(), target, strict=True)
        ]
    )
    torch.testing.assert_close(encoder.next_event_losses(**batch)["loss"], expected.mean())


@pytest.mark.parametrize("drawn", [0, 3])
def test_sampled_negatives_estimate_the_full_sum_without_bias(drawn):
    """Over many random batches, the mean of the softmax's estimated sum is the sum over all labels."""
    frequencies = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).double()
    labels, user = torch.randn(5, 4).double(), torch.randn(1, 4).double()
    sums = []
    for _ in range(3000):
        target = torch.multinomial(frequencies, 3, replacement=True)
        target[0] = 2  # what the user asked about has chosen; the others' choices are random
        logits, column = sampled_logits(user.expand(3, -1), labels, target, frequencies, drawn)
        assert float(logits[0, column[0]]) == pytest.approx(float(user[0] @ labels[2]))
        sums.append(float(logits[0].exp().sum()))
    error = np.std(sums) / len(sums) ** 0.5
    assert error > 0 and abs(np.mean(sums) - float((user @ labels.T).exp().sum())) < 4 * error


def test_with_enough_draws_it_is_the_full_softmax():
    labels, users, target = torch.randn(6, 4), torch.randn(9, 4), torch.randint(6, (9,))
    logits, column = sampled_logits(users, labels, target, torch.full((6,), 1 / 6).double(), drawn=500)
    torch.testing.assert_close(F.cross_entropy(logits, column), F.cross_entropy(users @ labels.T, target))


@pytest.mark.parametrize("negatives", ["batch", "mixed"])
@pytest.mark.parametrize("label", ["item", "genres"])
def test_every_kind_of_negatives_learns(make_encoder, stored, split, negatives, label):
    encoder = make_encoder("dual", heads=4, negatives=negatives, label=label, drawn_negatives=10).train()
    batch = stored.next_events([(user, 0, 3) for user in range(24)])
    with pytest.raises(ValueError, match="use_frequencies"):
        encoder.next_event_losses(**batch)
    encoder.use_frequencies(training_counts(stored, split))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.01)
    before = encoder.eval().next_event_losses(**batch)["loss"].detach()
    for _ in range(25):
        loss = encoder.train().next_event_losses(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(encoder.eval().next_event_losses(**batch)["loss"].detach()) < 0.85 * float(before)
    assert all(not tower.table.weight[0].any() for tower in encoder.user_tower.fields.values())
    assert "frequencies" not in encoder.state_dict()


def test_a_batch_without_targets(make_encoder, stored, split):
    for negatives in ("catalogue", "batch", "mixed"):
        encoder = make_encoder("dual", heads=4, negatives=negatives).train()
        encoder.use_frequencies(training_counts(stored, split))
        batch = stored.next_events([(7, 0, 9)])
        batch["targets"].fields["item"][:] = 1  # unknown
        loss = encoder.next_event_losses(**batch)["loss"]
        loss.backward()
        assert float(loss.detach()) == 0
        assert all(w.grad is None or torch.isfinite(w.grad).all() for w in encoder.parameters())


def test_training_counts_are_of_the_training_targets(stored, split, dataset, vocabulary):
    counts = training_counts(stored, split, batch=5)
    items, ratings = np.zeros(22), np.zeros(vocabulary["rating"].size)
    for user, end in zip(split.users.tolist(), split.train_end.tolist(), strict=True):
        for event in dataset.history(user, 1, end).events:
            items[vocabulary["item"].id_of(event.item)] += 1
            ratings[vocabulary["rating"].id_of(event.fields["rating"])] += 1
    assert counts["item"].tolist() == items.tolist()
    assert counts["rating"].tolist() == ratings.tolist()
    assert int(counts["genres"][0]) == 0 < int(counts["genres"].sum())


def test_settings_that_cannot_be_are_named(make_encoder, stored):
    assert DualConfig().embeddings == 1
    for settings, message in [
        ({"label": "ratings"}, r"encoder\.label: no field 'ratings'; the fields are item, rating, genres"),
        ({"embeddings": 0}, r"encoder\.embeddings is 0"),
        ({"heads": 3}, r"encoder\.item_width 16 is not a multiple of encoder\.heads 3"),
        ({"item_width": 24, "heads": 8}, r"encoder\.field_width 4 is not a multiple of encoder\.heads 8"),
    ]:
        with pytest.raises(UserError, match=message):
            make_encoder("dual", **settings)
    with pytest.raises(ValueError, match="9 events given, the encoder sees 5 at most"):
        make_encoder("dual", max_length=5)(stored.batch([(7, 0, 9)]))
    genres = make_encoder("dual", label="genres")
    assert not genres.ranks_items
    with pytest.raises(UserError, match=r"encoder\.label=genres cannot rank the catalogue"):
        genres.next_item_scores(stored.batch([(7, 0, 9)]), torch.tensor([0]), torch.tensor([9]))
