import numpy as np
import pytest

from userllm.data import Vocabulary
from userllm.data.vocabulary import value_text
from userllm.errors import UserError


def test_item_row_i_has_id_i_plus_2(made):
    dataset = made([5, 9])
    vocabulary = Vocabulary.from_dataset(dataset)
    assert [field.name for field in vocabulary] == ["item", "rating", "genres"]
    assert vocabulary["item"].values == dataset.item_ids
    assert vocabulary["item"].ids_of(dataset.item_ids).tolist() == list(range(2, dataset.num_items + 2))
    assert vocabulary["item"].size == dataset.num_items + 2
    assert vocabulary["item"].id_of("no such item") == 1
    assert vocabulary["item"].value_of(2) == "i0"
    with pytest.raises(IndexError):
        vocabulary["item"].value_of(1)


def test_ratings_are_texts_in_numeric_order(made):
    ratings = Vocabulary.from_dataset(made([200]))["rating"]
    assert ratings.values == ["0.5", "1", "1.5", "2", "2.5", "3", "3.5", "4", "4.5", "5"]
    assert ratings.id_of(4.0) == ratings.id_of("4") == 9
    assert ratings.id_of(4.25) == 1


def test_numbers_are_spelt_so_that_they_can_be_told_apart():
    large = [1234560.0, 1234567.0, 12345.67, 0.5, 4.0, 4.1, 1e-5]
    texts = [value_text(number) for number in large]
    assert texts == ["1234560", "1234567", "12345.67", "0.5", "4", "4.1", "0.00001"]
    assert value_text(float(np.float32(4.1))) == "4.1"  # as a dataset holds it


def test_genres_and_years(made):
    dataset = made([5])
    vocabulary = Vocabulary.from_dataset(dataset, ("item", "genres", "year"))
    assert vocabulary["genres"].values == sorted({genre for row in dataset.items["genres"] for genre in row})
    assert vocabulary["genres"].kind == "multi"
    assert vocabulary["genres"].level == "item"
    assert vocabulary["year"].values[0] == "1971"


def test_round_trip(made, tmp_path):
    vocabulary = Vocabulary.from_dataset(made([5, 9]))
    vocabulary.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary
    assert not list(tmp_path.glob(".vocabulary*"))


def test_bad_fields_and_files(made, tmp_path):
    dataset = made([5, 9])
    with pytest.raises(
        UserError, match="no field 'price'; declared fields are item, rating, genres, year, title"
    ):
        Vocabulary.from_dataset(dataset, ("item", "price"))
    with pytest.raises(UserError, match="field 'title' is text"):
        Vocabulary.from_dataset(dataset, ("item", "title"))
    (tmp_path / "v.json").write_text('{"fields": [')
    with pytest.raises(UserError, match=r"v\.json: not a vocabulary"):
        Vocabulary.load(tmp_path / "v.json")
