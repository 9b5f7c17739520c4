"""Ray's workers and one process get the same embeddings and the same evaluation, to the last bit."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from userllm import scale_out
from userllm.cli.configuration import load_config
from userllm.data.sources.movielens import FIELDS
from userllm.data.store import Source, write_dataset
from userllm.errors import UserError
from userllm.pipeline import Run
from userllm.scale_out import Embedder, embed_users, last_embeddings

CONFIG = """\
name: one
threads: 1
data: {release: synthetic}
encoder: {layers: 1, width: 16, heads: 2, feed_forward: 32, item_width: 16, max_length: 30}
pretrain: {epochs: 0.3, batch: {events: 300}}
lm: {name: tiny-random-llama}
fusion: {layers: "last:2", events: 8, cross_attention: {heads: 2, head_width: 8}}
tasks:
  next_item: {prompt: The next movie this user will watch is}
  genres: {kind: genre_preference, prompt: "This user's favorite genres are", target_tokens: 12}
contextualize: {steps: 6, histories: 4, examples_per_history: 2}
evaluation:
  {users: 40, list_length: 10, beams: 10, batch: 16, knowledge_tokens: 64, text: {users: 30, sampled_users: 20}}
"""


@pytest.fixture(scope="module")
def saved(make_user_llm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    make_user_llm().save_pretrained(folder)
    return folder


def embeddings_of(embedder: Embedder) -> pl.DataFrame:
    return pl.concat([embedder.of_shard(number) for number in range(embedder.shards)])


def test_a_dataset_of_another_catalogue_is_refused(saved, dataset, catalogue, tmp_path):
    """As `userllm embed` refuses it; and what an item is like is said by the model's catalogue."""

    def written(name, items, fields=FIELDS):
        events = pl.DataFrame(
            {"user": [0, 0, 1], "item": [3, 7, 3], "time": [1, 2, 3], "rating": [4.0, 5.0, 3.0]}
        )
        if "rating" not in [field.name for field in fields]:
            events = events.drop("rating")
        users, source = pl.DataFrame({"id": ["a", "b"]}), Source("made", "a test", "none", "0" * 64, "path")
        return write_dataset(tmp_path / name, events, items, users, name=name, source=source, fields=fields)

    foreign = catalogue.with_columns(pl.concat_str(pl.lit("x"), "id").alias("id"))
    with pytest.raises(UserError, match="the model knows none of its items"):
        Embedder(saved, written("foreign", foreign).folder)
    unrated = [field for field in FIELDS if field.name != "rating"]
    with pytest.raises(UserError, match="events have no field 'rating'"):
        Embedder(saved, written("unrated", catalogue, unrated).folder)
    plain = embeddings_of(Embedder(saved, written("plain", catalogue).folder))
    assert plain["user"].to_list() == ["a", "b"]
    bare = catalogue.with_columns(
        pl.col("genres").list.head(0)
    )  # the model's own catalogue says what they are
    other = embeddings_of(Embedder(saved, written("bare", bare).folder))
    assert other["embedding"].to_list() == plain["embedding"].to_list()


@pytest.mark.parametrize("shard", [5, 24, 100])
def test_the_embedding_of_a_user_is_the_last_of_the_history(saved, dataset, make_user_llm, shard):
    model = make_user_llm()
    found = embeddings_of(Embedder(saved, dataset.folder, shard))
    assert found["user"].to_list() == dataset.user_ids
    assert found["events"].to_list() == dataset.lengths.tolist()
    for user, row in enumerate(found.iter_rows(named=True)):
        expected = model.encode(dataset.history(user))[-1]
        assert torch.allclose(torch.tensor(row["embedding"]), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["autoregressive", "dual", "bert4rec"])
def test_company_does_not_matter_and_nothing_is_embedded_as_nothing(stored, make_encoder, kind, monkeypatch):
    monkeypatch.setattr(scale_out, "BATCH_EVENTS", 20)
    encoder = make_encoder(kind)
    rows = np.array([(7, 0, 9), (5, 0, 4), (8, 0, 0), (3, 2, 5)])
    found, known = last_embeddings(encoder, stored, rows)
    assert known.tolist() == [True, True, False, True]
    assert not found[2].any()
    for place in (0, 1, 3):
        alone, _ = last_embeddings(encoder, stored, rows[[place]])
        assert torch.allclose(found[place], alone[0], atol=1e-5)


def test_answers_travel_unchanged():
    answers = {
        "ranks": np.array([3, 0, 1]),
        "log_likelihood": np.array([-0.1, -1 / 3, -1e-300]),
        "sampled": np.array(["a text", None, "é"], dtype=object),
        "greedy": np.array([None, None, None], dtype=object),
    }
    back = scale_out._unpacked(scale_out._packed(answers))
    assert back.keys() == answers.keys()
    for name, value in answers.items():
        assert back[name].dtype == value.dtype
        assert back[name].tolist() == value.tolist()


def test_without_ray(saved, dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed; .* '\.\[ray\]'"):
        embed_users(saved, dataset.folder, tmp_path / "out", 2)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="is there already"):
        embed_users(saved, dataset.folder, tmp_path / "there", 2)


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """A Ray of two CPUs on this machine."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.slow  # starting Ray and its workers takes half a minute
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("ray")
def test_ray_embeds_as_one_process_does(saved, dataset, tmp_path):
    assert embed_users(saved, dataset.folder, tmp_path / "out", 2, shard=5) == dataset.num_users
    files = sorted((tmp_path / "out").glob("*"))
    assert [file.name for file in files] == [f"{number:06d}.parquet" for number in range(5)]
    assert pl.concat(map(pl.read_parquet, files)).equals(embeddings_of(Embedder(saved, dataset.folder, 5)))


@pytest.mark.slow  # starting Ray and its workers takes half a minute
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("ray")
def test_ray_evaluates_as_one_process_does(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    config, plain = load_config(tmp_path / "config.yaml")
    one = Run(config, plain, tmp_path).through("evaluate")
    shutil.copytree(one, tmp_path / "ray")
    (tmp_path / "ray" / "metrics.json").unlink()
    config, plain = load_config(tmp_path / "config.yaml", ["name=ray"])
    run = Run(config, plain, tmp_path)
    run.answering = scale_out.answering(run, workers=2)
    run.through("evaluate")
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "ray")]
    assert metrics[0]["tasks"]["next_item"]["n"] == 40 and metrics[0]["tasks"]["genres"]["n"] == 30
    assert metrics[0]["tasks"] == metrics[1]["tasks"]
    assert metrics[0]["knowledge"] == metrics[1]["knowledge"]
    tables = [pl.read_parquet(tmp_path / name / "per_user.parquet") for name in ("one", "ray")]
    assert tables[0].equals(tables[1])
    texts = [(tmp_path / name / "texts" / "genres.jsonl").read_text() for name in ("one", "ray")]
    assert texts[0] == texts[1]
