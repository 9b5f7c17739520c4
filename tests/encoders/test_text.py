import copy

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from userllm import bfloat16
from userllm.data.collation import HistoryCollator
from userllm.data.text_store import SentenceEncoderCard, TextStore
from userllm.data.vocabulary import Vocabulary
from userllm.encoders import FieldShape, TextConfig
from userllm.errors import UserError
from userllm.events import Event, UserHistory
from userllm.model import encoder_for

SIZES = {
    "layers": 2,
    "width": 16,
    "heads": 2,
    "feed_forward": 32,
    "max_length": 12,
    "dropout": 0.0,
    "sentence_width": 6,
}


def encode(texts):
    """Random directions that follow from the text."""
    rng = [np.random.default_rng([ord(c) for c in text]) for text in texts]
    return np.stack([one.standard_normal(6) for one in rng]).astype(np.float32)


@pytest.fixture
def described(catalogue):
    """The catalogue with descriptions of every third item."""
    texts = [f"A film about {title}" if n % 3 == 0 else None for n, title in enumerate(catalogue["title"])]
    return catalogue.with_columns(pl.Series("description", texts))


@pytest.fixture
def make(described, vocabulary, tmp_path):
    """A text encoder over the described catalogue."""

    def build(items=described, vocabulary=vocabulary, **settings):
        config = TextConfig(**(SIZES | settings))
        torch.manual_seed(1)
        encoder = encoder_for(vocabulary, config).eval()
        store = TextStore.open(tmp_path / "store", SentenceEncoderCard("made", "0" * 64, 6))
        texts = config.texts(items, vocabulary)
        store.add([text for column in texts.values() for text in column], encode)
        encoder.use(store, texts)
        return encoder

    return build


def test_the_texts_of_an_event(described, vocabulary):
    texts = TextConfig().texts(described, vocabulary)
    assert texts["title"][:2] == texts["rating"][:2] == texts["description"][:2] == [None, None]
    genres = ", ".join(described["genres"][0])
    assert texts["title"][2] == f"The movie Toy Story (1995) is listed with genres {genres}"
    assert texts["title"][2 + 17] == "The movie M (1931) is listed with genres none"
    assert texts["rating"][2:] == vocabulary["rating"].values
    assert texts["description"][2:4] == ["A film about Toy Story (1995)", None]
    year = TextConfig(title="{title}, {year}", parts=["title"]).texts(described, vocabulary)
    assert year == {"title": [None, None, *(f"{t}, {1970 + n}" for n, t in enumerate(described["title"]))]}


@torch.no_grad()
def test_against_a_reference(make, described, vocabulary, histories):
    """Concatenate the three sentence embeddings by hand, then torch's own layers, history by history."""
    encoder = make()
    embeddings, mask = encoder(histories)
    assert torch.equal(mask, histories.mask)
    texts = encoder.config.texts(described, vocabulary)
    centre, spread = {}, {}
    for part, column in texts.items():
        known = torch.from_numpy(encode([text for text in column if text is not None])).half().float()
        centre[part] = known.mean(0)
        spread[part] = (known - centre[part]).pow(2).mean().sqrt()
    for b in range(3):
        rows = []
        for s in range(int(histories.lengths[b])):
            parts = []
            for part, field in (("title", "item"), ("rating", "rating"), ("description", "item")):
                text = texts[part][int(histories.fields[field][b, s])]
                stored = torch.from_numpy(encode([text or ""])[0]).half().float()
                stored = (stored - centre[part]) / spread[part]
                parts.append(encoder.missing[part] if text is None else stored)
            rows.append(encoder.fuse(torch.cat(parts)) + encoder.positions.weight[s])
        if not rows:
            continue
        x = torch.stack(rows)[None]
        future = nn.Transformer.generate_square_subsequent_mask(len(rows))
        for layer in encoder.transformer.layers:
            x = layer(x, src_mask=future, is_causal=True)
        torch.testing.assert_close(
            embeddings[b, : len(rows)], encoder.transformer.norm(x)[0], atol=1e-5, rtol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_company_and_padding_do_not_matter(make, stored, histories, causal):
    encoder = make(causal=causal)
    together, mask = encoder(histories)
    assert torch.isfinite(together).all() and not mask[2].any()
    for b, row in enumerate([(7, 0, 9), (5, 0, 4)]):
        alone, _ = encoder(stored.batch([row]))
        torch.testing.assert_close(together[b, : row[2]], alone[0])
    prefix, _ = encoder(stored.batch([(7, 0, 5)]))
    assert torch.allclose(together[0, :5], prefix[0], atol=1e-5) == causal


@torch.no_grad()
def test_a_missing_description_is_a_learned_vector(make, stored):
    encoder, batch = make(), stored.batch([(7, 0, 9)])
    before, _ = encoder(batch)
    described = batch.fields["item"][0] % 3 == 2  # ids start at 2, every third item has one
    assert 0 < described.sum() < 9
    encoder.missing["description"].data += 1
    after, _ = encoder(batch)
    first = int((~described).int().argmax())
    assert torch.equal(before[0, :first], after[0, :first])
    assert not torch.allclose(before[0, first], after[0, first])
    assert encoder.missing["description"].requires_grad


@torch.no_grad()
def test_parts_can_be_left_out(make, described, vocabulary, histories):
    for parts in (["title"], ["rating"], ["description", "title"]):
        encoder = make(parts=parts)
        assert encoder.fuse.in_features == 6 * len(parts)
        changed = copy.copy(histories)
        changed.fields = histories.fields | {"rating": histories.fields["rating"].clamp_max(2)}
        same = torch.allclose(encoder(histories)[0][histories.mask], encoder(changed)[0][histories.mask])
        assert same == ("rating" not in parts)


@torch.no_grad()
def test_an_unseen_catalogue_is_a_new_table(make, catalogue, vocabulary, stored):
    """The same weights, another catalogue with other ids: an event with the same texts has the same embedding."""
    encoder = make(catalogue, vocabulary, parts=["title", "rating"])
    history = UserHistory([Event("m3", 1, {"rating": 4.0}), Event("m8", 2, {"rating": 1.0})])
    before, _ = encoder(HistoryCollator(catalogue, vocabulary).from_histories([history])[0])
    other = pl.DataFrame(
        {
            "id": ["x", "y", "z"],
            "title": [catalogue["title"][8], "A new film", catalogue["title"][3]],
            "genres": [catalogue["genres"][8].to_list(), ["Comedy"], catalogue["genres"][3].to_list()],
        }
    )
    fields = [f for f in vocabulary if f.name != "genres"]
    item = type(fields[0])("item", "single", other["id"].to_list())
    new = Vocabulary([item, *fields[1:]])
    there = make(other, new, parts=["title", "rating"])
    there.load_state_dict(encoder.state_dict())
    moved = UserHistory([Event("z", 1, {"rating": 4.0}), Event("x", 2, {"rating": 1.0})])
    after, _ = there(HistoryCollator(other, new).from_histories([moved])[0])
    torch.testing.assert_close(before, after)
    assert torch.equal(there.centre_title, encoder.centre_title)
    there.use(there.store, there.texts)  # a catalogue read later moves nothing
    assert torch.equal(there.centre_title, encoder.centre_title)


@torch.no_grad()
def test_what_all_texts_have_in_common_is_taken_away(make, described, vocabulary):
    """Sentence embeddings around one far point: the encoder sees how they differ."""
    encoder = make(parts=["title"])
    ids = torch.arange(2, 2 + len(described))
    vectors = encoder._sentences("title", ids)
    torch.testing.assert_close(vectors.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors.square().mean(), torch.ones(()), atol=1e-4, rtol=0)


def test_the_table_is_no_weight(make):
    encoder = make()
    assert not any("vectors" in name or "rows" in name for name in encoder.state_dict())
    assert encoder.vectors.dtype == torch.float16


def test_it_learns_the_next_item_and_ranks_by_inner_products(make, stored):
    encoder = make()
    inputs = stored.batch([(7, 0, 8), (5, 0, 4)])
    targets = stored.batch([(7, 1, 9), (5, 1, 5)])
    losses = encoder.next_event_losses(inputs, targets)
    scores = encoder.item_scores(encoder(inputs)[0])
    expected = nn.functional.cross_entropy(scores[targets.mask], targets.fields["item"][targets.mask] - 2)
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].backward()
    assert encoder.head.weight.grad.abs().sum() > 0 and encoder.fuse.weight.grad.abs().sum() > 0
    rows, ends = torch.tensor([0, 1]), torch.tensor([5, 4])
    torch.testing.assert_close(
        encoder.next_item_scores(inputs, rows, ends), torch.stack([scores[0, 4], scores[1, 3]])
    )
    both = make(causal=False)
    with pytest.raises(UserError, match="pretrained only if it is causal"):
        both.next_event_losses(inputs, targets)
    assert both.next_item_scores(inputs, rows, ends).shape == scores[:, 0].shape


def test_one_clear_error(make, catalogue, vocabulary, tmp_path):
    with pytest.raises(
        UserError, match=r"encoder\.description: the catalogue has no \{description\} \(data\.descriptions"
    ):
        make(catalogue)
    with pytest.raises(
        UserError, match=r"encoder\.rating 'rated': name one field of the events .*\(rating\)"
    ):
        TextConfig(rating="rated").texts(catalogue, vocabulary)
    with pytest.raises(UserError, match=r"field 'rating' is not one of data.fields"):
        TextConfig().build([FieldShape("item", False, 9)])
    with pytest.raises(UserError, match=r"encoder.parts is"):
        TextConfig(parts=["title", "title"]).build([FieldShape("item", False, 9)])
    with pytest.raises(UserError, match=r"not a multiple of encoder.heads"):
        make(heads=3)
    encoder = make()
    store = TextStore.open(tmp_path / "wide", SentenceEncoderCard("wide", "0" * 64, 9))
    with pytest.raises(UserError, match=r"wide makes vectors of width 9; set encoder.sentence_width"):
        encoder.use(store, encoder.texts)
    with pytest.raises(RuntimeError, match="call use"):
        encoder_for(vocabulary, TextConfig(**SIZES))(
            HistoryCollator(catalogue, vocabulary).from_histories([])[0]
        )


@pytest.mark.parametrize("able", [True, False])
def test_products_in_bfloat16_change_little_and_nothing_without_its_instructions(
    make, histories, monkeypatch, able
):
    monkeypatch.setattr(bfloat16, "_cpu_multiplies", lambda: able)
    plain = make()
    rounded = make(products="bfloat16")
    rounded.load_state_dict(plain.state_dict())
    exact, close = plain(histories)[0], rounded(histories)[0]
    assert close.dtype == exact.dtype
    off = (close - exact)[histories.mask].abs()
    assert (float(off.detach().max()) > 0) == able
    assert float(off.detach().max()) < 0.2 * float(exact[histories.mask].abs().max())
