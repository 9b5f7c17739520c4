import json

import pytest

from userllm import UserHistory, UserLLM

HISTORY = [
    {"item": "Heat (1995)", "rating": 5, "time": 978300760},
    {"item": "1", "rating": 4, "time": 978300000},
    {"item": "No Such Film (2031)", "time": 978300800},
]


@pytest.fixture
def history(tmp_path):
    """A history file of somebody the model has never met."""
    file = tmp_path / "history.json"
    file.write_text(json.dumps(HISTORY))
    return file


def test_a_user_of_the_dataset(userllm):
    said = userllm("recommend", "runs/demo", "--user", "8", "-k", "3")
    assert said.code == 0
    head, columns, *rows = said.out.splitlines()
    assert head.startswith("next_item: The next movie this user will watch is ...  (5 events;")
    assert "with this user" in columns and "without the user" in columns
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    seen = {"Misérables, Les (1995)", "Sense and Sensibility (1995)", "Leaving Las Vegas (1995)"}
    assert not any(title in row[:50] for title in seen for row in rows)


def test_a_history_file_as_json(userllm, history):
    said = userllm("recommend", "runs/demo/contextualize/model", "--history", history, "-k", "30", "--json")
    assert (
        "warning: items that the model has never seen are read as unknown: No Such Film (2031)\n" in said.err
    )
    answers = json.loads(said.out)
    assert answers["events"] == 3
    with_user = [answer["title"] for answer in answers["with_user"]]
    assert len(set(with_user)) == 22  # all but the two that were seen
    assert not {"Heat (1995)", "Toy Story (1995)"} & set(with_user)
    scores = [answer["log_likelihood"] for answer in answers["with_user"]]
    assert scores == sorted(scores, reverse=True)


def test_without_the_user_is_the_base_language_model(userllm, history, finished):
    said = userllm("recommend", "runs/demo", "--history", history, "-k", "24", "--json")
    model = UserLLM.from_pretrained(finished / "runs/demo/contextualize/model")
    expected = model.recommend_without_user(24)
    listed = json.loads(said.out)["without_user"]
    assert [answer["title"] for answer in listed] == [answer.title for answer in expected]
    assert [answer["log_likelihood"] for answer in listed] == pytest.approx(
        [answer.log_likelihood for answer in expected], abs=1e-4
    )


def test_another_task(userllm, history, finished):
    said = userllm("recommend", "runs/demo", "--history", history, "--task", "favorite_genre", "--json")
    titles = {answer["title"] for answer in json.loads(said.out)["with_user"]}
    assert len(titles) == 10
    catalogue = (finished / "raw/movies.dat").read_text("latin-1").splitlines()
    assert titles <= {genre for line in catalogue for genre in line.split("::")[2].split("|")}


def test_somebody_of_whom_nothing_is_known(userllm, tmp_path):
    (tmp_path / "nobody.json").write_text("[]")
    said = userllm("recommend", "runs/demo", "--history", tmp_path / "nobody.json", "-k", "5", "--json")
    answers = json.loads(said.out)
    assert answers["with_user"] == answers["without_user"]


def test_generate(userllm, history, finished):
    said = userllm(
        "generate", "runs/demo", "--history", history, "--prompt", "What next?", "--max-new-tokens", "4"
    )
    assert said.code == 0
    model = UserLLM.from_pretrained(finished / "runs/demo/contextualize/model")
    assert said.out.rstrip("\n") != model.generate("What next?", UserHistory(()), max_new_tokens=5)
    assert (
        userllm("generate", "runs/demo", "--user", "3", "--prompt", "Hi", "--data", "runs/demo/dataset").code
        == 0
    )
