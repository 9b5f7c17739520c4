"""The Perceiver's latents: where they start, and what they leave out."""

import numpy as np
import pytest
import torch

from userllm.fusion.config import FusionConfig
from userllm.fusion.perceiver import Perceiver, PerceiverConfig, stretches

STRETCHES = PerceiverConfig(latents=4, layers=2, heads=2, start="stretches")


@pytest.mark.parametrize(("events", "latents"), [(50, 16), (200, 16), (9, 4), (4, 4), (3, 4), (1, 2), (7, 1)])
def test_stretches_cover_the_history_from_old_to_new(events, latents):
    of_event = np.array(stretches(events, latents))
    assert len(of_event) == events and (np.diff(of_event) >= 0).all()
    assert of_event[-1] == latents - 1
    sizes = np.bincount(of_event, minlength=latents)
    assert (sizes > 0).sum() == min(events, latents)
    if events <= latents:
        assert sizes.max() == 1
    elif latents > 1:
        assert sizes[-1] == 1  # the latest alone
        assert sizes[0] == sizes.max()  # the oldest in the largest company


@pytest.mark.parametrize("known", [0, 1, 3, 9])
def test_at_first_a_latent_is_the_mean_of_its_stretch(known):
    torch.manual_seed(0)
    perceiver = Perceiver(STRETCHES, width=8, events=9)
    tokens, mask = torch.randn(1, 9, 8), torch.arange(9)[None] >= 9 - known
    tokens = torch.where(mask[..., None], tokens, 0.0)
    latents, filled = perceiver(tokens, mask)
    of_event = np.array(stretches(9, 4))
    for latent in range(4):
        own = [tokens[0, e] for e in range(9) if of_event[e] == latent and mask[0, e]]
        assert bool(filled[0, latent]) == bool(own)
        mean = torch.stack(own).mean(0) if own else torch.zeros(8)
        torch.testing.assert_close(latents[0, latent], perceiver.latents[latent] + mean)


def test_every_latent_learns_to_see_every_event():
    torch.manual_seed(0)
    perceiver = Perceiver(STRETCHES, width=8, events=9)
    tokens, mask = torch.randn(1, 9, 8), torch.ones(1, 9, dtype=torch.bool)
    optimizer = torch.optim.SGD(perceiver.parameters(), lr=0.1)
    for _ in range(2):  # the first step opens what begins by adding nothing
        optimizer.zero_grad()
        perceiver(tokens, mask)[0].pow(2).sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in perceiver.parameters())
    tokens.requires_grad_(True)
    perceiver(tokens, mask)[0][0, -1].sum().backward()
    assert (tokens.grad.abs().sum(-1) > 0).all()


def test_learned_latents_are_all_there_unless_nobody_is():
    perceiver = Perceiver(PerceiverConfig(latents=4, layers=1, heads=2), width=8, events=9)
    mask = torch.tensor([[False] * 8 + [True], [False] * 9])
    assert perceiver(torch.zeros(2, 9, 8), mask)[1].tolist() == [[True] * 4, [False] * 4]


def test_the_language_model_is_told_the_age_of_stretches_only():
    assert FusionConfig(perceiver=STRETCHES).block.recency
    assert not FusionConfig(perceiver=PerceiverConfig()).block.recency
