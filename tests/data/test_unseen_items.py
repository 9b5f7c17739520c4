"""Items kept from training: who is asked has events of these alone, who trains has none of them."""

from dataclasses import replace

import numpy as np
import pytest

from userllm.data import SplitConfig
from userllm.data.unseen_items import SUFFIX, apart, unseen, unseen_items
from userllm.errors import UserError


def test_a_share_of_the_items_by_a_hash_of_their_ids():
    ids = [f"m{n}" for n in range(4000)]
    fifth = {item for item in ids if unseen(item, 0.2)}
    assert len(fifth) == pytest.approx(800, abs=80)
    assert fifth < {item for item in ids if unseen(item, 0.4)}  # a larger share keeps what the smaller had


def test_events_come_apart_and_none_is_lost(dataset, tmp_path, monkeypatch):
    moved = apart(dataset, 0.4, tmp_path / "apart")
    secret = {item for item, kept in zip(dataset.item_ids, unseen_items(dataset, 0.4), strict=True) if kept}
    assert 0 < len(secret) < len(dataset.item_ids)
    for number, user in enumerate(dataset.user_ids):
        whole = dataset.history(number).events
        for name, part in (
            (user, [e for e in whole if e.item not in secret]),
            (user + SUFFIX, [e for e in whole if e.item in secret]),
        ):
            assert (moved.history(moved.user_index(name)).events if part else []) == part
    assert moved.num_events == dataset.num_events
    assert moved.items.equals(dataset.items)
    written = (moved.folder / "card.json").stat().st_mtime_ns
    again = apart(dataset, 0.4, tmp_path / "apart")
    assert (again.folder / "card.json").stat().st_mtime_ns == written
    # prepared anew, from items in another order
    monkeypatch.setattr(dataset, "card", replace(dataset.card, catalogue="0" * 64))
    anew = apart(dataset, 0.4, tmp_path / "apart")
    assert (anew.folder / "card.json").stat().st_mtime_ns > written
    other = apart(dataset, 0.2, tmp_path / "apart")
    assert other.card.fingerprint != again.card.fingerprint


def test_who_trains_and_who_is_asked(dataset, tmp_path):
    moved = apart(dataset, 0.4, tmp_path / "apart")
    split = SplitConfig("unseen_items", min_events=3, unseen=0.4).build(moved)
    asked = np.array([moved.user_ids[user].endswith(SUFFIX) for user in split.users])
    assert asked.any() and not asked.all()
    assert (split.train_end[asked] == 0).all() and (split.validation[asked] == -1).all()
    assert (split.test[~asked] == -1).all() and (split.train_end[~asked] == split.validation[~asked]).all()
    rows = split.examples("test")
    assert rows[:, 0].tolist() == split.users[asked].tolist()
    assert (rows[:, 2] == moved.lengths[rows[:, 0]] - 1).all()
    met = {
        item
        for user in split.users[~asked]
        for item in moved.events["item"][slice(*moved.offsets[user : user + 2])]
    }
    shown = {
        item
        for user, start, stop in rows + moved.offsets[rows[:, 0]][:, None] * [0, 1, 1]
        for item in moved.events["item"][start:stop]
    }
    assert shown and not met & shown
    assert "0.4 of the items unseen" in split.describe()
    assert split.fingerprint != SplitConfig("leave_last_out", min_events=3).build(moved).fingerprint


def test_one_clear_error(dataset, tmp_path):
    with pytest.raises(UserError, match="a share between 0 and 1"):
        SplitConfig("unseen_items", unseen=1.0).build(dataset)
    moved = apart(dataset, 0.4, tmp_path / "apart")
    with pytest.raises(UserError, match="no user has 300 events"):
        SplitConfig("unseen_items", min_events=300).build(moved)
