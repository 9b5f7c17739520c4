import json

import numpy as np
import pytest

from userllm.data import text_store
from userllm.data.text_store import SentenceEncoderCard, TextStore
from userllm.errors import UserError

CARD = SentenceEncoderCard("letters", "a" * 64, 4)


class Letters:
    """Vectors that follow from the text; remembers what it was asked for, and can die on the way."""

    def __init__(self, calls=99):
        self.asked, self.calls = [], calls

    def __call__(self, texts):
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        self.asked += texts
        return np.array(
            [[len(t), t.count("a"), t.count("ä"), t.count("\n")] for t in texts], dtype=np.float32
        )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(text_store, "_BLOCK", 3)


TEXTS = ["banana", "a", "ä\nä", None, "a", "Heat (1995)", "", "aaaa", "x" * 50, "banana"]


def check(store, texts):
    rows = store.rows(texts)
    vectors = store.vectors
    assert vectors.dtype == np.float16
    for row, text in zip(rows, texts, strict=True):
        assert (row == -1) == (text is None)
        if text is not None:
            assert vectors[row].tolist() == Letters()([text])[0].tolist()


def test_each_distinct_text_is_encoded_once(tmp_path):
    letters, seen = Letters(), []
    store = TextStore.open(tmp_path / "s", CARD)
    assert store.add(TEXTS, letters, lambda done, of: seen.append((done, of))) == 7
    assert sorted(letters.asked) == sorted({t for t in TEXTS if t is not None})
    assert seen == [(3, 7), (6, 7), (7, 7)]
    check(store, TEXTS)
    assert isinstance(store.vectors, np.memmap)
    again = TextStore.open(tmp_path / "s", CARD)
    assert again.add([*TEXTS, "new"], letters) == 1 and letters.asked[-1] == "new"
    check(again, [*TEXTS, "new"])
    check(TextStore.read(tmp_path / "s"), ["new", "banana"])


def test_an_interrupted_encoding_goes_on(tmp_path):
    store = TextStore.open(tmp_path / "s", CARD)
    with pytest.raises(KeyboardInterrupt):
        store.add(TEXTS, Letters(calls=2))
    letters = Letters()
    store = TextStore.open(tmp_path / "s", CARD)
    assert len(store) == 6
    assert store.add(TEXTS, letters) == 1 == len(letters.asked)
    check(store, TEXTS)


@pytest.mark.parametrize(
    ("file", "lost"), [("texts.jsonl", 1), ("texts.jsonl", 9), ("vectors.f16", 1), ("vectors.f16", 20)]
)
def test_a_torn_file_costs_its_last_rows_only(tmp_path, file, lost):
    store = TextStore.open(tmp_path / "s", CARD)
    store.add(TEXTS, Letters())
    content = (tmp_path / "s" / file).read_bytes()
    (tmp_path / "s" / file).write_bytes(content[:-lost])
    store, letters = TextStore.open(tmp_path / "s", CARD), Letters()
    check(store, [t for t in TEXTS if t not in store.missing(TEXTS)])
    assert 1 <= store.add(TEXTS, letters) <= 3
    check(store, TEXTS)
    check(TextStore.read(tmp_path / "s"), TEXTS)


def test_another_encoders_store_is_refused_with_the_reason(tmp_path):
    TextStore.open(tmp_path / "s", CARD).add(["a"], Letters())
    other = SentenceEncoderCard("letters", "b" * 64, 4)
    with pytest.raises(
        UserError, match=r"made by letters \(sha256 aaaa.*not by letters \(sha256 bbbb.*remove the folder"
    ):
        TextStore.open(tmp_path / "s", other)
    with pytest.raises(UserError, match=r"width 4\), not by .*width 8"):
        TextStore.open(tmp_path / "s", SentenceEncoderCard("letters", "a" * 64, 8))
    assert len(TextStore.open(tmp_path / "s", CARD)) == 1


def test_what_is_no_store(tmp_path):
    with pytest.raises(UserError, match="not the card of a text store"):
        TextStore.read(tmp_path)
    store = TextStore.open(tmp_path / "s", CARD)
    assert len(store) == 0 and store.vectors.shape == (0, 4)
    with pytest.raises(UserError, match="no embedding of the text 'gone'"):
        store.rows(["gone"])
    card = json.loads((tmp_path / "s" / "card.json").read_text())
    (tmp_path / "s" / "card.json").write_text(json.dumps(card | {"format_version": 99}))
    with pytest.raises(UserError, match="format_version is 99"):
        TextStore.open(tmp_path / "s", CARD)


def test_a_copy_of_some_texts(tmp_path):
    store = TextStore.open(tmp_path / "s", CARD)
    store.add(TEXTS, Letters())
    copy = store.copy(tmp_path / "c", ["aaaa", None, "banana", "aaaa"])
    assert len(copy) == 2
    check(TextStore.read(tmp_path / "c"), ["aaaa", None, "banana"])
    with pytest.raises(UserError, match="no embedding"):
        store.copy(tmp_path / "d", ["gone"])
