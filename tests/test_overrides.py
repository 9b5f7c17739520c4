import pytest

from userllm.errors import UserError
from userllm.events import Event
from userllm.overrides import read_yaml


def test_a_setting_that_is_given_twice_is_an_error(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("base: &b {seed: 1}\nfirst: {<<: *b, seed: 2}\n")  # what YAML merges may be said anew
    assert read_yaml(file)["first"] == {"seed": 2}
    file.write_text("name: a\nseed: 1\nencoder: {width: 8}\nseed: 2\n")
    with pytest.raises(UserError, match=r"'seed' is given twice.* line 4"):
        read_yaml(file)


def test_an_item_is_named_by_a_text():
    with pytest.raises(UserError, match=r"Event\(5\): an item is its raw id or its title, a text; give '5'"):
        Event(5)  # type: ignore[arg-type]
