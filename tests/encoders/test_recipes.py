"""The settings of the autoregressive encoder: the defaults stay what they were, each other value does what it says."""

import math

import pytest
import torch
from torch.nn import functional as F

from userllm.data.collation import StoredHistories
from userllm.data.vocabulary import Vocabulary
from userllm.encoders import AutoregressiveConfig, FieldShape
from userllm.encoders.blocks import TIME_BUCKETS, Block, RelativeTimeBias, rotate, rotations, time_apart
from userllm.errors import UserError
from userllm.events import UNKNOWN_TIME, HistoryBatch
from userllm.model import encoder_for

RECIPES = {
    "rotary": {"positions": "rotary"},
    "relative_time": {"positions": "relative_time"},
    "swiglu": {"feed_forward_kind": "swiglu"},
    "post": {"norm": "post"},
    "all": {"positions": "relative_time", "feed_forward_kind": "swiglu", "norm": "post"},
}
every_recipe = pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)


@pytest.fixture(scope="module")
def timed(dataset):
    """Histories with every kind of gap."""
    return StoredHistories(
        dataset, Vocabulary.from_dataset(dataset, ("item", "rating", "genres", "time_gap"))
    )


@pytest.fixture
def recipe(timed):
    """A small encoder that reads time gaps too, its biases stirred so that they matter."""

    def make(**settings):
        torch.manual_seed(1)
        sizes = {"layers": 2, "width": 16, "heads": 2, "feed_forward": 32, "item_width": 16, "max_length": 12}
        encoder = encoder_for(timed.collator.vocabulary, AutoregressiveConfig(**(sizes | settings))).eval()
        for name, weight in encoder.named_parameters():
            if ".bias." in name:
                torch.nn.init.normal_(weight)
        return encoder

    return make


@pytest.fixture
def full(timed):
    """Two histories of 9 events, with gaps from nothing to a year."""
    batch = timed.batch([(7, 0, 9), (4, 0, 9)])
    assert batch.times is not None
    batch.times[:] += (torch.arange(9) ** 8)[None]
    batch.times[1, 3] = UNKNOWN_TIME
    return batch


def sliced(batch, length):
    fields = {name: ids[:, :length] for name, ids in batch.fields.items()}
    return HistoryBatch(fields, batch.mask[:, :length], batch.times[:, :length])


@every_recipe
def test_the_past_only_and_one_pass_equals_prefix_by_prefix(recipe, full, settings):
    """Another later event, at another time, changes no earlier output."""
    encoder = recipe(**settings)
    with torch.no_grad():
        whole = encoder(full)[0]
        for length in range(1, 10):
            last = encoder(sliced(full, length))[0][:, -1]
            torch.testing.assert_close(last, whole[:, length - 1], atol=1e-5, rtol=1e-5)
            ids = {name: ids.clone() for name, ids in full.fields.items()}
            times = full.times.clone()
            ids["item"][:, length - 1] = 2 + (ids["item"][:, length - 1] - 1) % 20
            ids["time_gap"][:, length - 1 :] = 20
            times[:, length - 1 :] += 10**7
            other = encoder(HistoryBatch(ids, full.mask, times))[0]
            assert torch.equal(other[:, : length - 1], whole[:, : length - 1])
            assert (other[:, length - 1 :] != whole[:, length - 1 :]).any(-1).all()


@every_recipe
def test_padding_and_company_do_not_matter(recipe, timed, settings):
    encoder = recipe(**settings)
    rows = [(7, 0, 9), (5, 0, 4), (3, 2, 3)]
    with torch.no_grad():
        together = encoder(timed.batch([*rows, (6, 0, 11), (8, 0, 0)]))[0]
        assert together.isfinite().all()
        for b, (user, start, stop) in enumerate(rows):
            alone = encoder(timed.batch([(user, start, stop)]))[0][0]
            torch.testing.assert_close(together[b, : stop - start], alone, atol=1e-5, rtol=1e-5)


@every_recipe
def test_every_weight_is_trained(recipe, timed, settings):
    encoder = recipe(**settings)
    encoder.next_event_losses(**timed.next_events([(7, 0, 9), (5, 0, 4)]))["loss"].backward()
    assert not [name for name, w in encoder.named_parameters() if w.grad is None or not w.grad.any()]


def test_only_relative_time_looks_at_times(recipe, full):
    later = HistoryBatch(full.fields, full.mask, full.times * 3)
    without = HistoryBatch(full.fields, full.mask)
    unknown = HistoryBatch(full.fields, full.mask, torch.full_like(full.times, UNKNOWN_TIME))
    with torch.no_grad():
        rotary, relative = recipe(positions="rotary"), recipe(positions="relative_time")
        assert torch.equal(rotary(full)[0], rotary(later)[0])
        assert torch.equal(rotary(full)[0], rotary(without)[0])
        assert not torch.equal(relative(full)[0], relative(later)[0])
        assert relative(unknown)[0].isfinite().all()
        shifted = full.times + 999 * (full.times != UNKNOWN_TIME)
        moved = HistoryBatch(full.fields, full.mask, shifted)
        torch.testing.assert_close(
            relative(moved)[0], relative(full)[0], msg="only differences of times count"
        )
    with pytest.raises(ValueError, match="the batch has no times"):
        relative(without)


def test_rotary_is_a_turn_in_the_complex_plane_and_relative():
    q, k = torch.randn(2, 1, 1, 7, 8)
    rotation = rotations(7, 8, q.device)
    turned = rotate(q, rotation)
    rates = torch.tensor([10000.0 ** (-2 * j / 8) for j in range(4)])
    for s in range(7):
        value = torch.complex(q[0, 0, s, :4], q[0, 0, s, 4:]) * torch.exp(1j * s * rates)
        torch.testing.assert_close(turned[0, 0, s], torch.cat([value.real, value.imag]))
    constant_q, constant_k = (rotate(x[:, :, :1].expand(1, 1, 7, 8), rotation)[0, 0] for x in (q, k))
    logits = constant_q @ constant_k.T
    for apart in range(7):
        line = logits.diagonal(apart)
        torch.testing.assert_close(line, line[:1].expand(len(line)))


def test_the_relative_time_bias_against_a_loop():
    bias = RelativeTimeBias(3, 6)
    torch.nn.init.normal_(bias.distance.weight)
    torch.nn.init.normal_(bias.time.weight)
    times = torch.tensor([[5, 5, 6, 9, 5 + 10**9], [UNKNOWN_TIME, 3, 8, 7, UNKNOWN_TIME]])
    found = bias(time_apart(times))
    assert found.shape == (2, 3, 5, 5)
    for b in range(2):
        for i in range(5):
            assert (found[b, :, i, i + 1 :] == -torch.inf).all()
            for j in range(i + 1):
                t, u = int(times[b, i]), int(times[b, j])
                bucket = (
                    TIME_BUCKETS if UNKNOWN_TIME in (t, u) else math.floor(2 * math.log2(max(t - u, 0) + 1))
                )
                assert bucket <= TIME_BUCKETS
                torch.testing.assert_close(
                    found[b, :, i, j], bias.distance.weight[i - j] + bias.time.weight[bucket]
                )


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_against_its_formula(kind, norm):
    block = Block(12, 3, 20, 0.0, kind, norm)
    x = torch.randn(2, 5, 12)

    def attend(x):
        q, k, v = block.qkv(x).reshape(2, 5, 3, 3, 4).unbind(2)
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / 2
        weights = logits.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
        return block.out(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(2, 5, 12))

    def feed(x):
        if kind == "gelu":
            return block.down(F.gelu(block.up(x)))
        gate, value = (
            x @ block.up.weight[:20].T + block.up.bias[:20],
            x @ block.up.weight[20:].T + block.up.bias[20:],
        )
        return block.down(gate * torch.sigmoid(gate) * value)

    if norm == "pre":
        y = x + attend(block.attention_norm(x))
        y = y + feed(block.feed_forward_norm(y))
    else:
        y = block.attention_norm(x + attend(x))
        y = block.feed_forward_norm(y + feed(y))
    torch.testing.assert_close(block(x), y, atol=1e-5, rtol=1e-5)


def test_settings_that_do_not_go_together(make_encoder):
    with pytest.raises(UserError, match=r"rotary needs an even width per head, not 3"):
        make_encoder(positions="rotary", width=6, heads=2)
    with pytest.raises(UserError, match=r"count_from: end is for learned positions, not rotary"):
        make_encoder(positions="rotary", count_from="end")


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
        output, _ = encoder.eval()(made_batch(0))
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
            alone = encoder(stored.batch([(user, start, stop)]))[0][0]
            torch.testing.assert_close(encoder(batch)[0][b, :n], alone, atol=1e-5, rtol=1e-5)
            forwards.positions.weight[:n] = encoder.positions.weight[:n].flip(0)
            torch.testing.assert_close(forwards(stored.batch([(user, start, stop)]))[0][0], alone)
        prefix = encoder(stored.batch([(7, 0, 5)]))[0][0, -1]
        assert not torch.allclose(prefix, encoder(batch)[0][0, 4], atol=1e-3), (
            "a prefix is not yet at its end"
        )


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


def test_the_item_table_starts_as_small_as_asked(make_encoder):
    before, asked = make_encoder().features, make_encoder(item_std=1e-3).features
    assert 0.5e-3 < float(asked.table("item").std()) < 2e-3 < float(before.table("item").std())
    assert torch.equal(before.table("rating"), asked.table("rating"))
    with pytest.raises(UserError, match=r"item_std is 0"):
        make_encoder(item_std=0.0)
