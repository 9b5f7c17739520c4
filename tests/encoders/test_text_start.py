"""Item embeddings from texts' vectors: principal components, on the scale of a random table."""

import pytest
import torch
from sklearn.decomposition import PCA

from userllm.encoders.text_start import TextStart
from userllm.errors import UserError


@pytest.fixture
def vectors():
    """Correlated, far from the origin, on a scale of their own."""
    return 7 + 0.01 * torch.randn(30, 12) @ torch.randn(12, 12)


def test_it_is_pca_up_to_scale_and_sign(vectors):
    rows = TextStart.fit(vectors, 5).rows(vectors)
    reference = torch.from_numpy(PCA(5).fit_transform(vectors.double().numpy())).float()
    reference = reference * (rows.std() / reference.std())
    torch.testing.assert_close(rows.abs(), reference.abs(), rtol=1e-2, atol=1e-3)
    assert float(rows.std(correction=0)) == pytest.approx(5**-0.5, rel=1e-3)


def test_all_components_keep_distances(vectors):
    rows = TextStart.fit(vectors, 12).rows(vectors)
    ratio = torch.pdist(rows) / torch.pdist(vectors)
    torch.testing.assert_close(ratio, ratio[:1].expand(len(ratio)), rtol=1e-2, atol=0)


def test_a_table_wider_than_the_vectors_ends_in_zeros(vectors):
    rows = TextStart.fit(vectors, 16).rows(vectors)
    assert rows.shape == (30, 16)
    assert not rows[:, 12:].any()
    assert float(rows.std(correction=0)) == pytest.approx(16**-0.5, rel=1e-2)
    assert TextStart.fit(vectors[:4], 16).rows(vectors).shape == (30, 16)


def test_a_new_text_lands_where_an_equal_one_stands(vectors, tmp_path):
    start = TextStart.fit(vectors, 5)
    start.save(tmp_path / "start.safetensors")
    loaded = TextStart.load(tmp_path / "start.safetensors")
    torch.testing.assert_close(loaded.rows(vectors[7]), start.rows(vectors)[7])
    (tmp_path / "broken.safetensors").write_text("{")
    for name in ("broken", "absent"):
        with pytest.raises(UserError, match="not the start of item embeddings"):
            TextStart.load(tmp_path / f"{name}.safetensors")


def test_texts_that_cannot_be_told_apart(vectors):
    with pytest.raises(UserError, match="every title has the same vector"):
        TextStart.fit(vectors[:1].expand(9, 12), 5)


def test_only_the_item_table_is_touched(make_encoder):
    encoder, random = make_encoder(item_start="text"), make_encoder()
    rows = torch.randn(20, 16)
    encoder.features.start("item", rows)
    for name, weight in encoder.state_dict().items():
        if name == "features.tables.item.weight":
            assert torch.equal(weight[2:], rows)
            assert torch.equal(weight[:2], random.state_dict()[name][:2])
        else:
            assert torch.equal(weight, random.state_dict()[name])
