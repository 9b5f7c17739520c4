import gzip

import polars as pl
import pytest

from userllm.data.sources.descriptions import NOT_IN_1M, read_descriptions, with_descriptions
from userllm.data.sources.movielens import prepare_movielens
from userllm.errors import UserError

TABLE = 'movieId,overview\n1,"Toys, alive."\n3,"  Two\nneighbours.  "\n7,\n'


@pytest.fixture
def items():
    return pl.DataFrame(
        {"id": ["1", "2", "3"], "title": ["Toy Story (1995)", "Jumanji (1995)", "Heat (1995)"]}
    )


def test_descriptions_join_by_number(items, tmp_path):
    (tmp_path / "d.csv").write_text(TABLE)
    assert with_descriptions(items, tmp_path / "d.csv")["description"].to_list() == [
        "Toys, alive.",
        None,
        "Two neighbours.",
    ]
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(TABLE.encode()))
    assert read_descriptions(tmp_path / "d.csv.gz") == {"1": "Toys, alive.", "3": "Two neighbours."}


def test_recboles_copy_of_1m_has_lost_its_numbers(tmp_path):
    titles = [f"Movie {n}" for n in range(3952 - len(NOT_IN_1M))]
    items = pl.DataFrame({"id": titles, "title": titles})
    (tmp_path / "d.csv").write_text("movieId,overview\n90,a\n91,never\n92,b\n3952,last\n")
    found = with_descriptions(items, tmp_path / "d.csv")["description"]
    assert (found[89], found[90], found[-1]) == ("a", "b", "last")
    assert found.null_count() == len(titles) - 3
    with pytest.raises(UserError, match="go by 'Movie 0', not by MovieLens's numbers"):
        with_descriptions(items[:7], tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,text\n1,a\n", r"line 1: the columns are id, text; movieId and overview are needed"),
        ("movieId,overview\n1\n", r"line 2: 1 fields, expected 2"),
        ("movieId,overview\none,a\n", r"line 2: movieId is 'one'"),
        ("movieId,overview\n9,a\n", r"none of its movies is in the catalogue"),
        ('movieId,overview\n1,"a\n', r"not a readable CSV file"),
    ],
)
def test_one_clear_error(items, tmp_path, text, message):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        with_descriptions(items, tmp_path / "d.csv")
    with pytest.raises(UserError, match="no such file"):
        with_descriptions(items, tmp_path / "e.csv")


@pytest.mark.parametrize("kind", ["100k", "recbole-100k"])
def test_100k_has_numbers_of_its_own(release, tmp_path, kind):
    (tmp_path / "d.csv").write_text(TABLE)
    with pytest.raises(UserError, match=r"d\.csv: MovieLens-100K has numbers of its own"):
        prepare_movielens(release(kind), tmp_path / "out", descriptions=tmp_path / "d.csv")


def test_a_dataset_with_descriptions_has_the_events_of_one_without(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "movies.dat").write_text("1::Toy Story (1995)::Comedy\n2::Jumanji (1995)::Drama\n")
    (raw / "ratings.dat").write_text("1::1::5::10\n1::2::4::20\n")
    (tmp_path / "d.csv").write_text(TABLE)
    plain = prepare_movielens(raw, tmp_path / "plain")
    described = prepare_movielens(raw, tmp_path / "described", descriptions=tmp_path / "d.csv")
    assert described.items["description"].to_list() == ["Toys, alive.", None]
    assert [f.name for f in described.card.fields][:-1] == [f.name for f in plain.card.fields]
    assert described.card.fields[-1].name == "description" and described.card.fields[-1].kind == "text"
    assert described.card.fingerprint == plain.card.fingerprint
