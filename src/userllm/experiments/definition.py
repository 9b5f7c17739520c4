"""What an experiment is: a grid of ordinary run configurations that differ from one base in stated settings.

Each experiment is a YAML file in this folder, or anyone's own:

    title, question        one line each
    redoes: [TABLE, ...]   the papers' tables that stand beside it (optional)
    like: NAME             take base, scales and notes from another experiment, or from a YAML file beside this one
                           (optional)
    base: {...}            a run configuration (without like)
    scales: {cpu: {settings: [a.b=c, ...], seeds: [0]}, ...}
    reference: CELL        the cell that the others are compared with
    cells: {NAME: {label, group, settings, at: {SCALE: [a.b=c]}, paper: {PLACE: [TABLE, ROW, COLUMN]}}}
                           or NAME: OTHER_EXPERIMENT, the cell of that name there; PLACE: see ``Published``
    curves: {SERIES: [CELL, ...]}  lines of a figure of score against history length, User-LLM's first (optional)
    claims: [...]          what the papers say about these cells; see ``Claim``
    notes: [...]           where the protocol differs from the papers'

A setting is looked for in this order: base, the scale's, the cell's, the cell's at this scale.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from userllm.errors import UserError
from userllm.experiments.paper import paper_figure, paper_tables
from userllm.overrides import override, read_yaml

SCALES = ("smoke", "cpu", "gpu")

_PLACE_KEYS = ("path", "folder")
"""Of ``data``: where the files are on one machine says nothing about a cell."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a system of a cell."""

    cell: str
    system: str = "user_llm"
    """A system of the cell's metrics: user_llm, encoder (its own ranking of the catalogue), majority, ..."""


@dataclass(frozen=True)
class Claim:
    """What a paper says of two cells, and how ours decide it: by the interval of the paired difference."""

    text: str
    source: str
    """The papers' table."""
    task: str
    metric: str
    a: Side
    b: Side
    kind: Literal["above", "within"] = "above"
    """above: a - b lies wholly above 0; within: it lies wholly above ``-margin``."""
    margin: float = 0.0

    @property
    def sources(self) -> list[str]:
        """The tables of ``source`` one by one: "v1 T12, T13" is v1 T12 and v1 T13."""
        version, *_ = self.source.split(" ")
        names = (name.strip() for name in self.source.split(","))
        return [name if name.startswith(version) else f"{version} {name}" for name in names]


@dataclass(frozen=True)
class Published:
    """A figure of the papers that belongs beside a cell's.

    In YAML its place is "TASK", "TASK:SYSTEM" (a system other than user_llm), either with " METRIC" behind it where it
    is not the metric shown first; "prompt_tokens" instead of a task: tokens the language model reads.
    """

    task: str
    system: str
    metric: str | None
    table: str
    row: str
    column: str

    @classmethod
    def read(cls, place: str, figure: Sequence[str]) -> Published:
        """Raises ValueError for a place or a figure of another form."""
        asked, *metric = place.split()
        task, *system = asked.split(":")
        table, row, column = figure
        if len(system) > 1 or len(metric) > 1:
            raise ValueError(f"paper: {place!r} is not TASK[:SYSTEM] [METRIC]")
        known = metric[0] if metric else None
        return cls(task, system[0] if system else "user_llm", known, table, row, column)


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    name: str
    label: str
    group: str
    settings: tuple[str, ...] = ()
    at: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further settings by scale: costs differ by a hundred times, so a dear cell may answer for fewer users."""
    published: tuple[Published, ...] = ()
    """The papers' figures of this cell."""


@dataclass(frozen=True)
class Scale:
    """How large the experiment is run."""

    settings: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Experiment:
    """See the module."""

    name: str
    title: str
    question: str
    base: Mapping[str, Any]
    scales: Mapping[str, Scale]
    reference: str
    cells: Mapping[str, Cell]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]
    curves: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Cells that make one line of a figure of score against history length."""
    redoes: tuple[str, ...] = ()
    """Tables of paper.yaml."""
    called: str = ""
    """What the command line names it by: its name, or its file."""

    def settings(self, cell: str, scale: str, seed: int, extra: Sequence[str] = ()) -> dict[str, Any]:
        """The run configuration of a cell, as plain values; ``extra`` settings come last."""
        chosen, size = self.cell(cell), self.scale(scale)
        if problem := _set_elsewhere(extra):
            raise UserError(f"--set: {problem}")
        settings = copy.deepcopy(dict(self.base)) | {"seed": seed}
        for text in (*size.settings, *chosen.settings, *chosen.at.get(scale, ()), *extra):
            override(settings, text)
        return settings

    def cell(self, name: str) -> Cell:
        """Raises UserError for an unknown name."""
        if name not in self.cells:
            raise UserError(f"{self.name} has no cell {name!r}; it has {', '.join(self.cells)}")
        return self.cells[name]

    def scale(self, name: str) -> Scale:
        """Raises UserError for an unknown name."""
        if name not in self.scales:
            raise UserError(f"{self.name} has no scale {name!r}; it has {', '.join(self.scales)}")
        return self.scales[name]


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Hash of what was asked for, 12 hex digits. Defaults and the places of files on one machine are not in it."""
    said = {key: value for key, value in settings.items() if key not in ("name", "threads")}
    if isinstance(said.get("data"), Mapping):
        said["data"] = {key: value for key, value in said["data"].items() if key not in _PLACE_KEYS}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def experiment_names() -> list[str]:
    """The experiments that come with userllm."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml") if path.stem != "paper")


def load_experiment(name: str) -> Experiment:
    """An experiment by name, or from a YAML file of one's own. Raises UserError for an unknown or malformed one."""
    file = Path(name) if _is_file(name) else Path(__file__).parent / f"{name}.yaml"
    if name == "paper" or not file.is_file():
        raise UserError(
            f"no experiment {name!r}; there are {', '.join(experiment_names())}, or give a YAML file"
        )
    return _load(file, file.stat().st_mtime_ns)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


@cache
def _load(file: Path, _changed: int) -> Experiment:
    """Experiments take cells from one another, so a file is asked for many times."""
    try:
        return _experiment(file, read_yaml(file, "experiment"))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file}: not an experiment: {reason}") from error
    except RecursionError as error:
        raise UserError(f"{file}: is like itself, by way of the experiments it names") from error


def _experiment(file: Path, told: Any) -> Experiment:
    _only(told, {one.name for one in fields(Experiment)} - {"name", "called"} | {"like"}, "the file")
    here = file.parent

    def other(name: str) -> Experiment:
        return load_experiment(str(here / name) if _is_file(name) else name)

    like = other(told["like"]) if "like" in told else None
    if like is not None and "base" in told:
        raise ValueError(f"base: it is that of {told['like']}; leave out like, or base")
    scales = {} if like is None else dict(like.scales)
    for scale, size in told.get("scales", {}).items():
        where = f"scales.{scale}"
        _scale_known(scale, where)
        _only(size, {"settings", "seeds"}, where)
        settings = _settings(size["settings"], where, "settings")
        scales[scale] = Scale(settings, _seeds(size.get("seeds", [0]), where))
    if not isinstance(told["cells"], dict) or not all(isinstance(name, str) for name in told["cells"]):
        raise ValueError("cells: names are texts; put numbers into quotes")
    experiment = Experiment(
        name=file.stem,
        called=file.stem if here == Path(__file__).parent else str(file),
        title=str(told["title"]),
        question=str(told["question"]),
        base=told["base"] if like is None else like.base,
        scales=scales,
        reference=told["reference"],
        cells={name: _cell(name, cell, other) for name, cell in told["cells"].items()},
        claims=tuple(_claim(one, number) for number, one in enumerate(told.get("claims", []))),
        curves={
            series: _texts(names, f"curves.{series}") for series, names in told.get("curves", {}).items()
        },
        redoes=_texts(told.get("redoes", []), "redoes"),
        notes=(*_texts(told.get("notes", []), "notes"), *(() if like is None else like.notes)),
    )
    named = [experiment.reference, *(side.cell for claim in experiment.claims for side in (claim.a, claim.b))]
    for cell in (*named, *(cell for line in experiment.curves.values() for cell in line)):
        experiment.cell(cell)
    if unknown := [table for table in experiment.redoes if table not in paper_tables()]:
        raise ValueError(f"redoes: no table {unknown[0]!r}; there are {', '.join(paper_tables())}")
    tasks = {**experiment.base.get("tasks", {}), "gates": {}, "prompt_tokens": {}}
    for number, claim in enumerate(experiment.claims):
        if claim.task not in tasks:
            raise ValueError(f"claims[{number}]: no task {claim.task!r}; base has {', '.join(tasks)}")
    return experiment


def _only(told: Any, known: Collection[str], where: str) -> None:
    """Raises ValueError for a key that would be ignored."""
    if not isinstance(told, dict):
        raise ValueError(f"{where}: is no table of keys and values")
    if unknown := [key for key in told if key not in known]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _texts(told: Any, where: str) -> tuple[str, ...]:
    if not isinstance(told, list) or not all(isinstance(one, str) for one in told):
        raise ValueError(f"{where}: give a list of texts; put one that holds a colon into quotes")
    return tuple(told)


def _seeds(told: Any, where: str) -> tuple[int, ...]:
    if not isinstance(told, list) or not all(type(one) is int for one in told):
        raise ValueError(f"{where}.seeds: give a list of whole numbers")
    return tuple(told)


def _scale_known(scale: str, where: str) -> None:
    if scale not in SCALES:
        raise ValueError(f"{where}: no such scale; there are {', '.join(SCALES)}")


def _cell(name: str, told: dict[str, Any] | str, other: Callable[[str], Experiment]) -> Cell:
    if isinstance(told, str):
        return other(told).cell(name)
    where = f"cells.{name}"
    _only(told, ("label", "group", "settings", "at", "paper"), where)
    settings, at = _settings(told.get("settings", []), where, "settings"), {}
    for scale, texts in told.get("at", {}).items():
        _scale_known(scale, f"{where}.at.{scale}")
        at[scale] = _settings(texts, where, f"at.{scale}")
    published = tuple(Published.read(place, figure) for place, figure in told.get("paper", {}).items())
    for one in published:
        try:
            paper_figure(one.table, one.row, one.column)
        except UserError as error:
            raise ValueError(f"{where}.paper: {error}") from error
    return Cell(name, str(told["label"]), str(told["group"]), settings, at, published)


def _settings(told: Any, where: str, key: str) -> tuple[str, ...]:
    texts = _texts(told, f"{where}.{key}")
    if problem := _set_elsewhere(texts):
        raise ValueError(f"{where}: {problem}")
    return texts


def _set_elsewhere(settings: Sequence[str]) -> str | None:
    """What is wrong with settings that the runner sets by itself; None where there is none of them."""
    for key in (text.partition("=")[0] for text in settings):
        if key in ("seed", "name"):
            return f"{key} is not set here; seeds are given by --seeds, or in scales.SCALE.seeds"
    return None


def _claim(told: dict[str, Any], number: int) -> Claim:
    where = f"claims[{number}]"
    _only(told, {one.name for one in fields(Claim)}, where)
    if (kind := told.get("kind", "above")) not in ("above", "within"):
        raise ValueError(f"{where}: kind is {kind!r}; give above or within")
    if not isinstance(told.get("margin", 0.0), int | float):
        raise ValueError(f"{where}: margin is {told['margin']!r}; give a number")
    sides = {side: Side(*str(told[side]).split(":")) for side in ("a", "b")}
    texts = {key: str(told[key]) for key in ("text", "source", "task", "metric")}
    return Claim(**{**told, **texts, **sides})
