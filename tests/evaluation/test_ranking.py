"""Ranks against naive loops, and the encoder's ranking against scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import label_ranking_average_precision_score, top_k_accuracy_score

from userllm.evaluation.ranking import encoder_ranks, fixed_ranks, rank_of, seen_items, target_items


def naive_rank(scores, target, excluded):
    """Go down the list, the best first, among equals the earlier item, and count."""
    rank = 1
    for item in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if item == target:
            return rank
        rank += not excluded[item]
    raise AssertionError


@given(st.data(), st.integers(1, 12), st.integers(1, 4))
def test_rank_of_with_ties_and_exclusions(data, items, users):
    row = st.lists(st.integers(-2, 2).map(float), min_size=items, max_size=items)
    flags = st.lists(st.booleans(), min_size=items, max_size=items)
    scores = [data.draw(row) for _ in range(users)]
    excluded = [data.draw(flags) for _ in range(users)]
    targets = [data.draw(st.integers(0, items - 1)) for _ in range(users)]
    found = rank_of(torch.tensor(scores), torch.tensor(targets), torch.tensor(excluded))
    assert found.tolist() == [naive_rank(*case) for case in zip(scores, targets, excluded, strict=True)]
    everything = [[False] * items] * users
    found = rank_of(torch.tensor(scores), torch.tensor(targets))
    assert found.tolist() == [naive_rank(*case) for case in zip(scores, targets, everything, strict=True)]


def test_a_score_that_is_no_number_never_wins():
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[nan] * 4, [1.0, nan, 3.0, 2.0], [1.0, nan, 3.0, 2.0], [inf, -inf, -inf, 0.0]])
    assert rank_of(scores, torch.tensor([0, 1, 2, 2])).tolist() == [5, 5, 2, 4]


def test_seen_items_and_targets(dataset):
    rows = np.array([[7, 0, 9], [7, 5, 9], [5, 0, 1], [8, 2, 2]])
    for (user, _, stop), mask, target in zip(
        rows, seen_items(dataset, rows), target_items(dataset, rows), strict=True
    ):
        before = {event.item for event in dataset.history(user, 0, stop).events}
        assert {dataset.items["id"][i] for i in torch.nonzero(mask)[:, 0].tolist()} == before
        assert dataset.items["id"][int(target)] == dataset.history(user, stop, stop + 1).events[0].item


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_encoder_ranks_agree_with_scikit_learn(make_encoder, dataset, split, stored, exclude_seen):
    encoder = make_encoder().train()
    rows = split.examples("test", max_length=12)
    ranks, log_likelihoods = encoder_ranks(encoder, stored, dataset, rows, exclude_seen, batch=5)
    assert encoder.training, "the encoder's mode is left as it was"
    encoder.eval()
    items, scores = [], []
    for user, start, stop in rows.tolist():
        history = stored.batch([(user, start, stop)])
        with torch.no_grad():
            own = encoder.item_scores(encoder(history)[0][0, -1]).double().numpy()
        items.append(int(dataset.events["item"][dataset.offsets[user] + stop]))
        expected = own[items[-1]] - np.log(np.exp(own).sum())
        assert log_likelihoods[len(items) - 1] == pytest.approx(expected, abs=1e-5)
        if exclude_seen:
            own[dataset.events["item"][dataset.offsets[user] : dataset.offsets[user] + stop]] = -1e9
        scores.append(own)
    truth = np.eye(dataset.num_items)[items]
    each = [
        label_ranking_average_precision_score(t[None], s[None]) for t, s in zip(truth, scores, strict=True)
    ]
    assert np.allclose(1 / ranks, each)
    for k in (1, 5, 10):
        accuracy = top_k_accuracy_score(items, scores, k=k, labels=np.arange(dataset.num_items))
        assert np.mean(ranks <= k) == pytest.approx(accuracy)


def test_fixed_ranks_are_ranks_of_everyones_scores(dataset, split):
    rows = split.examples("validation")
    scores = torch.randint(0, 4, (dataset.num_items,)).float()
    for exclude_seen in (True, False):
        excluded = seen_items(dataset, rows) if exclude_seen else None
        expected = rank_of(scores.expand(len(rows), -1), target_items(dataset, rows), excluded)
        assert fixed_ranks(scores, dataset, rows, exclude_seen, batch=4).tolist() == expected.tolist()
