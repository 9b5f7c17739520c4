"""What the stages of a run folder were done with, and what they took: stages.json."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from userllm import processes
from userllm.freed_memory import hand_back
from userllm.json_file import ANEW, read_object
from userllm.pipeline.machine import peaks_mb
from userllm.report.current import stage_hash
from userllm.whole_file import write_text

TOLD_EVERY = 20.0
"""Seconds after which a stage under way writes down what it took so far."""


class Stages:
    """Knows which stages of ``folder`` are done. plain: the run's resolved configuration as plain values."""

    def __init__(self, folder: Path, plain: dict[str, Any]):
        self.folder, self.plain = folder, plain

    @contextmanager
    def stage(self, name: str, keys: Sequence[str], exists: Callable[[], bool]):
        """Yields whether the stage has to be done; remembers its settings and seconds once it is.

        A stage whose settings changed starts anew. What the old settings left in its folder is kept aside until the new
        ones are done, and comes back where they are asked for again before that: a setting that turns out to be wrong
        costs nothing.
        """
        records = processes.told(lambda: self._begun(name, keys, exists))
        if records is None:
            say(f"{name}: done before, skipped")
            yield False
            return
        spent = _Spent(records[name])
        with spent.told_now_and_then(lambda: self._write(records)):
            yield True
        spent.settle()
        records[name] |= {"done": True, **peaks_mb()}
        self._write(records)
        if processes.is_main():
            shutil.rmtree(self._aside(name), ignore_errors=True)
        hand_back()
        processes.wait()
        say(f"{name}: {records[name]['seconds']:.0f} s")

    def _begun(self, name: str, keys: Sequence[str], exists: Callable[[], bool]) -> dict[str, Any] | None:
        """What is known of all stages, with this one begun; None where it is done."""
        record_file = self.folder / "stages.json"
        records = read_object(record_file, ANEW) if record_file.exists() else {}
        settings = stage_hash(self.plain, keys)
        record = records.get(name, {})
        if record.get("settings") == settings and record.get("done") and exists():
            return None
        aside = (self._aside(name) / settings[:12]).is_dir()
        if (aside or record.get("settings") != settings) and name in ("pretrain", "contextualize"):
            record = self._exchange(name, record, settings)
            if record.get("done") and exists():
                self._write(records | {name: record})
                return None
        before = record if record.get("settings") == settings else {}
        spent, cpu = before.get("seconds", 0.0), before.get("cpu_seconds", 0.0)
        records[name] = {"settings": settings, "done": False, "seconds": spent, "cpu_seconds": cpu}
        self._write(records)
        return records

    def _aside(self, name: str) -> Path:
        return self.folder / f".{name}.before"

    def _exchange(self, name: str, record: dict[str, Any], settings: str) -> dict[str, Any]:
        """Put a stage's folder aside, with its record; bring back what these settings left there, and its record."""
        here, told = self.folder / name, "stage.json"
        if here.is_dir() and "settings" in record:
            there = self._aside(name) / record["settings"][:12]
            shutil.rmtree(there, ignore_errors=True)
            there.parent.mkdir(exist_ok=True)
            write(here / told, json.dumps(record))
            here.rename(there)
        shutil.rmtree(here, ignore_errors=True)
        before = self._aside(name) / settings[:12]
        if not before.is_dir():
            return {}
        before.rename(here)
        found = read_object(here / told, ANEW)
        (here / told).unlink()
        return found

    def _write(self, records: dict[str, Any]) -> None:
        write(self.folder / "stages.json", json.dumps(records, indent=1))

    def tell_times(self, file: Path) -> None:
        """Seconds and memory into metrics.json (``file``), which is made inside the stage whose seconds it tells."""
        metrics, records = read_object(file, ANEW), read_object(self.folder / "stages.json", ANEW)
        metrics["timings_s"] = {name: record["seconds"] for name, record in records.items()}
        metrics["cpu_s"] = {name: record.get("cpu_seconds") for name, record in records.items()}
        for peak in ("peak_rss_mb", "peak_gpu_mb"):
            if seen := [record[peak] for record in records.values() if peak in record]:
                metrics[peak] = max(seen)
        write(file, json.dumps(metrics, indent=1))


class _Spent:
    """Adds the seconds of a stage to its ``record``, those before an interruption included, whatever ends it."""

    def __init__(self, record: dict[str, Any]):
        self.record = record
        self.before = record["seconds"], record["cpu_seconds"]
        self.began = time.time(), time.process_time()

    @contextmanager
    def told_now_and_then(self, tell: Callable[[], None]):
        """Calls ``tell`` every ``TOLD_EVERY`` seconds, since a killed process has no last words, and at the end."""
        over = Event()

        def beat() -> None:
            while not over.wait(TOLD_EVERY):
                self._estimate()
                tell()

        thread = Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()  # two writers at once would get into each other's way
            self._estimate()
            tell()

    def settle(self) -> None:
        """The final sum, with what every process used."""
        self._count(processes.total(self._cpu()))

    def _estimate(self) -> None:
        """The sum so far; what other processes have used is not known here: as much as this one."""
        self._count(self._cpu() * processes.count())

    def _cpu(self) -> float:
        return time.process_time() - self.began[1]

    def _count(self, cpu: float) -> None:
        self.record["seconds"] = round(self.before[0] + time.time() - self.began[0], 1)
        self.record["cpu_seconds"] = round(self.before[1] + cpu, 1)


def write(file: Path, text: str) -> None:
    """A file that appears whole, by the main process."""
    if not processes.is_main():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text if text.endswith("\n") else text + "\n")


def say(text: str) -> None:
    """Progress for a person, from the main process."""
    if processes.is_main():
        print(text, flush=True)
