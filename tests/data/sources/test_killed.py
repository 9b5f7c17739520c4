"""kill -9 during prepare and append: the dataset is the old one or the new one."""

import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from userllm.data import Dataset
from userllm.data.columns import Texts, fingerprint
from userllm.data.sources.table import append_table, prepare_table
from userllm.data.sources.table_config import TableConfig

MOMENTS = 20


def write_log(file: Path, seed: int, rows: int = 60_000) -> None:
    random = np.random.default_rng(seed)
    pl.DataFrame(
        {
            "u": random.integers(0, 3000, rows), "i": random.integers(0, 500 + 100 * seed, rows),
            "t": random.integers(0, 10**9, rows), "x": [f"text {n}" for n in range(rows)],
        }
    ).write_csv(file)  # fmt: skip


def recomputed(dataset: Dataset) -> str:
    """The fingerprint of what lies on the disk."""
    texts = Texts(dataset.files / "texts.bin")
    return fingerprint(dataset.offsets, dataset.columns, dataset.items["title"], texts)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prepare", "append"])
def test_killed_at_any_moment(command, tmp_path):
    write_log(tmp_path / "old.csv", 1)
    write_log(tmp_path / "new.csv", 2)
    config = TableConfig(path=[str(tmp_path / "old.csv")], user="u", item="i", time="t", text=["x"])
    folder = tmp_path / "data" / "log"
    old = prepare_table(config, folder).card.fingerprint
    prepare_table(config, tmp_path / "whole")
    script = tmp_path / "do.py"
    script.write_text(
        textwrap.dedent(f"""
        from pathlib import Path
        from userllm.data.sources.table import TableConfig, append_table, prepare_table
        folder, new = Path({str(folder)!r}), [{str(tmp_path / "new.csv")!r}]
        print("ready", flush=True)
        if {command!r} == "append":
            append_table(folder, new, memory="1MB")
        else:
            prepare_table(TableConfig(path=new, user="u", item="i", time="t", text=["x"], memory="1MB"), folder)
        """)
    )
    if command == "append":
        new = append_table(tmp_path / "whole", [str(tmp_path / "new.csv")]).card.fingerprint
    else:
        new_config = TableConfig(path=[str(tmp_path / "new.csv")], user="u", item="i", time="t", text=["x"])
        new = prepare_table(new_config, tmp_path / "whole").card.fingerprint
    moments = random.Random(0)
    took, seen = 0.5, []
    for turn in range(MOMENTS + 1):
        prepare_table(config, folder)
        process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.perf_counter()
        if turn == 0:  # how long it takes when nobody kills it
            assert process.wait() == 0
            took = time.perf_counter() - began
        else:
            time.sleep(moments.uniform(0, 1.05 * took))
            process.send_signal(signal.SIGKILL)
            process.wait()
        dataset = Dataset.open(folder)
        assert dataset.card.fingerprint in (old, new)
        assert recomputed(dataset) == dataset.card.fingerprint
        seen.append(dataset.card.fingerprint == new)
    assert seen[0]
    assert not all(seen[1:])
    found = append_table(folder, [str(tmp_path / "new.csv")])  # what was left behind is in nobody's way
    assert recomputed(found) == found.card.fingerprint
    assert [left.name for left in folder.parent.iterdir()] == ["log"]
