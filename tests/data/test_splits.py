import numpy as np
import pytest

from userllm.data import SplitConfig
from userllm.errors import UserError


def test_leave_last_out(made):
    split = SplitConfig(min_events=5).build(made([4, 5, 12]))
    assert split.users.tolist() == [1, 2]
    assert split.train_end.tolist() == [3, 10]
    assert split.validation.tolist() == [3, 10]
    assert split.test.tolist() == [4, 11]
    assert split.examples("test").tolist() == [[1, 0, 4], [2, 0, 11]]
    assert split.examples("test", max_length=6).tolist() == [[1, 0, 4], [2, 5, 11]]
    assert split.examples("validation", max_length=6).tolist() == [[1, 0, 3], [2, 4, 10]]
    assert split.num_training_targets == 2 + 9
    assert split.describe().startswith(
        "leave_last_out (min_events 5): 2 of 3 users; 11 training targets, 2 validation, 2 test"
    )


def test_paper(made):
    lengths = [50, 51, 52, *[70] * 200]
    split = SplitConfig("paper", window=50).build(made(lengths))
    n = np.array(lengths)[split.users]
    assert split.users.tolist() == list(range(1, 203))
    assert split.test.tolist() == (n - 1).tolist()
    chosen = split.validation >= 0
    assert 8 < chosen.sum() < 35
    assert (split.validation[chosen] == n[chosen] - 2).all()
    assert (split.train_end == np.where(chosen, n - 2, n - 1)).all()
    assert split.num_training_targets == (n - 50 - 1).sum() - chosen.sum()
    rows = split.examples("test")
    assert (rows[:, 2] - rows[:, 1] == 50).all()
    assert (split.examples("validation")[:, 1] >= 0).all()


def test_the_fingerprint_follows_data_kind_and_parameters(made):
    first, second = made([4, 60, 70]), made([4, 60, 71], "other")
    fingerprints = [
        config.build(data).fingerprint
        for data in (first, second)
        for config in (
            SplitConfig(),
            SplitConfig(min_events=6),
            SplitConfig("paper"),
            SplitConfig("paper", window=20),
        )
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert SplitConfig().build(first).fingerprint == fingerprints[0]


def test_settings_that_leave_nobody(made):
    dataset = made([3, 4])
    with pytest.raises(UserError, match="no user has 5 events"):
        SplitConfig().build(dataset)
    with pytest.raises(UserError, match="no user has more than 50 events"):
        SplitConfig("paper").build(dataset)
    with pytest.raises(UserError, match="at least 3"):
        SplitConfig(min_events=2).build(dataset)
    with pytest.raises(UserError, match="at least 1"):
        SplitConfig("paper", window=0).build(dataset)
    with pytest.raises(UserError, match=r"split\.kind is 'random'"):
        SplitConfig("random").build(dataset)  # pyright: ignore[reportArgumentType]
