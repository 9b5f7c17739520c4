"""Runs that want the same dataset at the same time."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from userllm.cli.configuration import load_config
from userllm.pipeline import run as pipeline
from userllm.pipeline.run import Run


def test_one_prepares_it_and_the_others_wait(tmp_path, monkeypatch):
    monkeypatch.setenv("USERLLM_CACHE", str(tmp_path / "cache"))
    written, begin, prepare = [], threading.Barrier(3), pipeline.prepare_synthetic

    def slowly(folder):
        written.append(folder)
        time.sleep(0.3)
        return prepare(folder)

    monkeypatch.setattr(pipeline, "prepare_synthetic", slowly)

    def prepared(name):
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"name: {name}\ndata: {{release: synthetic}}\nlm: {{name: tiny-random-llama}}\n")
        run = Run(*load_config(file), tmp_path)
        begin.wait()
        run.do_data()
        return run.dataset.num_events

    with ThreadPoolExecutor(3) as runs:
        events = list(runs.map(prepared, ["a", "b", "c"]))
    assert len(written) == 1
    assert min(events) == max(events) > 0
