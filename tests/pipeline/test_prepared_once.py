"""Runs that want the same dataset at the same time."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from userllm.cli.configuration import load_config
from userllm.pipeline import run as pipeline
from userllm.pipeline.run import Run


def named(name, folder):
    file = folder / f"{name}.yaml"
    file.write_text(f"name: {name}\ndata: {{release: synthetic}}\nlm: {{name: tiny-random-llama}}\n")
    return Run(*load_config(file), folder)


def test_one_prepares_it_and_the_others_wait(tmp_path, monkeypatch):
    monkeypatch.setenv("USERLLM_CACHE", str(tmp_path / "cache"))
    written, begin, prepare = [], threading.Barrier(3), pipeline.prepare_synthetic

    def slowly(folder):
        written.append(folder)
        time.sleep(0.3)
        return prepare(folder)

    monkeypatch.setattr(pipeline, "prepare_synthetic", slowly)

    def prepared(name):
        run = named(name, tmp_path)
        begin.wait()
        run.do_data()
        return run.dataset.num_events

    with ThreadPoolExecutor(3) as runs:
        events = list(runs.map(prepared, ["a", "b", "c"]))
    assert len(written) == 1
    assert min(events) == max(events) > 0


def test_nothing_is_written_beside_a_dataset_that_is_there(tmp_path, monkeypatch):
    """A cache that many share may be read-only."""
    monkeypatch.setenv("USERLLM_CACHE", str(tmp_path / "cache"))
    prepared = pipeline.prepare_synthetic(tmp_path / "cache" / "datasets" / "synthetic")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}
    run = named("a", tmp_path)
    run.do_data()
    assert run.dataset.num_events == prepared.num_events
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")} == before
