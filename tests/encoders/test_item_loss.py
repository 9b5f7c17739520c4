"""Losses over a sample of the catalogue against the full one, and gBCE against its formula."""

import math

import pytest
import torch
from torch.nn import functional as F

from userllm.encoders.item_loss import ItemLoss, gbce, sampled_cross_entropy
from userllm.errors import UserError


def loss_of(kind, items, negatives, proposal="uniform", calibration=0.75):
    loss = ItemLoss(kind, items, negatives, proposal, calibration, torch.float32)
    loss.frequencies.copy_(torch.arange(items))
    return loss


def made(count=40, items=30, width=6):
    hidden, table = (
        torch.randn(count, width, requires_grad=True),
        torch.randn(items, width, requires_grad=True),
    )
    return hidden, table, torch.randint(items, (count,))


@pytest.mark.parametrize("proposal", ["uniform", "popularity"])
def test_every_item_as_a_negative_is_the_full_softmax(proposal):
    hidden, table, target = made()
    results = []
    for kind in ("full", "sampled"):
        loss = loss_of(kind, 30, 30, proposal)(hidden, table, target)
        results.append([loss.detach(), *torch.autograd.grad(loss, (hidden, table))])
    for full, sampled in zip(*results, strict=True):
        torch.testing.assert_close(full, sampled, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(results[0][0], F.cross_entropy(hidden @ table.T, target).detach())


@pytest.mark.parametrize("proposal", ["uniform", "popularity"])
def test_the_normaliser_is_estimated_without_bias(proposal):
    """exp(loss) * exp(right logit) averages to the sum over the catalogue, and inclusion is as often as is said."""
    hidden, table, target = made(count=3)
    hidden = hidden * 0.3  # or a rare item would make the average wait for very long
    loss = loss_of("sampled", 30, 12, proposal)
    rounds = 2000
    total, seen = torch.zeros(3, dtype=torch.double), torch.zeros(30)
    inclusion = torch.full((30,), torch.nan)
    with torch.no_grad():
        right = (hidden * table[target]).sum(-1)
        for _ in range(rounds):
            drawn, log_inclusion = loss.draw()
            seen[drawn] += 1 / rounds
            inclusion[drawn] = log_inclusion.exp()
            one = [
                sampled_cross_entropy(hidden[i : i + 1], table, target[i : i + 1], drawn, log_inclusion)
                + right[i]
                for i in range(3)
            ]
            total += torch.stack(one).double().exp() / rounds
    torch.testing.assert_close(seen, inclusion, atol=0.04, rtol=0)
    exact = (hidden @ table.T).exp().sum(1).detach().double()
    torch.testing.assert_close(total, exact, rtol=0.06, atol=0)


def test_a_drawn_target_counts_once():
    hidden, table, target = made(count=1)
    others = torch.tensor([j for j in range(10) if j != int(target)])
    with_it = torch.cat([others, target])
    zeros = torch.zeros(len(with_it))
    torch.testing.assert_close(
        sampled_cross_entropy(hidden, table, target, with_it, zeros),
        sampled_cross_entropy(hidden, table, target, others, zeros[1:]),
    )
    torch.testing.assert_close(
        gbce(hidden, table, target, with_it, 0.5), gbce(hidden, table, target, others, 0.5)
    )


@pytest.mark.parametrize("t", [0.0, 0.4, 0.75, 1.0])
def test_gbce_against_its_formula(t):
    """Equations of gSASRec, row by row: beta from the sampling rate, log of sigmoid to the power of beta."""
    hidden, table, target = made(count=5)
    drawn = torch.tensor([1, 4, 5, 9, 20, int(target[0])]).unique()
    expected = 0.0
    for row in range(5):
        negatives = [j for j in drawn.tolist() if j != int(target[row])]
        alpha = len(negatives) / (30 - 1)
        beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
        s = [1 / (1 + math.exp(-float(hidden[row].detach() @ table[j].detach()))) for j in range(30)]
        logs = math.log(s[int(target[row])] ** beta) + sum(math.log(1 - s[j]) for j in negatives)
        expected -= logs / (len(negatives) + 1) / 5
    assert float(gbce(hidden, table, target, drawn, t).detach()) == pytest.approx(expected, rel=1e-5)
    if t == 0:
        labels = (drawn == target[:, None]).float()
        pair = torch.cat([hidden @ table[drawn].T, (hidden * table[target]).sum(-1, keepdim=True)], 1)
        plain = F.binary_cross_entropy_with_logits(
            pair, torch.cat([torch.zeros_like(labels), torch.ones(5, 1)], 1), reduction="none"
        )
        kept = torch.cat([labels == 0, torch.ones(5, 1, dtype=torch.bool)], 1)
        mean = ((plain * kept).sum(1) / kept.sum(1)).mean()
        torch.testing.assert_close(gbce(hidden, table, target, drawn, 0.0), mean)


@pytest.mark.parametrize("kind", ["full", "sampled", "gbce"])
def test_nothing_to_predict_is_zero(kind):
    hidden, table, target = made(count=0)
    loss = loss_of(kind, 30, 5)(hidden, table, target)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not table.grad.any()


@pytest.mark.parametrize("kind", ["sampled", "gbce"])
def test_training_with_a_sample_learns(make_encoder, stored, kind):
    """An encoder that sees one batch again and again ranks its targets high, though no step saw the whole catalogue."""
    encoder = make_encoder(item_loss=kind, negatives=6, gbce_calibration=1.0)
    batch = stored.next_events([(7, 0, 9), (5, 0, 4)])
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.02)
    for _ in range(120):
        encoder.zero_grad()
        encoder.next_event_losses(**batch)["loss"].backward()
        optimizer.step()
    kept = batch["targets"].mask
    scores = encoder.item_scores(encoder(batch["inputs"])[0][kept])
    assert scores.shape == (11, 20)
    assert (scores.argmax(-1) == batch["targets"].fields["item"][kept] - 2).float().mean() > 0.9


def test_popularity_has_to_be_told(make_encoder, stored):
    encoder = make_encoder(item_loss="sampled", negatives=6, proposal="popularity")
    assert encoder.needs_frequencies
    assert not make_encoder().needs_frequencies
    batch = stored.next_events([(7, 0, 9)])
    with pytest.raises(RuntimeError, match="call use_frequencies"):
        encoder.next_event_losses(**batch)
    encoder.use_frequencies({"item": torch.arange(22.0)})
    assert encoder.item_loss.frequencies.tolist() == list(range(2, 22))
    assert encoder.next_event_losses(**batch)["item"].isfinite()
    assert encoder.state_dict().keys() == make_encoder().state_dict().keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negatives": 0}, "encoder.negatives is 0"),
        ({"gbce_calibration": 1.5}, "encoder.gbce_calibration is 1.5; it goes from 0 to 1"),
        ({"proposal": "popularity"}, "popularity is for item_loss: sampled, not full"),
        ({"item_loss": "gbce", "loss_precision": "bfloat16"}, "bfloat16 is for item_loss: full, not gbce"),
    ],
)
def test_settings_that_do_not_go_together(make_encoder, settings, message):
    with pytest.raises(UserError, match=message):
        make_encoder(**settings)
