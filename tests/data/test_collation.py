import numpy as np
import polars as pl
import pytest
import torch

from userllm.data import (
    HistoryCollator,
    SplitConfig,
    StoredHistories,
    TrainingSequences,
    Vocabulary,
    encode_histories,
    encode_user_history,
)
from userllm.data.vocabulary import FieldVocabulary
from userllm.errors import UserError
from userllm.events import Event, UserHistory

FIELDS = ("item", "rating", "genres", "year")


@pytest.fixture
def dataset(made):
    return made([5, 9, 1])


def test_stored_and_unseen_users_are_encoded_alike(dataset):
    vocabulary = Vocabulary.from_dataset(dataset, FIELDS)
    rows = [(1, 2, 8), (0, 0, 5), (2, 0, 1), (1, 4, 4)]
    stored = encode_histories(dataset, vocabulary, rows)
    histories = [dataset.history(user, start, stop) for user, start, stop in rows]
    unseen, unknown = encode_user_history(histories, vocabulary, dataset.items)
    assert not unknown
    assert stored.mask.tolist() == [[True] * n + [False] * (6 - n) for n in (6, 5, 1, 0)]
    assert torch.equal(stored.mask, unseen.mask)
    assert list(stored.fields) == list(FIELDS)
    for name, ids in stored.fields.items():
        assert ids.dtype == torch.int64
        assert torch.equal(ids, unseen.fields[name])
        assert (ids[~stored.mask] == 0).all()


def test_ids_name_the_right_values(dataset):
    vocabulary = Vocabulary.from_dataset(dataset, FIELDS)
    batch = encode_histories(dataset, vocabulary, [(1, 0, 9)])
    for s in range(9):
        row = int(dataset.events["item"][dataset.offsets[1] + s])
        item = dataset.items.row(row, named=True)
        assert batch.fields["item"][0, s] == row + 2
        genres = [vocabulary["genres"].value_of(i) for i in batch.fields["genres"][0, s].tolist() if i]
        assert genres == item["genres"]
        year = int(batch.fields["year"][0, s])
        assert year == 1 if item["year"] is None else vocabulary["year"].value_of(year) == str(item["year"])
        rating = vocabulary["rating"].value_of(int(batch.fields["rating"][0, s]))
        assert float(rating) == dataset.events["rating"][dataset.offsets[1] + s]


def test_the_collator_comes_back_from_a_saved_item_table(dataset, tmp_path):
    vocabulary = Vocabulary.from_dataset(dataset)
    vocabulary.save(tmp_path / "vocabulary.json")
    dataset.items.write_parquet(tmp_path / "items.parquet")
    saved = HistoryCollator(
        pl.read_parquet(tmp_path / "items.parquet"), Vocabulary.load(tmp_path / "vocabulary.json")
    )
    batch, _ = saved.from_histories([dataset.history(1)])
    wanted = encode_histories(dataset, vocabulary, [(1, 0, 9)])
    assert all(torch.equal(batch.fields[name], wanted.fields[name]) for name in wanted.fields)


def test_unknown_items_keep_their_place_and_are_named(dataset):
    vocabulary = Vocabulary.from_dataset(dataset, FIELDS)
    history = UserHistory(
        [
            Event("i5", fields={"rating": 4}),
            Event("nonsense"),
            Event("Film 7 (1977)", fields={"rating": "0.5"}),
            Event("nonsense", fields={"rating": 99.0}),
        ]
    )
    batch, unknown = encode_user_history([history, UserHistory([])], vocabulary, dataset.items)
    assert str(unknown) == (
        "items that the model has never seen are read as unknown: nonsense; "
        "values that the model has never seen are read as unknown: rating 99"
    )
    assert batch.fields["item"].tolist() == [[7, 1, 9, 1], [0, 0, 0, 0]]
    assert batch.fields["rating"][0].tolist() == [
        vocabulary["rating"].id_of(4),
        1,
        vocabulary["rating"].id_of(0.5),
        1,
    ]
    assert (batch.fields["genres"][0, 1] == 0).all()
    assert batch.fields["year"][0, 1] == 1
    assert batch.lengths.tolist() == [4, 0]


def test_a_misspelt_field_is_named_and_one_of_somebody_elses_is_not(dataset):
    vocabulary = Vocabulary.from_dataset(dataset, FIELDS)
    events = [
        Event("i5", fields={"ratng": 4, "review": "dull"}),
        Event("i6", fields={"Rating": 4}),
        Event("i7", fields={"rating": 4, "ratings": 4}),
    ]
    batch, unread = encode_user_history([UserHistory(events)], vocabulary, dataset.items)
    assert (
        str(unread) == "fields that the model does not have are not read: ratng (rating?), Rating (rating?)"
    )
    assert batch.fields["rating"][0, :2].tolist() == [1, 1] and batch.fields["rating"][0, 2] > 1


def test_a_title_of_several_items_is_named_with_their_ids(catalogue):
    """One of them is meant where it is called as answers call it."""
    ids = FieldVocabulary("item", "single", catalogue["id"].to_list())
    collator = HistoryCollator(catalogue, Vocabulary([ids]))
    first, second = collator.items["id"].to_list()[5:7]
    batch, unread = collator.from_histories(
        [UserHistory([Event("The Mask (1994)"), Event("The Mask (1994) [2]")])]
    )
    assert batch.fields["item"].tolist() == [[1, 8]]
    assert (unread.items, unread.titles) == ([], {"The Mask (1994)": [first, second]})
    assert str(unread) == (
        f"titles that several items have are read as unknown, give an id: The Mask (1994) ({first}, {second})"
    )


def test_a_value_of_none_is_one_that_is_not_known(dataset):
    vocabulary = Vocabulary.from_dataset(dataset, FIELDS)
    events = [Event("i5", fields={"rating": None}), Event("i5")]
    batch, unread = encode_user_history([UserHistory(events)], vocabulary, dataset.items)
    assert batch.fields["rating"].tolist() == [[1, 1]]
    assert not unread


@pytest.mark.parametrize(
    ("fields", "said"),
    [(None, "fields is None"), ({"rating": [1]}, r"rating is \[1\]; give a number, a text or None")],
)
def test_fields_that_are_none(fields, said):
    with pytest.raises(UserError, match=said):
        Event("i5", fields=fields)


def test_a_number_beyond_floats_is_unknown(dataset):
    vocabulary = Vocabulary.from_dataset(dataset, FIELDS)
    events = [Event("i5", fields={"rating": 10**400})]
    batch, unread = encode_user_history([UserHistory(events)], vocabulary, dataset.items)
    assert batch.fields["rating"].tolist() == [[1]] and unread.values == ["rating inf"]


@pytest.mark.parametrize("time", [2**70, 1.5, "1999", True])
def test_a_time_that_is_none(time):
    with pytest.raises(UserError, match="give whole seconds since 1970"):
        Event("i5", time)


def test_an_item_added_after_training_keeps_its_genres(dataset):
    vocabulary = Vocabulary.from_dataset(dataset)
    new = pl.DataFrame(
        {"item": [30], "id": ["new"], "title": ["New (2000)"], "genres": [["g1"]], "year": [2000]}
    )
    grown = pl.concat([dataset.items, new.cast(dict(dataset.items.schema))])
    batch, unknown = encode_user_history([UserHistory([Event("new")])], vocabulary, grown)
    assert unknown.items == ["new"]
    assert batch.fields["item"].tolist() == [[1]]
    assert vocabulary["genres"].value_of(int(batch.fields["genres"][0, 0, 0])) == "g1"


def test_long_and_empty_histories(dataset):
    collator = HistoryCollator(dataset.items, Vocabulary.from_dataset(dataset))
    batch, _ = collator.from_histories([dataset.history(1)], max_length=4)
    latest = encode_histories(dataset, collator.vocabulary, [(1, 5, 9)])
    assert torch.equal(batch.fields["item"], latest.fields["item"])
    empty, _ = collator.from_histories([UserHistory([])])
    assert empty.mask.tolist() == [[False]]
    assert empty.fields["genres"].shape[:2] == (1, 1)


def test_a_title_that_two_items_have_names_neither(dataset):
    items = dataset.items.with_columns(pl.lit("Twin").alias("title"))
    collator = HistoryCollator(items, Vocabulary.from_dataset(dataset))
    assert collator.row_of("Twin") == collator.num_items
    assert collator.row_of("i3") == 3


def test_inputs_and_targets_are_one_event_apart(dataset):
    stored = StoredHistories(dataset, Vocabulary.from_dataset(dataset))
    sequences = TrainingSequences(SplitConfig(min_events=3).build(dataset), max_length=4)
    rows = [sequences[i] for i in range(len(sequences))]
    chunk = stored.next_events(rows)
    whole = stored.batch(rows)
    inputs, targets = chunk["inputs"], chunk["targets"]
    assert torch.equal(inputs.mask, targets.mask)
    assert torch.equal(targets.mask, whole.mask[:, 1:])
    for name, ids in whole.fields.items():
        assert torch.equal(targets.fields[name], ids[:, 1:])
        kept = inputs.mask
        assert torch.equal(inputs.fields[name][kept], ids[:, :-1][kept])
        assert (inputs.fields[name][~kept] == 0).all()


def test_the_target_of_an_example_is_the_event_that_follows(dataset):
    stored = StoredHistories(dataset, Vocabulary.from_dataset(dataset))
    split = SplitConfig().build(dataset)
    targets = stored.targets(split.examples("test"))
    last = dataset.offsets[split.users + 1] - 1
    assert np.array_equal(targets.fields["item"][:, 0].numpy(), dataset.events["item"][last] + 2)
