"""Tasks that are answered in free text, from training to metrics.json's entry, on a task of the tests' own."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from userllm.decoding.next_token import TextDecoding
from userllm.errors import UserError
from userllm.evaluation.metrics import bootstrap_mean, paired_gain
from userllm.evaluation.open import OpenEvaluator
from userllm.evaluation.text_metrics import distinct, length, rouge
from userllm.evaluation.users import EvaluatedUsers, EvaluationConfig, TextEvaluationConfig
from userllm.tasks import OpenTask, TaskConfig, TextExample
from userllm.training.contextualize import ContextualizeConfig, ContextualizedLosses, contextualize
from userllm.training.examples import ExampleBatches
from userllm.training.trainer import OptimizationConfig

EVALUATION = EvaluationConfig(
    batch=4,
    text=TextEvaluationConfig(
        users=None,
        greedy=TextDecoding(max_new_tokens=6),
        sampled=TextDecoding(max_new_tokens=6, sample=True),
    ),
)


class Genres(OpenTask):
    """The genres of the next movie, in words; movies without one are not asked about."""

    def examples(self, dataset, users, ends, window):
        rows = dataset.events["item"][dataset.offsets[users] + ends].tolist()
        titles, genres = dataset.items["title"].to_list(), dataset.items["genres"].to_list()
        return [
            TextExample(self.config.prompt.format(title=titles[row]), ", ".join(genres[row]))
            if genres[row]
            else None
            for row in rows
        ]


@pytest.fixture
def model(make_user_llm):
    config = TaskConfig(prompt="The genres of {title} are", weight=2.0)
    return make_user_llm(more_tasks={"genres": Genres("genres", config)})


@pytest.fixture
def evaluator(model, dataset, split, stored):
    users = EvaluatedUsers.draw(split, EVALUATION, model.encoder.max_length, seed=0)
    return OpenEvaluator(model, dataset, split, stored, users, EVALUATION, 0, lambda _: None)


def test_closed_and_open_tasks_are_mixed_by_weight(model, dataset, split, stored):
    config = ContextualizeConfig(steps=9, histories=8, examples_per_history=3)
    batches = ExampleBatches(model, dataset, split, stored, config, 0)
    counts, written = np.zeros(3), 0
    for step in range(9):
        examples = batches.batch(step)["examples"]
        counts += np.bincount(examples.task, minlength=3)
        number = examples.tasks.index("genres")
        for task, answer, text in zip(examples.task, examples.answers, examples.texts, strict=True):
            assert (text is not None) == (task == number) == (answer == -1)
            written += text is not None
    assert counts[2] / counts.sum() == pytest.approx(0.5, abs=0.12)
    assert written == counts[2]
    losses = ContextualizedLosses(model)(examples)
    assert set(losses) == {"loss", "next_item_nll", "favorite_genre_nll", "genres_nll"}
    asked = [text for text in examples.texts if text is not None]
    mine = examples.task == number
    users = model.context(examples.histories, examples.rows[mine], examples.ends[mine])
    nll, tokens = model.text_losses([t.prompt for t in asked], [t.target for t in asked], users)
    per_token = float(nll.detach().sum() / tokens.sum())
    assert float(losses["genres_nll"]) == pytest.approx(per_token, abs=1e-4)
    share = np.bincount(examples.task, minlength=3) / len(examples.task)
    parts = [float(losses[f"{name}_nll"]) for name in examples.tasks]
    assert float(losses["loss"].detach()) == pytest.approx(float(share @ parts), abs=1e-4)


def test_training_makes_texts_likelier(model, dataset, split, stored, tmp_path):
    config = ContextualizeConfig(
        steps=30, histories=8, optimization=OptimizationConfig(learning_rate=3e-2, log_every=5)
    )
    history = contextualize(model, dataset, split, stored, config, tmp_path, 0)
    logged = [entry["genres_nll"] for entry in history if "genres_nll" in entry]
    assert logged[-1] < logged[0] - 0.5


def test_the_entry_is_what_the_texts_say(model, dataset, split, stored, evaluator):
    texts = evaluator.write("genres")
    entry = evaluator.measure(texts, [rouge, length, distinct])
    rows = split.examples("test", max_length=8)
    known = [row for row in rows if dataset.items["genres"][_next_item(dataset, row)].len() > 0]
    assert (entry["n"], entry["N"]) == (len(known), len(rows)) and len(known) < len(rows)
    assert entry["decoding"]["sampled"]["sample"] is True
    places = [n for n, row in enumerate(rows) if any((row == one).all() for one in known)]
    scorer, scores, nats = RougeScorer(["rougeLsum"]), {}, {}
    for system in ("user_llm", "user_llm_shuffled", "no_user"):
        scores[system], nats[system] = [], []
        for place, row in zip(places, known, strict=True):
            item = _next_item(dataset, row)
            prompt = f"The genres of {dataset.items['title'][item]} are"
            target = ", ".join(dataset.items["genres"][item].to_list())
            history = {"user_llm": row, "user_llm_shuffled": rows[evaluator.users.other[place]]}.get(system)
            with torch.no_grad():
                user = None if history is None else model.context(stored.batch(history[None]))
                text = model.write_texts([prompt], user, EVALUATION.text.greedy)[0]
                nats[system].append(float(model.text_losses([prompt], [target], user)[0]))
            scores[system].append(scorer.score(target, text)["rougeLsum"].fmeasure)
        expected = bootstrap_mean(scores[system]).as_dict()
        assert entry[system]["rougeLsum"] == pytest.approx(expected, abs=1e-6)
        assert entry[system]["log_likelihood"]["value"] == pytest.approx(-np.mean(nats[system]), abs=1e-4)
    assert entry["target"]["rougeLsum"]["value"] == 1.0
    for over, rival in (("over_shuffled", "user_llm_shuffled"), ("over_no_user", "no_user")):
        expected = paired_gain(scores["user_llm"], scores[rival]).as_dict()
        assert entry["gain"][over]["rougeLsum"] == pytest.approx(expected, abs=1e-6)
        expected = paired_gain(nats[rival], nats["user_llm"]).as_dict()
        assert entry["gain_nats"][over] == pytest.approx(expected, abs=1e-3)
    own = evaluator.per_user("genres", texts, None).filter(pl.col("system") == "user_llm")
    assert own["user"].to_list() == [dataset.user_ids[row[0]] for row in known]
    assert own["log_likelihood"].mean() == pytest.approx(-np.mean(nats["user_llm"]), abs=1e-4)
    asked = np.mean([len(model.tokenizer(e.prompt)["input_ids"]) for e in texts.examples])
    assert entry["no_user"]["prompt_tokens"]["value"] == pytest.approx(asked)
    lines = evaluator.as_lines(texts)
    assert set(lines[0]) == {"user", "prompt", "target"} | {
        f"{s}{d}" for s in scores for d in ("", "_sampled")
    }
    assert set(entry["whole"]) == {*entry["gain_nats"], *lines[0]} - {*entry["gain_nats"], "user", "prompt"}


def test_every_texts_numbers_are_kept(evaluator, dataset):
    texts = evaluator.write("genres")
    entry = evaluator.measure(texts, [rouge, length, distinct])
    rows = evaluator.per_user("genres", texts)
    assert set(rows.columns) == {
        "task", "user", "system", "log_likelihood", "rouge1", "rouge2", "rougeLsum", "words"
    }  # fmt: skip
    asked = [dataset.user_ids[int(row[0])] for row in texts.rows]
    for system in ("user_llm", "user_llm_shuffled", "no_user", "user_llm_sampled", "target"):
        mine = rows.filter(task="genres", system=system)
        assert mine["user"].to_list() == asked[: len(mine)] and len(mine) > 0
        assert mine["rougeLsum"].mean() == pytest.approx(entry[system]["rougeLsum"]["value"])
        has = "log_likelihood" in entry[system]
        assert mine["log_likelihood"].null_count() == (0 if has else len(mine))
        if has:
            assert mine["log_likelihood"].mean() == pytest.approx(entry[system]["log_likelihood"]["value"])


def test_smaller_samples_of_texts_lie_within_larger_ones(model, dataset, split, stored):
    def asked(users):
        config = replace(
            EVALUATION, text=TextEvaluationConfig(users=users, greedy=TextDecoding(1), sampled=None)
        )
        drawn = EvaluatedUsers.draw(split, config, model.encoder.max_length, seed=0)
        judge = OpenEvaluator(model, dataset, split, stored, drawn, config, 0, lambda _: None)
        return {int(row[0]) for row in judge.write("genres").rows}

    few, more, everyone = asked(2), asked(4), asked(None)
    assert len(few) == 2 and len(more) == 4 < len(everyone)
    assert few < more < everyone


def _next_item(dataset, row):
    user, _, stop = row
    return int(dataset.events["item"][dataset.offsets[user] + stop])


def test_a_model_that_only_writes(dataset, split, stored, make_user_llm, model):
    with pytest.raises(UserError, match="genres is answered in free text; use generate"):
        model.recommend(dataset.history(7), task="genres")
    model.tasks = model.open_tasks
    model.answers = {}
    model.check_head()
    with pytest.raises(UserError, match="are answered in free text"):
        _ = model.first_closed_task
