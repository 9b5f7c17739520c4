"""A run that prepares reviews of Amazon's by itself, in the publisher's form of 2023. Their content is invented."""

import gzip
import json

import pytest
import yaml

from userllm import load_config
from userllm.cli import main
from userllm.data import Dataset

WORDS = ["good", "sound", "broke", "soon", "loud", "clear"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    reviews = [
        {"rating": float(1 + (user + step) % 5), "title": WORDS[step % 6], "text": " ".join(WORDS[: 1 + step % 6]),
         "images": [], "asin": f"B{(user + step) % 9:09}", "parent_asin": f"B{(user + step) % 9:09}",
         "user_id": f"AUSER{user}", "timestamp": 1588687728923 + step * 86_400_000, "helpful_vote": 0,
         "verified_purchase": True}
        for user in range(12)
        for step in range(6)
    ]  # fmt: skip
    about = [
        {"title": f"Guitar {n}", "categories": ["Music", f"Shelf {n % 3}"], "parent_asin": f"B{n:09}"}
        for n in range(9)
    ]  # fmt: skip
    (tmp_path / "raw").mkdir()
    for name, rows in (("Music.jsonl.gz", reviews), ("meta_Music.jsonl.gz", about)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "raw" / name).write_bytes(gzip.compress(lines.encode()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


CONFIG = {
    "name": "music", "threads": 1,
    "data": {"release": "amazon", "path": "raw", "fields": ["item", "rating", "category", "length"]},
    "encoder": {"layers": 1, "width": 16, "heads": 2, "feed_forward": 32, "item_width": 16, "max_length": 8},
    "pretrain": {"epochs": 1, "batch": {"events": 40}}, "lm": {"name": "tiny-random-llama"},
    "fusion": {"layers": "last:2", "events": 6, "cross_attention": {"heads": 2, "head_width": 8}},
    "tasks": {
        "favorite": {"kind": "favorite_category", "prompt": "The favorite shelf is", "field": "category"},
        "review": {"kind": "review", "prompt": "Review {title}, {rating} of 5:", "target_tokens": 4},
    },
    "contextualize": {"steps": 2, "histories": 4, "examples_per_history": 1},
    "evaluation": {
        "list_length": 3, "beams": 3, "batch": 8, "knowledge_tokens": 40,
        "text": {"users": 4, "greedy": {"max_new_tokens": 4}, "sampled": None},
    },
}  # fmt: skip


def test_from_the_publishers_files_to_metrics(folder):
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["run", "config.yaml", "data.reviews.before=2020-05-10"]) == 0
    dataset = Dataset.open(folder / "runs" / "music" / "dataset")
    assert dataset.card.rows.filtered == {"time from 2020-05-10 on": 12}
    assert dataset.items["title"].str.starts_with("Guitar").all()
    tasks = json.loads((folder / "runs" / "music" / "metrics.json").read_text())["tasks"]
    assert tasks["favorite"]["tie_rule"].endswith("first in alphabetical order")
    assert tasks["favorite"]["exact"]["recall@1"]["value"] == 1.0
    assert tasks["review"]["n"] == 4
    assert "first in alphabetical order" in (folder / "runs" / "music" / "report.md").read_text()


def test_a_run_without_files_says_what_is_missing(folder, capsys):
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["pretrain", "config.yaml", "data.path=null"]) == 2
    assert (
        "amazon is not found by itself; give your copy with --path (of a run: data.path)"
        in capsys.readouterr().err
    )
    config, _ = load_config(folder / "config.yaml", ["data.reviews.min_user_events=5"])
    assert config.data.reviews is not None and config.data.reviews.min_user_events == 5
