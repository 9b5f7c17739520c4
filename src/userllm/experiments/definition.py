"""What an experiment is: a grid of ordinary run configurations that differ from one base in stated settings.

Each experiment is a YAML file in this folder, or anyone's own:

    title, question        one line each
    redoes: [TABLE, ...]   the papers' tables that stand beside it (optional)
    like: NAME             take base, scales and notes from another experiment (optional)
    base: {...}            a run configuration
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from userllm.errors import UserError
from userllm.overrides import override

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

    def settings(self, cell: str, scale: str, seed: int, extra: Sequence[str] = ()) -> dict[str, Any]:
        """The run configuration of a cell, as plain values; ``extra`` settings come last."""
        chosen, size = self.cell(cell), self.scale(scale)
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
    file = Path(name) if name.endswith((".yaml", ".yml")) else Path(__file__).parent / f"{name}.yaml"
    if file.stem == "paper" or not file.is_file():
        raise UserError(
            f"no experiment {name!r}; there are {', '.join(experiment_names())}, or give a YAML file"
        )
    return _load(file, file.stat().st_mtime_ns)


@cache
def _load(file: Path, _changed: int) -> Experiment:
    """Experiments take cells from one another, so a file is asked for many times."""
    try:
        told = yaml.safe_load(file.read_text(encoding="utf-8"))
        return _experiment(file.stem, told)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: not an experiment ({type(error).__name__}: {error})") from error


def _experiment(name: str, told: dict[str, Any]) -> Experiment:
    known = {one.name for one in fields(Experiment)} - {"name"} | {"like"}
    if unknown := set(told) - known:
        raise ValueError(f"unknown key {min(unknown)}")
    like = load_experiment(told["like"]) if "like" in told else None
    base = told["base"] if like is None else like.base
    scales = {} if like is None else dict(like.scales)
    for scale, size in told.get("scales", {}).items():
        if scale not in SCALES:
            raise ValueError(f"unknown scale {scale}")
        scales[scale] = Scale(tuple(size["settings"]), tuple(size.get("seeds", (0,))))
    cells = {cell: _cell(cell, one) for cell, one in told["cells"].items()}
    experiment = Experiment(
        name=name,
        title=told["title"],
        question=told["question"],
        base=base,
        scales=scales,
        reference=told["reference"],
        cells=cells,
        claims=tuple(_claim(one) for one in told.get("claims", [])),
        curves={series: tuple(names) for series, names in told.get("curves", {}).items()},
        redoes=tuple(told.get("redoes", ())),
        notes=(*told.get("notes", []), *(() if like is None else like.notes)),
    )
    named = [experiment.reference, *(side.cell for claim in experiment.claims for side in (claim.a, claim.b))]
    for cell in (*named, *(cell for line in experiment.curves.values() for cell in line)):
        experiment.cell(cell)
    return experiment


def _cell(name: str, told: dict[str, Any] | str) -> Cell:
    if isinstance(told, str):
        return load_experiment(told).cell(name)
    return Cell(
        name=name,
        label=told["label"],
        group=told["group"],
        settings=tuple(told.get("settings", ())),
        at={scale: tuple(texts) for scale, texts in told.get("at", {}).items()},
        published=tuple(Published.read(place, figure) for place, figure in told.get("paper", {}).items()),
    )


def _claim(told: dict[str, Any]) -> Claim:
    sides = {side: Side(*str(told[side]).split(":")) for side in ("a", "b")}
    return Claim(**{**told, **sides})
