import json

import pytest

from userllm.data import read_history
from userllm.errors import UserError
from userllm.events import Event


def written(tmp_path, content):
    file = tmp_path / "history.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_events_are_sorted_by_time_and_ties_keep_their_order(tmp_path):
    raw = [{"item": "b", "time": 5}, {"item": "c", "time": 5, "rating": 4.5}, {"item": 7, "time": 1}]
    events = read_history(written(tmp_path, raw)).events
    assert events == [Event("7", 1), Event("b", 5), Event("c", 5, {"rating": 4.5})]


def test_without_times_the_file_has_the_order(tmp_path):
    history = read_history(written(tmp_path, [{"item": "b"}, {"item": "a", "rating": None}]))
    assert [event.item for event in history.events] == ["b", "a"]
    assert history.events[1].fields == {}
    assert len(read_history(written(tmp_path, []))) == 0


def test_a_mark_of_byte_order_is_no_event(tmp_path):
    assert len(read_history(written(tmp_path, "\ufeff" + json.dumps([{"item": "a"}])))) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[\n{]", r"history\.json line 2: not JSON"),
        ({"item": "a"}, "is a JSON list of events"),
        (["a"], 'event 1: expected an object such as .* got "a"'),
        ([{"item": "a"}, {"rating": 3}], "event 2: item is null"),
        ([{"item": ""}], "event 1: item is"),
        ([{"item": True}], "event 1: item is true"),
        ([{"item": "a", "time": "1995"}], 'event 1: time is "1995", not whole seconds'),
        ([{"item": "a", "time": 1700000000000}], "event 1: time is 1700000000000, not whole seconds"),
        ([{"item": "a", "time": 1}, {"item": "b"}], "event 2: time is missing; give it for every event"),
        (
            [{"item": "a", "ratings": 3}],
            "event 1: unknown field 'ratings'; an event may have item, time, rating",
        ),
        ([{"itme": "a"}], "event 1: unknown field 'itme'; an event may have item, time, rating"),
        ([{"item": "a", "rating": [3]}], r"event 1: rating is \[3\]"),
    ],
)
def test_bad_files(content, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        read_history(written(tmp_path, content))


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such history file"):
        read_history(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"item": "a", "rating": 1' + "0" * 5000 + "}]"])
def test_json_that_python_gives_up_on(text, tmp_path):
    (tmp_path / "history.json").write_text(text)
    with pytest.raises(UserError, match=r"history\.json: cannot be read"):
        read_history(tmp_path / "history.json")
