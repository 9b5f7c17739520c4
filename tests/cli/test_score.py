import json

import pytest

from userllm import UserLLM, read_history

HISTORY = [{"item": "Heat (1995)", "rating": 5}, {"item": "1", "rating": 4}]


@pytest.fixture
def history(tmp_path):
    file = tmp_path / "history.json"
    file.write_text(json.dumps(HISTORY))
    return file


def test_given_items_are_ranked_by_their_exact_score(userllm, history, finished):
    asked = ["34", "Casino (1995)", "1"]
    said = userllm("score", "runs/demo", "--history", history, "--items", *asked, "--json")
    assert said.code == 0
    told = json.loads(said.out)
    assert (told["task"], told["events"], told["scored"]) == ("next_item", 2, 3)
    assert {answer["item"] for answer in told["answers"]} == set(asked)
    assert {answer["title"] for answer in told["answers"]} == {
        "Babe (1995)", "Casino (1995)", "Toy Story (1995)"
    }  # fmt: skip
    model = UserLLM.from_pretrained(finished / "runs/demo/contextualize/model")
    expected = dict(zip(asked, model.score(read_history(history), asked).tolist(), strict=True))
    scores = [answer["log_likelihood"] for answer in told["answers"]]
    assert scores == pytest.approx([expected[answer["item"]] for answer in told["answers"]], abs=1e-5)
    assert scores == sorted(scores, reverse=True)


def test_the_whole_catalogue_as_a_table(userllm, history):
    said = userllm("score", "runs/demo", "--history", history)
    head, columns, *rows = said.out.splitlines()
    assert "2 events; the best 10 of 24; log-likelihoods in nats" in head
    assert columns.split() == ["with", "this", "user", "without", "gain"]
    assert len(rows) == 10
    own, base, gain = (float(cell) for cell in rows[0].split()[-3:])
    assert gain == pytest.approx(own - base, abs=0.011)
    assert len(userllm("score", "runs/demo", "--user", "8", "-k", "3").out.splitlines()) == 5


def test_items_in_a_file_and_answers_of_another_task(userllm, history, tmp_path):
    file = tmp_path / "items.json"
    file.write_text('[34, "Casino (1995)"]')
    said = userllm("score", "runs/demo", "--history", history, "--items", file, "--json")
    assert len(json.loads(said.out)["answers"]) == 2
    said = userllm(
        "score", "runs/demo", "--history", history, "--task", "favorite_genre", "--items", "Drama", "War"
    )
    assert sorted(line.split()[1] for line in said.out.splitlines()[2:]) == ["Drama", "War"]


@pytest.mark.parametrize(
    ("items", "k", "expected"),
    [
        (["34", "No Such Film (2031)"], 1, "unknown to task next_item: No Such Film (2031); give ids"),
        (["missing.json"], 1, "missing.json: no such file of items"),
        (["34"], 0, "-k is 0"),
    ],
)
def test_what_cannot_be_scored(userllm, history, items, k, expected):
    assert expected in userllm("score", "runs/demo", "--history", history, "--items", *items, "-k", k).error


def test_a_file_that_holds_no_items(userllm, history, tmp_path):
    file = tmp_path / "items.json"
    for content, expected in (("{", "not JSON"), ("[]", "a JSON list"), ('[{"item": 1}]', "a JSON list")):
        file.write_text(content)
        assert expected in userllm("score", "runs/demo", "--history", history, "--items", file).error
