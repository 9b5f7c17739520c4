"""Does experiments' missing cells, one after the other or several at a time, each in a process of its own.

A cell is an ordinary run: its configuration is written to OUT/work/<cell>.yaml and given to ``userllm evaluate``. One
that crashes costs the others nothing, and its memory is given back. Cells with equal data, split, encoder, pretraining
and seed share one stage 1, done once in OUT/work/runs/stage1-<hash> and copied into each run folder; who comes while
it is being done waits for it.
"""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from userllm.data.card import DatasetCard
from userllm.errors import UserError
from userllm.experiments.cells import CellStore, FinishedCell
from userllm.experiments.definition import Experiment, settings_hash
from userllm.json_file import AGAIN, read_object
from userllm.report.record import SHOWN_TEXTS
from userllm.whole_file import write_text

Launch = Callable[[list[str]], int]
"""Runs ``userllm`` with these arguments; returns the exit status."""


@dataclass(frozen=True)
class _Wanted:
    """A cell to be done."""

    name: str
    settings: dict[str, Any]
    told: dict[str, Any]
    """Experiment, cell and scale that first asked for it."""
    where: str
    """For messages."""


@dataclass(frozen=True)
class Pace:
    """How long this machine takes for work that another one did."""

    steps: int
    """Training steps of the cell's stage 2."""
    here: float
    """CPU seconds of this machine in training, without loading and saving."""
    there: float
    """CPU seconds of the machine that did the stored cell."""
    hardware: str
    """That machine."""

    @property
    def factor(self) -> float:
        """Seconds of this machine for one of that."""
        return self.here / self.there


_INTERRUPTED = (130, -signal.SIGINT)
"""Exit statuses of a process that was told to stop by Ctrl-C."""
_STAGE_1 = ("data", "split", "encoder", "pretrain", "seed")


def in_own_process(arguments: list[str], output: Path | None = None) -> int:
    """``userllm ARGUMENTS`` as a process of its own. output: what it says is added to this file; to this process's
    standard streams if None."""
    command = [sys.executable, "-m", "userllm", *arguments]
    with ExitStack() as ends:
        file = None if output is None else ends.enter_context(output.open("ab"))
        both = None if output is None else subprocess.STDOUT
        process = ends.enter_context(subprocess.Popen(command, stdout=file, stderr=both))
        _running.add(process)
        ends.callback(_running.discard, process)
        if _ending.is_set():  # the signal came while it was being started
            process.terminate()
        return process.wait()


_running: set[subprocess.Popen[bytes]] = set()
"""The processes that are at work."""
_ending = threading.Event()
"""Whether they have been told to end."""


class Runner:
    """Runs cells into ``out``. keep: leave the run folders, models included, where they are.

    jobs: cells at a time; of more than one each is a process with its output in OUT/work/<cell>.log, whatever
    ``launch`` is. Meant for budgets of steps or CPU seconds: a second on an accelerator that is shared holds less work.

    pace: seconds of this machine for one second of an experiment's budgets of stage 1 and of stage 2, so that rows of
    machines of unlike speed had the same training; see ``measured_pace``. A cell goes by its settings without it,
    and tells it.
    """

    def __init__(
        self,
        out: Path,
        launch: Launch = in_own_process,
        keep: bool = False,
        say: Callable[[str], None] = print,
        pace: tuple[float, float] = (1.0, 1.0),
        jobs: int = 1,
    ):
        self.store = CellStore(out)
        self.work = out / "work"
        self.runs = self.work / "runs"
        self.launch, self.keep, self.say, self.pace, self.jobs = launch, keep, say, pace, jobs
        self._pretrained: set[str] = set()
        self._stopped = threading.Event()

    @contextmanager
    def ended_by_sigterm(self) -> Iterator[Runner]:
        """Inside, SIGTERM ends the processes of ``in_own_process``, too, which Ctrl-C reaches by itself."""

        def stop(*_: object) -> None:
            self._stopped.set()
            _ending.set()
            for process in _running.copy():
                process.terminate()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)
            _ending.clear()

    def run(
        self,
        experiments: Sequence[Experiment],
        scale: str,
        seeds: Sequence[int] | None = None,
        only: Sequence[str] | None = None,
        extra: Sequence[str] = (),
    ) -> list[str]:
        """Do what is missing; returns the names of the cells that failed. only: these cells. extra: more settings."""
        missing: dict[str, _Wanted] = {}  # by hash: experiments share cells
        for experiment in experiments:
            cells = [experiment.cell(name).name for name in only or experiment.cells]
            pairs = [(cell, seed) for seed in seeds or experiment.scale(scale).seeds for cell in cells]
            for number, (cell, seed) in enumerate(pairs, 1):
                settings = experiment.settings(cell, scale, seed, extra)
                digest = settings_hash(settings)
                name = f"{scale}-{cell}-s{seed}-{digest}"
                where = f"{experiment.name} {number}/{len(pairs)}: {name}"
                if (stored := self.store.find(digest)) is not None:
                    self.say(f"{where}: done before on {_same_data(stored, settings)}, skipped")
                    continue
                told = {"experiment": experiment.name, "cell": cell, "scale": scale}
                missing.setdefault(digest, _Wanted(name, settings, told, where))
        done = self._each(missing, partial(self._done, wait=False))
        busy = {digest: one for digest, one in missing.items() if done[digest] is None}
        # another runner was at these: at the end they are waited for
        done |= self._each(busy, partial(self._done, wait=True))
        return [one.name for digest, one in missing.items() if not done[digest]]

    def _each(
        self, cells: Mapping[str, _Wanted], do: Callable[[_Wanted], bool | None]
    ) -> dict[str, bool | None]:
        """What ``do`` says of each, ``jobs`` at a time."""
        if self.jobs == 1:
            return {digest: do(one) for digest, one in cells.items()}
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                return dict(zip(cells, pool.map(do, cells.values()), strict=True))
            except BaseException:
                # the processes that run got the signal themselves; nothing is to be started after them
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _done(self, wanted: _Wanted, wait: bool) -> bool | None:
        """Do a cell; whether it is stored. wait: for another runner that is at it; None if not waited for."""
        try:
            lock = self._locked(wanted.name).acquire(-1 if wait else 0)
        except Timeout:
            return None
        with lock:
            if self.store.find(settings_hash(wanted.settings)) is not None:
                self.say(f"{wanted.where}: done by another runner in the meantime, skipped")
                return True
            self.say(wanted.where)
            if self._cell(wanted.name, wanted.settings, wanted.told) is not None:
                return True
        log = f" (see {self._log(wanted.name)})" if self.jobs > 1 else ""
        self.say(f"{wanted.where}: failed{log}; the other cells go on")
        return False

    def measured_pace(
        self,
        experiment: Experiment,
        scale: str,
        extra: Sequence[str] = (),
        steps: int | None = None,
        cell: str | None = None,
    ) -> Pace:
        """Does stage 2 of a stored cell once more, for as many steps as it took there, or for ``steps``; stage 1 is
        left out.

        cell: the reference if None. Not all work slows down alike: rows that train the LM have a pace of their own.
        Raises UserError where no such cell with a budget of seconds is stored, and where a stage fails.
        """
        cell = cell or experiment.reference
        seed = experiment.scale(scale).seeds[0]
        settings = experiment.settings(cell, scale, seed, extra)
        stored = self.store.find(settings_hash(settings))
        if stored is None:
            raise UserError(
                f"{self.store.folder}: no cell {cell} (seed {seed}, scale {scale}) of "
                f"{experiment.name}; the pace is that of this machine beside the one that did it"
            )
        training = stored.metrics["training"]
        if training["seconds"] is None:
            raise UserError(f"{experiment.name} counts steps, not seconds: it needs no pace")
        asked = training["steps"] if steps is None else min(steps, training["steps"])
        settings["contextualize"] |= {"seconds": None, "steps": asked}
        settings["pretrain"] = None  # a step takes as long whatever the encoder has learnt
        name = f"pace-{scale}-{cell}-s{seed}-{settings_hash(settings)}"
        folder = self._prepared(name, settings)
        if folder is None or self._userllm("contextualize", name, settings) != 0:
            raise UserError("the pace is not known; what went wrong stands above")
        took = read_object(folder / "contextualize" / "training.json", AGAIN, "took")["took"]
        there = training["seconds"] / stored.pace[1]
        if not self.keep:
            shutil.rmtree(folder)
        return Pace(asked, took, there * asked / training["steps"], str(stored.told["hardware"]))

    def _paced(self, settings: dict[str, Any]) -> dict[str, Any]:
        """With the seconds of both stages for this machine."""
        paced = copy.deepcopy(settings)
        for stage, pace in zip(("pretrain", "contextualize"), self.pace, strict=True):
            # at pace 1 what was asked for stays as written: 150 and 150.0 have unlike hashes
            if pace != 1 and (paced.get(stage) or {}).get("seconds") is not None:
                paced[stage]["seconds"] *= pace
        return paced

    def _prepared(self, name: str, settings: dict[str, Any]) -> Path | None:
        """The run folder of that name with stage 1 done; None where it failed."""
        first = self._stage_1(settings)
        if first is None:
            return None
        folder = self.runs / name
        if not (folder / "stages.json").is_file():  # else it was interrupted, and goes on
            shutil.rmtree(folder, ignore_errors=True)
            ignored = shutil.ignore_patterns(
                "checkpoint-*", "best.safetensors", "tensorboard", "config.yaml", ".lock"
            )
            # half a copy must not pass for an interrupted run
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(first, partial, ignore=ignored)
            partial.rename(folder)
        return folder

    def _cell(self, name: str, settings: dict[str, Any], told: dict[str, Any]) -> FinishedCell | None:
        paced = self._paced(settings)
        folder = self._prepared(name, paced)
        if folder is None:
            return None
        if self._userllm("evaluate", name, paced) != 0:
            return None
        metrics = read_object(folder / "metrics.json", AGAIN)
        told |= {
            "settings_hash": settings_hash(settings),
            "commit": metrics["commit"],
            "date": metrics["date"],
            "hardware": metrics["hardware"],
            "settings": settings,
            "pace": [1.0, 1.0] if paced == settings else list(self.pace),
            "config": yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")),
            "stages": read_object(folder / "stages.json", AGAIN),
            "metrics": metrics,
            "texts": {file.stem: _first_lines(file) for file in sorted((folder / "texts").glob("*.jsonl"))},
        }
        cell = self.store.store(name, told, folder / "per_user.parquet")
        if not self.keep:
            shutil.rmtree(folder)
        return cell

    def _stage_1(self, settings: dict[str, Any]) -> Path | None:
        """The run folder in which stage 1 of these settings is done; None where it failed."""
        keys = [*_STAGE_1]
        if settings.get("encoder", {}).get("item_start") == "text":
            keys.append("lm")  # its item table begins with the language model's embeddings
        mine = {key: settings[key] for key in keys if key in settings}
        name = f"stage1-{settings_hash(mine)}"
        with self._locked(name):  # another cell, or another runner, may be at it
            if name not in self._pretrained:
                # asked for even where it lies there: it may be half done, or another version's that cannot be taken
                # over
                shared = mine | {key: settings[key] for key in ("threads", "lm") if key in settings}
                if self._userllm("pretrain", name, shared) != 0:
                    return None
                self._pretrained.add(name)
        return self.runs / name

    def _locked(self, name: str) -> FileLock:
        """For one runner and one cell at a time."""
        self.work.mkdir(parents=True, exist_ok=True)
        return FileLock(self.work / f"{name}.lock")

    def _log(self, name: str) -> Path:
        return self.work / f"{name}.log"

    def _userllm(self, command: str, name: str, settings: dict[str, Any]) -> int:
        file = self.work / f"{name}.yaml"
        text = yaml.safe_dump(settings | {"name": name}, sort_keys=False, allow_unicode=True)
        write_text(file, text)
        launch = self.launch
        if self.jobs > 1:
            launch = partial(in_own_process, output=self._log(name))
        if self._stopped.is_set():
            raise KeyboardInterrupt
        status = launch([command, str(file), "--runs", str(self.runs)])
        if status in _INTERRUPTED or (status != 0 and self._stopped.is_set()):
            self._stopped.set()
            raise KeyboardInterrupt
        return status


def _same_data(cell: FinishedCell, settings: dict[str, Any]) -> str:
    """The data of a stored cell, in words. Where files lie is not in a cell's hash: raises UserError where the folder
    that is given now holds other data."""
    data = cell.metrics["dataset"]
    folder = settings["data"].get("folder")
    if folder is not None and (file := Path(folder, "card.json")).is_file():
        here = DatasetCard.from_json(file.read_text(encoding="utf-8"), file)
        if here.fingerprint != data["fingerprint"]:
            raise UserError(
                f"{cell.file}: was run on {data['name']} {data['fingerprint'][:12]}, and data.folder {folder} holds "
                f"{here.name} {here.fingerprint[:12]}; give other data an --out of its own"
            )
    return f"{data['name']} {data['fingerprint'][:12]}"


def _first_lines(file: Path) -> list[dict[str, Any]]:
    """Texts that a cell keeps: those of the first users."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, SHOWN_TEXTS)]
