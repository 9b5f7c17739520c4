import pytest

from userllm.data.inspect import describe, describe_lengths
from userllm.errors import UserError


def test_card_history_and_histogram(made):
    dataset = made([1, 3, 3, 40])
    text = describe(dataset, 3)
    assert "4 users, 30 items" in text
    assert dataset.card.fingerprint in text
    assert "genres (multi, per item)" in text
    assert "user 3 (id u3): 40 events, the latest 15" in text
    assert text.count("1970-01-12  rating") == 15
    assert "user 2 (id u2): 3 events" in describe(dataset)
    with pytest.raises(UserError, match="no user number 4"):
        describe(dataset, 4)


def test_the_histogram_counts_every_user(made):
    lines = describe_lengths(made([1, 2, 3, 3, 64])).splitlines()
    assert lines[0] == "history lengths: shortest 1, median 3, longest 64"
    counts = {line.split("  ")[-2 if "#" in line else -1].strip() for line in lines[1:]}
    assert counts == {"0", "1", "3"}
    assert lines[1].split()[:3] == ["1", "to", "1"]
    assert lines[-1].split()[:3] == ["64", "to", "127"]
