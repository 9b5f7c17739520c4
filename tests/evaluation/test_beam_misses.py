"""Beam search's misses: none where the beam is wide enough, the hand-made ones where a list is spoilt."""

import pytest
import torch

from userllm.decoding.beam_search import Ranking
from userllm.errors import UserError
from userllm.evaluation.beam_misses import beam_misses


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def users(model, histories):
    with torch.no_grad():
        return model.context(histories)


@pytest.mark.parametrize("left_out", [False, True])
def test_a_beam_as_wide_as_the_catalogue_misses_nothing(model, users, left_out):
    excluded = None
    if left_out:
        excluded = torch.rand(3, 20) < 0.5
        excluded[1, 3:] = True  # fewer than k are left
        excluded[2] = True  # none is
    [found] = beam_misses(model, "next_item", [(users, excluded)], k=5, beams=[20])
    assert (found.users, found.missing) == (2 if left_out else 3, 0)
    assert found.recall.value == found.identical.value == 1
    assert found.worst_gap == pytest.approx(0, abs=1e-4)


def test_what_is_missed_is_counted(model, users, monkeypatch):
    scores = model.score_answers("next_item", users)
    order = scores.argsort(dim=1, descending=True)
    lists = order[:, :4].clone()
    lists[1] = order[1, [0, 1, 2, 9]]  # the fourth is lost, a worse one taken
    lists[2, 2:] = -1  # two places are empty
    monkeypatch.setattr(model, "rank_answers", lambda *_: Ranking(lists, torch.zeros(3, 4)))
    [found] = beam_misses(model, "next_item", [(users, None)], k=4, beams=[4])
    assert found.recall.value == pytest.approx((1 + 0.75 + 0.5) / 3)
    assert found.identical.value == pytest.approx(1 / 3)
    assert found.missing == 2
    assert found.worst_gap == pytest.approx(float(scores[1, order[1, 3]] - scores[1, order[1, 9]]))


def test_a_single_beam_misses_something(model, users):
    narrow, wide = beam_misses(model, "next_item", [(users, None)], k=5, beams=[1, 20])
    assert narrow.recall.value < 1
    assert narrow.identical.value < wide.identical.value == 1


def test_nothing_to_compare(model, users):
    with pytest.raises(UserError, match="no user"):
        beam_misses(model, "next_item", [])
    with pytest.raises(UserError, match="k is 0"):
        beam_misses(model, "next_item", [(users, None)], k=0)
