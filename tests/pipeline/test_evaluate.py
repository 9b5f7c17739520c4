"""The examples of a report: both sides choose among the answers that the evaluation lets them give."""

import numpy as np
import pytest
import torch

from userllm.config import RunConfig
from userllm.data.collation import StoredHistories
from userllm.data.splits import SplitConfig
from userllm.evaluation.closed import ClosedEvaluator
from userllm.evaluation.open import OpenEvaluator
from userllm.evaluation.users import EvaluationConfig
from userllm.pipeline.evaluate import Evaluation


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_both_sides_of_an_example_leave_out_the_same(
    make_user_llm, dataset, vocabulary, monkeypatch, tmp_path, exclude_seen
):
    """What was seen long ago is seen, too; and a repeated target still has to be found."""
    model = make_user_llm(max_length=4, events=4)
    split = SplitConfig().build(dataset)
    rows = split.examples("test", max_length=4)
    row = rows[np.argmax(rows[:, 1])]  # whose history is longer than what the model sees
    first = int(dataset.offsets[row[0]])
    items = dataset.events["item"].copy()
    items[first + row[2]] = items[first]
    monkeypatch.setitem(dataset.events, "item", items)
    stored = StoredHistories(dataset, vocabulary)
    config = EvaluationConfig(beams=40, exclude_seen=exclude_seen)
    closed = ClosedEvaluator(model, model.encoder, dataset, split, stored, config, 0, lambda _text: None)
    closed.without_user["next_item"] = model.score_answers("next_item", None)[0].cpu()
    closed.without_user["favorite_genre"] = model.score_answers("favorite_genre", None)[0].cpu()
    texts = OpenEvaluator(model, dataset, split, stored, closed.users, config, 0, lambda _text: None)
    run = RunConfig(evaluation=config)
    told = Evaluation(tmp_path, run, closed, texts)._example(row)["tasks"]["next_item"]
    seen = (
        set(items[first : first + row[2]].tolist()) - {int(items[first + row[2]])} if exclude_seen else set()
    )
    with torch.no_grad():
        known = model.all_log_likelihoods("next_item", model.context(stored.batch(row[None])))
    answers = model.closed_tasks["next_item"].answers
    for side, scores in (("with_user", known), ("without_user", closed.without_user["next_item"])):
        best = [n for n in scores.argsort(descending=True, stable=True).tolist() if n not in seen][:5]
        assert [one["text"] for one in told[side]] == [answers[n] for n in best]
        assert [one["log_likelihood"] for one in told[side]] == pytest.approx(scores[best].tolist(), abs=1e-4)
    assert told["truth"] == answers[int(items[first])]
