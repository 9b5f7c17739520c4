"""Scores of the encoders against an independent reading of the same weights: one event, one head at a time."""

import math

import pytest
import torch


def norm(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + layer.eps) * layer.weight + layer.bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(x, qkv, heads, sees):
    """x [S, U] -> [S, U]; qkv(x) [S, 3U] in the order queries, keys, values; ``sees(s)`` the positions s attends to."""
    q, k, v = qkv(x).split(x.shape[1], dim=1)
    width = x.shape[1] // heads
    rows = []
    for s in range(len(x)):
        parts = []
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            weights = torch.stack([q[s, own] @ k[t, own] / math.sqrt(width) for t in sees(s)]).exp()
            parts.append(sum(w * v[t, own] for w, t in zip(weights / weights.sum(), sees(s), strict=True)))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def event(features, history):
    """Fused embeddings [S, U] of a user's events, from the raw ids."""
    rows = []
    for s in range(int(history.lengths[0])):
        parts = []
        for field in features.fields:
            table = features.tables[field.name].weight
            values = [v for v in history.fields[field.name][0, s].reshape(-1).tolist() if v]
            parts.append(table[values].mean(0) if values else torch.zeros(table.shape[1]))
        rows.append(features.fuse.weight @ torch.cat(parts) + features.fuse.bias)
    return torch.stack(rows)


def scores(features, state):
    """[items]: the state, projected to the item table's width, against each of its rows."""
    head = features.heads["item"]
    projected = head.weight @ state + head.bias
    return torch.stack([projected @ row for row in features.tables["item"].weight[2:]])


def autoregressive(encoder, history):
    x = event(encoder.features, history)
    x = x + encoder.positions.weight[: len(x)]
    for block in encoder.blocks:
        mixed = attention(norm(x, block.attention_norm), block.qkv, block.heads, lambda s: range(s + 1))
        x = x + mixed @ block.out.weight.T + block.out.bias
        x = x + block.down(gelu(block.up(norm(x, block.feed_forward_norm))))
    return scores(encoder.features, norm(x, encoder.norm)[-1])


def bert4rec(encoder, history):
    x = torch.cat([event(encoder.features, history), encoder.hidden_event[None]])
    x = x + encoder.positions.weight[: len(x)].flip(0)
    everything = range(len(x))
    for layer in encoder.transformer.layers:
        own = layer.self_attn
        mixed = attention(
            norm(x, layer.norm1), lambda y, a=own: y @ a.in_proj_weight.T + a.in_proj_bias, own.num_heads,
            lambda s: everything,
        )  # fmt: skip
        x = x + mixed @ own.out_proj.weight.T + own.out_proj.bias
        x = x + layer.linear2(gelu(layer.linear1(norm(x, layer.norm2))))
    return scores(encoder.features, norm(x, encoder.transformer.norm)[-1])


@torch.no_grad()
@pytest.mark.parametrize("reference", [autoregressive, bert4rec], ids=lambda f: f.__name__)
def test_item_scores_equal_the_references(make_encoder, stored, reference):
    encoder = make_encoder(reference.__name__, heads=4)
    for weight in encoder.parameters():  # biases and norms, too, have to be in their places
        weight.add_(torch.randn_like(weight), alpha=0.1)
    for table in encoder.features.tables.values():
        table.weight[0].zero_()
    users = [(7, 0, 9), (5, 0, 4), (3, 2, 3)]
    batch = stored.batch(users)
    found = encoder.next_item_scores(batch, torch.arange(3), batch.lengths)
    for row, user in zip(found, users, strict=True):
        expected = reference(encoder, stored.batch([user]))
        assert expected.std() > 0.1
        torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-4)
