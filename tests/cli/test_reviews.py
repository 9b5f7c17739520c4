"""Reviews from the command line: a hand-written wardrobe, a tiny language model, everything from rows to the report."""

import json

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from userllm.cli import main
from userllm.data.store import Dataset
from userllm.model import UserLLM

CONFIG = """\
name: reviews
threads: 1
data: {release: rent-the-runway, path: reviews.json, fields: [item, rating, category, length]}
encoder: {layers: 1, width: 16, heads: 2, feed_forward: 32, item_width: 16, field_width: 4, max_length: 8}
pretrain: {epochs: 1, batch: {events: 24}}
lm: {name: tiny-random-llama}
fusion:
  layers: "last:2"
  events: 8
  cross_attention: {heads: 2, head_width: 8}
  text: {events: 2, lead: "", event: "Of {title}: {text}|", close: "", texts: [text], text_words: 9}
tasks:
  review: {kind: review, prompt: "Write a review for {title}."}
  review_rated: {kind: review, prompt: "Review {title}, {rating} of 10:", target: summary, target_tokens: 4}
  favorite_category: {kind: favorite_category, prompt: "The favorite is", field: category}
contextualize: {steps: 4, histories: 4, examples_per_history: 2}
evaluation:
  list_length: 3
  batch: 8
  knowledge_tokens: 40
  text:
    users: 7
    sampled_users: 5
    greedy: {max_new_tokens: 6}
    sampled: {max_new_tokens: 5, sample: true, temperature: 0.9}
"""
WORDS = """
I loved it and it fit well but the zipper broke so many compliments at the wedding
""".split()  # noqa: SIM905
CATEGORIES = ["gown", "dress", "romper"]


def row(user, step):
    n = user * 7 + step * 3
    return {
        "user_id": f"u{user}",
        "item_id": str(100 + n % 9),
        "category": CATEGORIES[n % 9 % 3],
        "rating": str(2 + 2 * (n % 5)),
        "review_date": f"May {1 + step}, 2016",
        "review_summary": "" if (user, step) == (1, 6) else WORDS[n % 15],
        "review_text": " ".join(WORDS[k % 15] for k in range(n % 15, n % 15 + 2 + user)),
        "weight": "137lbs",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wardrobe")
    rows = [row(user, step) for user in range(12) for step in range(7)]
    (folder / "reviews.json").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "config.yaml"]) == 0
    return folder


@pytest.fixture
def metrics(folder):
    return json.loads((folder / "runs/reviews/metrics.json").read_text())


def test_the_numbers_belong_to_the_texts(folder, metrics):
    entry = metrics["tasks"]["review"]
    lines = (folder / "runs/reviews/texts/review.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in lines]
    assert (entry["n"], entry["N"], len(written)) == (7, 12, 7)
    scorer = RougeScorer(["rougeLsum"])
    for system in ("user_llm", "user_llm_shuffled", "no_user", "user_llm_sampled"):
        has = [one for one in written if system in one]
        assert len(has) == (5 if "sampled" in system else 7)
        scores = [scorer.score(one["target"], one[system])["rougeLsum"].fmeasure for one in has]
        assert entry[system]["rougeLsum"]["value"] == pytest.approx(sum(scores) / len(has))
        assert {"rouge1", "rouge2", "words", "rating_agreement"} <= set(entry[system])
        assert set(entry["whole"][system]) == {"distinct_1", "distinct_2"}
    for one in written:
        user = int(one["user"][1:])
        assert one["own_last"] == row(user, 5)["review_text"] != one["other_last"]
        assert one["other_last"] in [row(other, 5)["review_text"] for other in range(12) if other != user]
    assert set(entry["user_llm"]) - set(entry["user_llm_sampled"]) == {
        "log_likelihood",
        "nats_per_token",
        "prompt_tokens",
    }
    assert entry["decoding"]["greedy"] == {
        "max_new_tokens": 6, "min_new_tokens": 0, "sample": False, "temperature": 1.0, "top_p": 1.0,
        "no_repeat": 0, "seed": 0, "users": 7
    }  # fmt: skip
    assert entry["decoding"]["sampled"]["temperature"] == 0.9
    assert set(entry["gain"]) == set(entry["gain_nats"]) == {"over_shuffled", "over_no_user"}
    assert any(one["prompt"].startswith("Write a review for gown 1") for one in written)
    assert any("texts: every system" in note for note in metrics["notes"])


def test_summaries_with_the_rating_given(folder, metrics):
    written = [
        json.loads(line)
        for line in (folder / "runs/reviews/texts/review_rated.jsonl").read_text().splitlines()
    ]
    assert metrics["tasks"]["review_rated"]["n"] == 7
    assert "u1" not in [one["user"] for one in written], "wrote no summary"
    for one in written:
        [given] = [row(int(one["user"][1:]), 6)]
        assert one["prompt"] == f"Review {given['category']} {given['item_id']}, {given['rating']} of 10:"
        assert one["target"] == given["review_summary"]


def test_the_report_shows_them_side_by_side(folder, metrics):
    page = (folder / "runs/reviews/report.html").read_text()
    text = (folder / "runs/reviews/report.md").read_text()
    first = json.loads((folder / "runs/reviews/texts/review.jsonl").read_text().splitlines()[0])
    for told in ("ROUGE-Lsum", "Texts of the first 7 of these users", "agreement with the rating"):
        assert told in page and told in text
    assert first["target"] in page and first["target"] in text
    assert "User-LLM, another user" in text and "What the users wrote" in text
    assert "distinct-2 of all texts together" in page
    assert (folder / "runs/reviews/figures/rouge-review.png").is_file()
    value = metrics["tasks"]["review"]["user_llm"]["rougeLsum"]["value"]
    assert f"{value:.3f}" in text


def test_the_saved_model_writes(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    prompt = "Write a review for gown 105."
    assert (
        main(["generate", "runs/reviews", "--user", "u3", "--prompt", prompt, "--max-new-tokens", "6"]) == 0
    )
    model = UserLLM.from_pretrained("runs/reviews/contextualize/model")
    assert set(model.open_tasks) == {"review", "review_rated"} and set(model.closed_tasks) == {
        "favorite_category"
    }
    assert main(["recommend", "runs/reviews", "--user", "u3"]) == 0
    assert "The favorite is" in capsys.readouterr().out
    assert main(["recommend", "runs/reviews", "--user", "u3", "--task", "review"]) == 2
    assert "task review is answered in free text" in capsys.readouterr().err
    card = (folder / "runs/reviews/contextualize/model/README.md").read_text()
    assert "writes the summary" in card and "rougeLsum" in card


def test_a_history_of_ones_own_tells_its_texts(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    model = UserLLM.from_pretrained("runs/reviews/contextualize/model")
    stored = Dataset.open("runs/reviews/dataset")
    user = stored.user_index("u3")
    mine = [{"item": e.item, "time": e.time, **e.fields} for e in stored.history(user).events]
    assert mine[-1]["text"] == row(3, 6)["review_text"]
    for event in mine:
        del event["summary"]
    (folder / "mine.json").write_text(json.dumps(mine))
    asked = ["generate", "runs/reviews", "--prompt", "Write a review for gown 105.", "--max-new-tokens", "6"]
    said = []
    for whose in (["--user", "u3"], ["--history", "mine.json"]):
        assert main([*asked, *whose]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    batch, _ = model.collator.from_histories([stored.history(user)], max_length=8)
    assert model.history_text is not None
    [text] = model.history_text.written(batch, torch.tensor([0]), torch.tensor([7]))
    expected = [" ".join(row(3, step)["review_text"].split()[:9]) for step in (5, 6)]
    assert [part.split(": ")[1] for part in text.split("|")[:2]] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tasks.review.prompt=A {colour} one", "no {colour}; there are"),
        ("tasks.review.target=body", "no text field 'body'"),
        ("tasks.review.target_tokens=0", "target_tokens is 0"),
        ("evaluation.text.greedy.max_new_tokens=0", "max_new_tokens is 0"),
    ],
)
def test_bad_settings_are_named(folder, monkeypatch, capsys, change, message):
    monkeypatch.chdir(folder)
    settings = [change, "name=wrong", "pretrain=null", "contextualize.steps=1"]
    assert main(["run", "config.yaml", *settings]) == 2
    assert message in capsys.readouterr().err
