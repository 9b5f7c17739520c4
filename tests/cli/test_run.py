import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from safetensors.torch import load_file

import userllm
from userllm.cli.configuration import load_config
from userllm.encoders.text_start import TextStart
from userllm.language_models.pretrained import LanguageModelConfig, load
from userllm.language_models.text_embeddings import text_embeddings
from userllm.pipeline import Run

FILES = (
    "config.yaml",
    "pretrain/encoder/encoder.safetensors",
    "pretrain/log_history.json",
    "contextualize/model/config.json",
    "contextualize/log_history.json",
    "metrics.json",
    "examples.json",
    "report.html",
    "report.md",
)


def test_a_run_leaves_everything(finished):
    run = finished / "runs" / "demo"
    assert [name for name in FILES if not (run / name).is_file()] == []
    assert any((run / "tensorboard").rglob("events.out.tfevents*"))
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["dataset"]["users"] == 12
    assert metrics["dataset"]["items"] == 24
    assert set(metrics["timings_s"]) >= {"data", "pretrain", "contextualize", "evaluate"}
    knowledge = metrics["knowledge"]
    assert knowledge["without_user"] == knowledge["base"] != knowledge["with_users"]
    assert (knowledge["tokens"], knowledge["users"]) == (511, 2)
    for task, baseline in (("next_item", "popularity"), ("favorite_genre", "majority")):
        entry = metrics["tasks"][task]
        assert entry["n"] == 12
        assert entry["invalid_items"] == 0
        for system in ("user_llm", "user_llm_shuffled", "no_user", baseline):
            assert set(entry[system]["recall@10"]) == {"value", "low", "high"}
        assert set(entry["gain_nats"]) == {"over_shuffled", "over_no_user"}


def test_the_model_has_a_card_with_the_runs_results(finished):
    metrics = json.loads((finished / "runs/demo/metrics.json").read_text())
    model = finished / "runs/demo/contextualize/model"
    card = (model / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: userllm\n")
    assert "# demo\n" in card
    for told in (
        metrics["dataset"]["fingerprint"],
        metrics["split"]["fingerprint"],
        "Next item, n = 12 of 12 users",
    ):
        assert told in card
    best = metrics["tasks"]["next_item"]["user_llm"]["recall@10"]
    assert f"{best['value']:.3f} [{best['low']:.3f}, {best['high']:.3f}]" in card
    assert "exactly" not in card and "general English text" in card
    saved = json.loads((model / "config.json").read_text())
    assert saved["run"]["tasks"] == metrics["tasks"]


def test_what_is_done_is_not_done_again(userllm, finished):
    before = (finished / "runs/demo/metrics.json").read_bytes()
    said = userllm("run", "config.yaml")
    assert said.code == 0
    assert said.out.count("skipped") == 4
    assert (finished / "runs/demo/metrics.json").read_bytes() == before


def test_the_resolved_configuration_is_a_configuration_of_the_same_run(userllm):
    said = userllm("evaluate", "runs/demo/config.yaml")
    assert said.code == 0
    assert said.out.count("skipped") == 4


def test_an_older_run_is_known_to_a_userllm_with_one_more_optional_setting(finished, capsys):
    config, plain = load_config(finished / "runs/demo/config.yaml", [])
    plain["pretrain"]["not_yet_invented"] = None
    Run(config, plain, root=finished / "runs").through("pretrain")
    assert "pretrain: done before" in capsys.readouterr().out


def test_one_stage_does_what_it_needs_and_no_more(userllm, tmp_path, finished):
    said = userllm(
        "pretrain",
        finished / "config.yaml",
        f"data.path={finished / 'raw'}",
        "pretrain.epochs=1",
        cwd=tmp_path,
    )
    assert said.code == 0
    assert (tmp_path / "runs/demo/pretrain/encoder/encoder.safetensors").is_file()
    assert not (tmp_path / "runs/demo/contextualize").exists()
    assert "this run has no model yet" in userllm("recommend", "runs/demo", "--user", "1", cwd=tmp_path).error


def test_item_embeddings_that_start_from_the_titles(userllm, tmp_path, finished):
    """Without training the encoder holds its start; the language model is loaded for nothing else."""
    tables = {}
    for start in ("random", "text"):
        settings = [
            f"name={start}",
            f"encoder.item_start={start}",
            f"data.path={finished / 'raw'}",
            "pretrain=null",
        ]
        said = userllm("pretrain", finished / "config.yaml", *settings, cwd=tmp_path)
        assert said.code == 0
        assert ("language model" in said.err) == (start == "text")
        tables[start] = load_file(tmp_path / f"runs/{start}/pretrain/encoder/encoder.safetensors")
    item = "features.tables.item.weight"
    assert {n for n in tables["text"] if not tables["text"][n].equal(tables["random"][n])} == {item}
    lm, tokenizer, _ = load(LanguageModelConfig(name="tiny-random-llama"))
    projection = TextStart.load(tmp_path / "runs/text/pretrain/encoder/text_start.safetensors")
    heat = projection.rows(text_embeddings(lm, tokenizer, ["Heat (1995)"]))[0]
    assert heat.isclose(tables["text"][item][2:], atol=1e-5).all(1).any()


@pytest.mark.parametrize("which", ["runs/demo", pytest.param("config.yaml", marks=pytest.mark.slow)])
def test_the_report_alone(userllm, finished, which):
    page = finished / "runs/demo/report.html"
    page.unlink()
    assert userllm("report", which).code == 0
    assert "<html" in page.read_text(encoding="utf-8")


def test_no_report_of_metrics_that_are_of_other_settings(userllm, finished, tmp_path):
    """A run begun once more with other settings, and killed before it measured anything."""
    again = tmp_path / "again"
    shutil.copytree(finished / "runs/demo", again)
    file = again / "config.yaml"
    told = yaml.safe_load(file.read_text())
    assert userllm("report", again).code == 0
    told["contextualize"]["encoder_rate"] = 0.7
    file.write_text(yaml.safe_dump(told))
    said = userllm("report", again)
    assert said.code == 2 and "is of other settings than" in said.error


def test_the_report_of_a_run_that_measured_nothing(userllm, finished, tmp_path):
    shutil.copy(finished / "config.yaml", tmp_path)
    assert "metrics.json" in userllm("report", "config.yaml", cwd=tmp_path).error


def test_an_interruption(userllm, finished, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "through", interrupted)
    said = userllm("run", "config.yaml")
    assert said.code == 130
    assert said.err == "interrupted: give the same command again and it goes on where it stopped\n"


def test_the_public_names_are_there():
    for name in userllm.__all__:
        assert getattr(userllm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = userllm.Nothing


def test_two_runs_in_one_folder_do_not_get_into_each_others_way(finished, userllm, tmp_path):
    """The second one is told so before it has written anything; a lock that nobody holds is none."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    shutil.copy(finished / "config.yaml", tmp_path)
    before = (tmp_path / "runs/demo/config.yaml").read_text()
    command = ("run", "config.yaml", "contextualize.steps=3")
    with FileLock(tmp_path / "runs/demo/.lock"):
        line = userllm(*command, cwd=tmp_path).error
        assert "another run is at work in it" in line and "runs/demo" in line
    assert (tmp_path / "runs/demo/config.yaml").read_text() == before
    assert (tmp_path / "runs/demo/.lock").is_file()
    assert userllm("pretrain", "config.yaml", cwd=tmp_path).code == 0


@pytest.mark.slow  # two whole runs
def test_a_run_that_is_refused_its_data_stays_the_run_it_was(userllm, finished, tmp_path):
    """Its dataset changed; the refused command must not leave settings behind that make its report another's."""
    shutil.copytree(finished / "runs/demo", tmp_path / "runs/demo")
    shutil.copytree(finished / "runs/demo/dataset", tmp_path / "data")
    shutil.copy(finished / "config.yaml", tmp_path)
    here = ["config.yaml", "data.path=null", "data.release=null", "data.folder=data", "name=shop"]
    assert userllm("run", *here, cwd=tmp_path).code == 0
    before = (tmp_path / "runs/shop/config.yaml").read_text()
    card = json.loads((tmp_path / "data/card.json").read_text())
    (tmp_path / "data/card.json").write_text(json.dumps(card | {"fingerprint": "0" * 64}))
    said = userllm("evaluate", *here, "evaluation.beams=5", cwd=tmp_path)
    assert "data: has changed since this run began" in said.error
    assert (tmp_path / "runs/shop/config.yaml").read_text() == before
    assert userllm("report", "runs/shop", cwd=tmp_path).code == 0


def test_data_that_are_mended_before_anything_was_made_of_them(userllm, finished, tmp_path):
    shutil.copytree(finished / "runs/demo/dataset", tmp_path / "data")
    shutil.copy(finished / "config.yaml", tmp_path)
    here = ["config.yaml", "data.path=null", "data.release=null", "data.folder=data"]
    assert "colour" in userllm("pretrain", *here, "data.fields=[item,colour]", cwd=tmp_path).error
    card = json.loads((tmp_path / "data/card.json").read_text())
    (tmp_path / "data/card.json").write_text(json.dumps(card | {"fingerprint": "0" * 64}))
    assert userllm("pretrain", *here, cwd=tmp_path).code == 0
    assert json.loads((tmp_path / "runs/demo/dataset.json").read_text())["fingerprint"] == "0" * 64


def test_a_model_does_not_grow_over_itself_and_says_what_it_replaces(userllm, finished, tmp_path):
    shutil.copytree(finished / "runs/demo/contextualize/model", tmp_path / "model")
    data = ["--data", finished / "runs/demo/dataset"]
    said = userllm("grow", tmp_path / "model", *data, "--out", tmp_path / "model")
    assert "this is the model that is to grow; give another folder" in said.error
    assert "replaced" not in userllm("grow", tmp_path / "model", *data, "--out", tmp_path / "other").err
    said = userllm("grow", tmp_path / "model", *data, "--out", tmp_path / "other")
    assert said.code == 0 and "other holds a model; it is replaced" in said.err


def test_a_reader_that_has_seen_enough():
    command = f"set -o pipefail; {sys.executable} -m userllm experiments list | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk():
    command = f"{sys.executable} -m userllm experiments list > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: the disk: No space left on device; make room, and give the same command again\n"
    )
