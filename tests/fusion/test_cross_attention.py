"""The cross-attention block and the Perceiver against loops that follow the formulas word by word."""

import pytest
import torch

from userllm.errors import UserError
from userllm.fusion.cross_attention import CrossAttentionBlock, CrossAttentionConfig
from userllm.fusion.perceiver import Perceiver, PerceiverConfig
from userllm.fusion.projection import UserTokens


def layer_norm(x, norm):
    scaled = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    return scaled * norm.weight + norm.bias


def slopes(heads, recency):
    """By head: how much an event's logit falls with each later event. 0, then powers of 2 from 2^-5 to 2^1."""
    if not recency:
        return [0.0] * heads
    between = 6 / (heads - 2) if heads > 2 else 0
    return [0.0] + [2 ** (-5 + between * h) for h in range(heads - 1)]


def attend(queries, keys, values, mask, heads, recency=False):
    """One text's queries [T, I] over M tokens, head by head; also the weights averaged over heads [T, M]."""
    out, weights = [], []
    age = torch.arange(len(keys) - 1, -1, -1)
    width = queries.shape[-1] // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = torch.einsum("ti,mi->tm", queries[:, part], keys[:, part]) / width**0.5
        scores = scores - slopes(heads, recency)[h] * age
        share = torch.softmax(scores[:, mask], -1)
        out.append(torch.einsum("tm,mi->ti", share, values[mask][:, part]))
        full = torch.zeros_like(scores)
        full[:, mask] = share
        weights.append(full)
    return torch.cat(out, -1), torch.stack(weights).mean(0)


def reference(block, hidden, tokens, mask):
    result, weights = hidden.clone(), torch.zeros(*hidden.shape[:2], tokens.shape[1])
    each = len(hidden) // len(tokens)
    for row in range(len(hidden)):
        user = row // each
        if not mask[user].any():
            continue
        normed = layer_norm(tokens[user], block.user_norm)
        mixed, weights[row] = attend(
            layer_norm(hidden[row], block.text_norm) @ block.query.weight.T,
            normed @ block.key.weight.T,
            normed @ block.value.weight.T,
            mask[user],
            block.config.heads,
            block.config.recency,
        )
        update = mixed @ block.out.weight.T
        if block.config.scale == "residual":
            update = update * hidden[row].pow(2).mean(-1, keepdim=True).sqrt()
        result[row] += update * (1 if block.gate is None else torch.tanh(block.gate))
    return result, weights


@pytest.fixture
def users():
    mask = torch.tensor([[True] * 5, [False, False, True, True, True], [False] * 5])
    return torch.randn(3, 5, 12), mask


@pytest.mark.parametrize("gate", ["tanh", "none"])
@pytest.mark.parametrize("scale", ["residual", "none"])
@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("recency", [True, False])
def test_block_equals_the_formula(users, gate, scale, each, recency):
    config = CrossAttentionConfig(4, 6, gate=gate, scale=scale, recency=recency)
    block = CrossAttentionBlock(config, lm_width=20, user_width=12)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    tokens, mask = users
    hidden = torch.randn(3 * each, 7, 20)
    keys, values = block.project_users(tokens)
    expected, weights = reference(block, hidden, tokens, mask)
    torch.testing.assert_close(block(hidden, keys, values, mask), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(block.attention(hidden, keys, mask), weights, atol=1e-5, rtol=1e-4)
    assert torch.equal(block(hidden, keys, values, mask)[2 * each :], hidden[2 * each :])


@pytest.mark.parametrize("gate", ["tanh", "none"])
def test_a_new_block_changes_nothing_but_can_learn(users, gate):
    block = CrossAttentionBlock(CrossAttentionConfig(4, 6, gate=gate), lm_width=20, user_width=12)
    tokens, mask = users
    hidden = torch.randn(3, 7, 20)
    out = block(hidden, *block.project_users(tokens), mask)
    assert torch.equal(out, hidden)
    assert block.gate_value == (0.0 if gate == "tanh" else 1.0)
    out.pow(2).sum().backward()
    learns = block.gate if gate == "tanh" else block.out.weight
    assert learns.grad.abs().sum() > 0


def test_gradients_survive_an_empty_user(users):
    tokens, mask = users
    block = CrossAttentionBlock(CrossAttentionConfig(4, 6), lm_width=20, user_width=12)
    block.gate.data.fill_(1.0)
    tokens = tokens.requires_grad_()
    block(torch.randn(3, 7, 20), *block.project_users(tokens), mask).sum().backward()
    assert all(torch.isfinite(w.grad).all() for w in block.parameters())
    assert not tokens.grad[2].any()
    assert not tokens.grad[1, :2].any()


def test_perceiver_equals_the_formula(users):
    tokens, mask = users
    perceiver = Perceiver(PerceiverConfig(latents=3, layers=2, heads=2), 12, tokens.shape[1])
    for weight in perceiver.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    result, _ = perceiver(tokens, mask)
    assert result.shape == (3, 3, 12)
    for b in range(2):
        latents = perceiver.latents
        for layer in perceiver.layers:
            normed = layer_norm(tokens[b], layer.input_norm)
            key_weight, value_weight = layer.key_value.weight.chunk(2)
            queries = layer_norm(latents, layer.latent_norm) @ layer.query.weight.T
            mixed, _ = attend(queries, normed @ key_weight.T, normed @ value_weight.T, mask[b], 2)
            latents = latents + mixed @ layer.out.weight.T
            norm, up, _, down = layer.feed_forward
            fed = torch.nn.functional.gelu(layer_norm(latents, norm) @ up.weight.T + up.bias)
            latents = latents + fed @ down.weight.T + down.bias
        torch.testing.assert_close(result[b], latents, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(result).all()


def test_perceiver_defaults_are_the_papers():
    assert (PerceiverConfig().latents, PerceiverConfig().layers) == (16, 6)


def test_perceiver_heads_must_divide_the_width():
    with pytest.raises(UserError, match=r"perceiver\.heads"):
        Perceiver(PerceiverConfig(heads=5), 12, 50)


@pytest.mark.parametrize("ends", [0, 1, 3, 4, 6])
def test_user_tokens_are_the_latest_events_with_their_recency(ends):
    projection = UserTokens(width=5, events=4)
    embeddings = torch.randn(2, 6, 5)
    tokens, mask = projection(embeddings, torch.tensor([1]), torch.tensor([ends]))
    seen = min(ends, 4)
    assert mask[0].tolist() == [False] * (4 - seen) + [True] * seen
    for back in range(seen):
        expected = embeddings[1, ends - 1 - back] + projection.recency.weight[back]
        assert torch.equal(tokens[0, 3 - back], expected)
    assert not tokens[0, : 4 - seen].any()


def test_user_tokens_keep_meaningless_padding_out():
    projection = UserTokens(width=5, events=4)
    embeddings = torch.randn(1, 6, 5)
    embeddings[0, 2:] = float("nan")
    tokens, _ = projection(embeddings, torch.tensor([0]), torch.tensor([2]))
    assert torch.isfinite(tokens).all()


def test_a_perceiver_yields_latents_and_an_empty_user_none():
    projection = UserTokens(width=8, events=4, perceiver=PerceiverConfig(latents=3, layers=1, heads=2))
    tokens, mask = projection(torch.randn(2, 6, 8), torch.tensor([0, 1]), torch.tensor([5, 0]))
    assert tokens.shape == (2, 3, 8)
    assert mask.tolist() == [[True] * 3, [False] * 3]
