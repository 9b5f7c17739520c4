"""A trained model takes in new items: through their titles where it knows how, and changes nothing else."""

import warnings

import polars as pl
import pytest
import torch

from userllm.encoders.text_start import TextStart
from userllm.errors import UserError
from userllm.events import Event, UserHistory
from userllm.fusion.catalogue import CatalogueConfig
from userllm.growing import Growth, grow
from userllm.language_models.text_embeddings import text_embeddings
from userllm.model import UserLLM


@pytest.fixture
def grown_items(dataset) -> pl.DataFrame:
    new = pl.DataFrame(
        {"id": ["new1", "new2"], "title": [dataset.items["title"][3] + " again", "Something else"],
         "genres": [["nobody knows"], None], "year": [1999, None]}
    )  # fmt: skip
    items = pl.concat([dataset.items.drop("item"), new], how="diagonal_relaxed")
    return items.with_row_index("item").cast(dataset.items.schema)


def with_text_start(model: UserLLM) -> UserLLM:
    vectors = text_embeddings(model.lm, model.tokenizer, model.collator.items["title"].to_list())
    model.text_start = TextStart.fit(vectors, 16)
    return model


@pytest.mark.parametrize("fusion", [{}, {"catalogue": CatalogueConfig()}], ids=["plain", "catalogue"])
def test_new_items_enter_through_their_titles(make_user_llm, dataset, grown_items, fusion, tmp_path):
    model = with_text_start(make_user_llm(**fusion))
    old, old_length = model.encode(dataset.history(2)), dataset.num_items
    grown, growth = grow(model, grown_items)
    assert growth == Growth(2, 2)
    torch.testing.assert_close(grown.encode(dataset.history(2)), old)
    vectors = text_embeddings(grown.lm, grown.tokenizer, grown_items["title"].to_list()[old_length:])
    assert model.text_start is not None
    torch.testing.assert_close(
        grown.encoder.features.table("item")[old_length:], model.text_start.rows(vectors)
    )
    history = UserHistory([*dataset.history(2).events, Event("new1", 2000, {"rating": 3.0})])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is unknown
        known = grown.encode(history)
        answers = grown.recommend(history, old_length + 2, beams=60, exclude_seen=False)
    assert {"new1", "new2"} <= {answer.item for answer in answers}
    assert "new1" not in {answer.item for answer in grown.recommend(history, old_length + 2, beams=60)}
    other = UserHistory([*dataset.history(2).events, Event("new2", 2000, {"rating": 3.0})])
    assert not torch.allclose(known[-1], grown.encode(other)[-1])
    grown.save_pretrained(tmp_path / "grown")
    loaded = UserLLM.from_pretrained(tmp_path / "grown")
    torch.testing.assert_close(loaded.encode(history), known)
    again, more = grow(loaded, grown_items)
    assert again is loaded
    assert more == Growth(0, 0)


def test_without_a_text_start_they_stay_unknown(make_user_llm, dataset, grown_items):
    model = make_user_llm()
    same, growth = grow(model, grown_items)
    assert same is model
    assert str(growth) == "2 new items: 0 known through their titles, 2 read as unknown"
    with pytest.warns(UserWarning, match="read as unknown: new1"):
        model.encode(UserHistory([Event("new1")]))


def test_another_catalogue_is_refused(make_user_llm, grown_items):
    model = with_text_start(make_user_llm())
    for items in (grown_items.reverse(), grown_items.head(3), grown_items.drop("title")):
        with pytest.raises(UserError, match="does not begin with the model's"):
            grow(model, items)
