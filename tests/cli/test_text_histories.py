"""UEM from the command line: descriptions, a store of sentence embeddings, a T5 that reads soft prompts."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from transformers import BertConfig, BertModel

from userllm.data.store import Dataset
from userllm.data.text_store import TextStore
from userllm.evaluation.labels import LabelCounts, weighted_f1
from userllm.language_models.tiny import tiny_tokenizer

ENCODER = (
    "{kind: text, layers: 1, width: 16, heads: 2, feed_forward: 32, max_length: 12, "
    "sentences: minute, sentence_width: 16}"
)
SETTINGS = [
    f"encoder={ENCODER}",
    "data.descriptions=overviews.csv",
    "data.fields=[item, rating]",
    "lm.name=tiny-random-t5",
    "fusion.kind=soft_prompt",
    "contextualize.strategy.name=full",
    "contextualize.steps=2",
    "pretrain.epochs=1",
    "evaluation.users=4",
]


def write_sentence_encoder(folder, seed=0):
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "right"
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def work(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uem")
    write_sentence_encoder(folder / "minute")
    (folder / "overviews.csv").write_text("movieId,overview\n1,Toys come alive.\n6,A robbery\n296,Hm\n")
    (folder / "config.yaml").write_text(
        (finished / "config.yaml").read_text().replace("path: raw", f"path: {finished}/raw")
    )
    return folder


def test_a_run_with_text_histories(userllm, work):
    said = userllm("run", "config.yaml", *SETTINGS, cwd=work)
    assert said.code == 0, said.err
    run = work / "runs/demo"
    dataset = Dataset.open(json.loads((run / "dataset.json").read_text())["folder"])
    assert dataset.items["description"].drop_nulls().to_list() == ["Toys come alive.", "A robbery", "Hm"]
    store = TextStore.read(dataset.folder / "sentences" / "minute")
    assert len(store) == 24 + 5 + 3 and "distinct texts to encode" in said.out
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["tasks"]["next_item"]["n"] == 4 and metrics["knowledge"] is None
    model = json.loads((run / "contextualize/model/config.json").read_text())
    assert (model["encoder"]["kind"], model["encoder"]["sentences"]) == ("text", "minute")
    assert len(TextStore.read(run / "contextualize/model/sentences")) == len(store)

    said = userllm("run", "config.yaml", *SETTINGS, cwd=work)
    assert said.out.count("skipped") == 4 and "to encode" not in said.out
    said = userllm("recommend", "runs/demo", "--user", "1", cwd=work)
    assert said.code == 0, said.err
    said = userllm("generate", "runs/demo", "--user", "1", "--prompt", "Which genres?", cwd=work)
    assert said.code == 0, said.err


@pytest.mark.slow  # a whole run, one of three
def test_a_run_that_asks_for_genres_alone(userllm, work):
    genres = "tasks={genres: {kind: genre_preference, prompt: 'Which genres?'}}"
    said = userllm("run", "config.yaml", *SETTINGS, "pretrain=null", genres, "name=genres", cwd=work)
    assert said.code == 0, said.err
    [entry] = json.loads((work / "runs/genres/metrics.json").read_text())["tasks"].values()
    for system in ("user_llm", "user_llm_shuffled", "no_user", "majority", "every_label"):
        assert 0 <= entry[system]["f1"]["low"] <= entry[system]["f1"]["high"] <= 1
    assert entry["target"]["f1"]["value"] == 1 and entry["every_label"]["recall"]["value"] == 1
    assert entry["labels"]["user_llm"]["Drama"]["support"] >= 1
    assert (work / "runs/genres/report.html").exists()
    told = pl.read_parquet(work / "runs/genres/per_user.parquet").filter(pl.col("system") == "every_label")
    assert len(told) == entry["n"] and told["rank"].null_count() == len(told)
    by_name = LabelCounts.of_names(told["target"].to_list(), told["named"].to_list(), np.arange(len(told)))
    assert weighted_f1(by_name).value == pytest.approx(entry["every_label"]["f1"]["value"])


def test_a_run_about_items_that_training_never_met(userllm, work):
    genres = "tasks={genres: {kind: genre_preference, prompt: 'Which genres?'}}"
    unseen = ["split={kind: unseen_items, unseen: 0.6, min_events: 3}", "evaluation.users=null"]
    unseen += ["pretrain=null", genres, "name=unseen"]
    said = userllm("run", "config.yaml", *SETTINGS, *unseen, cwd=work)
    assert said.code == 0, said.err
    assert "unseen_items (min_events 3, 0.6 of the items unseen)" in said.out
    run = work / "runs/unseen"
    told = pl.read_parquet(run / "per_user.parquet")
    assert told["user"].str.ends_with(" (unseen items)").all()
    assert json.loads((run / "metrics.json").read_text())["split"]["kind"] == "unseen_items"
    assert not (
        Dataset.open(run / "unseen_items").folder / "sentences"
    ).exists()  # the store of the whole is read
    said = userllm("run", "config.yaml", *SETTINGS, *unseen, cwd=work)
    assert said.out.count("skipped") == 4


def test_a_store_of_another_encoder_is_refused(userllm, work):
    assert userllm("pretrain", "config.yaml", *SETTINGS, "name=other", cwd=work).code == 0
    write_sentence_encoder(work / "minute", seed=1)
    said = userllm("run", "config.yaml", *SETTINGS, "name=other", cwd=work)
    assert "these embeddings were made by minute (sha256" in said.error and "remove the folder" in said.error


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.descriptions=gone.csv", "gone.csv: no such file of descriptions"),
        ("data.descriptions=null", "the catalogue has no {description} (data.descriptions brings it)"),
        ("encoder.sentences=nowhere/at-all", "encoder.sentences: language model nowhere/at-all"),
        ("encoder.sentence_width=99", "minute makes vectors of width 16; set encoder.sentence_width"),
        ('encoder.rating="{year}"', "encoder.rating '{year}': name one field of the events"),
    ],
)
def test_one_clear_error(userllm, work, setting, message, monkeypatch):
    monkeypatch.setattr("userllm.language_models.pretrained.hub_problem", lambda: "the hub cannot be reached")
    write_sentence_encoder(work / "minute")
    said = userllm("pretrain", "config.yaml", *SETTINGS, setting, "name=wrong", cwd=work)
    assert message in said.error
