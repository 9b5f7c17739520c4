"""An experiment's cells as tables beside the papers' figures: Markdown, and one HTML page that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from userllm.errors import UserError
from userllm.experiments.cells import CellStore, FinishedCell
from userllm.experiments.comparison import (
    LOG_LIKELIHOOD,
    WEIGHTED_F1,
    Decided,
    Measured,
    decide,
    difference,
    mean,
    per_user,
    ratio,
)
from userllm.experiments.definition import Cell, Experiment, settings_hash
from userllm.experiments.figures import length_figure, prompt_tokens, rows_figure
from userllm.experiments.paper import paper_figure, paper_tables
from userllm.report.figures import data_uri, save_png
from userllm.report.html import page_template
from userllm.report.markdown import escape

METRICS = {"next_item": "recall@10", "favorite_genre": "recall@1", "genre_preference": WEIGHTED_F1}
"""The metric shown first, by task; any other task's is recall@1."""
TASKS = {
    "next_item": "Next item",
    "favorite_genre": "Favourite genre",
    "genre_preference": "Genre preference",
}


@dataclass
class Table:
    """A table as texts; the first column is a row's name."""

    title: str
    about: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)


def write_experiment_report(
    experiment: Experiment,
    scale: str,
    out: Path,
    seeds: Sequence[int] | None = None,
    extra: Sequence[str] = (),
) -> Path:
    """Write OUT/<experiment>-<scale>.md and .html from the stored cells; returns the page.

    Raises UserError where no cell of the experiment is stored.
    """
    store = CellStore(out)
    cells: dict[str, list[FinishedCell]] = {}
    for name in experiment.cells:
        for seed in seeds or experiment.scale(scale).seeds:
            found = store.find(settings_hash(experiment.settings(name, scale, seed, extra)))
            if found is not None:
                cells.setdefault(name, []).append(found)
    if not cells:
        raise UserError(
            f"{store.folder}: no cell of {experiment.name} at scale {scale}; run them first "
            f"(userllm experiments run {experiment.name} --scale {scale})"
        )
    decided = [decide(claim, cells) for claim in experiment.claims]
    facts = _facts(experiment, scale, cells)
    tables = [
        _verdicts(decided),
        *(_results(experiment, task, cells) for task in _tasks(cells)),
        _costs(experiment, cells),
        *_papers(experiment),
    ]
    page = out / f"{experiment.name}-{scale}.html"
    figures = _figures(experiment, cells)
    (out / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        save_png(figure, out / "figures" / f"{page.stem}-{name}.png")
    images = {name: data_uri(figure) for name, figure in figures.items()}
    shown = {
        "experiment": experiment,
        "scale": scale,
        "facts": facts,
        "tables": tables,
        "images": images,
        "captions": {name: _caption(name) for name in figures},
    }
    page.write_text(page_template("experiments").render(**shown), encoding="utf-8")
    page.with_suffix(".md").write_text(
        _markdown(experiment, scale, facts, tables, list(figures)), encoding="utf-8"
    )
    return page


def _figures(experiment: Experiment, cells: dict[str, list[FinishedCell]]) -> dict[str, Figure]:
    figures = {
        task: rows_figure(experiment, cells, task, METRICS.get(task, "recall@1")) for task in _tasks(cells)
    }
    first = next(iter(experiment.base["tasks"]))
    lengths = length_figure(experiment, cells, first, METRICS.get(first, "recall@1"))
    return figures | ({} if lengths is None else {"lengths": lengths})


def _caption(name: str) -> str:
    if name == "lengths":
        return "Score against the history's length, and against what the language model reads (the papers' Fig. 3)."
    return f"{TASKS.get(name, name)}: every row with its 95 % interval, and its difference to the reference in nats."


def _tasks(cells: dict[str, list[FinishedCell]]) -> list[str]:
    return list(
        dict.fromkeys(task for some in cells.values() for cell in some for task in cell.metrics["tasks"])
    )


def _facts(experiment: Experiment, scale: str, cells: dict[str, list[FinishedCell]]) -> list[tuple[str, str]]:
    """What was run, in words."""
    every = [cell for some in cells.values() for cell in some]

    def several(values: list[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    missing = [name for name in experiment.cells if name not in cells]
    return [
        ("Scale", scale),
        (
            "Cells",
            f"{len(cells)} of {len(experiment.cells)}"
            + (f"; not run: {', '.join(missing)}" if missing else ""),
        ),
        ("Seeds", ", ".join(str(seed) for seed in sorted({cell.seed for cell in every}))),
        ("Data", several([_data(cell.metrics) for cell in every])),
        ("Language model", several([_lm(cell.metrics) for cell in every])),
        ("Hardware", several([cell.told["hardware"] for cell in every])),
        ("Commit", several([cell.told["commit"] for cell in every])),
        ("Date", several([cell.told["date"] for cell in every])),
    ]


def _data(metrics: dict[str, Any]) -> str:
    data, split = metrics["dataset"], metrics["split"]
    return f"{data['name']}, {data['users']:,} users, {data['events']:,} events, {split['kind']}, {split['part']}"


def _lm(metrics: dict[str, Any]) -> str:
    return f"{metrics['lm']['name']}, {metrics['lm']['parameters']:,} parameters"


def _verdicts(decided: Sequence[Decided]) -> Table:
    table = Table(
        "What the papers claim",
        "Confirmed: the whole 95 % interval of the paired difference lies on the claim's side (where none differs at "
        "all, an interval of 3 / n about 0). The difference in nats "
        "(log-likelihood of the true answer) stands beside it and decides nothing.",
        ["Claim", "Source", "Task, metric", "a", "b", "a - b", "users", "a - b, nats", "Verdict"],
    )
    for one in decided:
        claim = one.claim
        verdict: str = one.verdict
        if one.verdict == "not confirmed" and one.difference is not None and one.difference.estimate.high < 0:
            verdict += ": the other way round" if claim.kind == "above" else ": it loses"
        table.rows.append(
            [
                claim.text,
                claim.source,
                f"{TASKS.get(claim.task, claim.task)}, {claim.metric}",
                _value(one.a),
                _value(one.b),
                _gain(one.difference),
                str(one.difference.n) if one.difference else "–",
                _gain(one.nats),
                verdict,
            ]
        )
    return table


def _results(experiment: Experiment, task: str, cells: dict[str, list[FinishedCell]]) -> Table:
    metric = METRICS.get(task, "recall@1")
    reference = cells.get(experiment.reference, [])
    table = Table(
        TASKS.get(task, task),
        f"{metric} with its 95 % interval; differences to the reference and shares of what the row's own encoder "
        "reaches by itself, both on the same users.",
        [
            "Row",
            "users",
            metric,
            "to the reference",
            "nats to the reference",
            "pairs",
            "its encoder alone",
            "of its encoder's",
            "paper",
        ],
    )
    base = {name: per_user(reference, task, "user_llm", name) for name in (metric, LOG_LIKELIHOOD)}
    for group, chosen in _grouped(experiment, cells):
        for cell in chosen:
            own = {name: per_user(cells[cell.name], task, "user_llm", name) for name in base}
            measured = mean(own[metric])
            is_reference = cell.name == experiment.reference
            against = None if is_reference else difference(own[metric], base[metric])
            nats = None if is_reference else difference(own[LOG_LIKELIHOOD], base[LOG_LIKELIHOOD])
            alone = per_user(cells[cell.name], task, "encoder", metric)
            table.rows.append(
                [
                    f"{group}: {cell.label}",
                    str(measured.n) if measured else "–",
                    _value(measured),
                    _gain(against),
                    _gain(nats),
                    str(against.n) if against else "–",
                    _value(mean(alone)),
                    _value(ratio(own[metric], alone)),
                    _paper(cell, task),
                ]
            )
    return table


def _costs(experiment: Experiment, cells: dict[str, list[FinishedCell]]) -> Table:
    table = Table(
        "What it cost",
        "Means over seeds. Seconds of CPU time of each stage, all threads together (on an accelerator, of the host); "
        "examples seen in stage 2; perplexity of a general English text read by the base LM, by the trained LM without "
        "a user, and with one.",
        [
            "Row", "trainable", "examples", "steps", "stage 1, s", "stage 2, s", "evaluation, s", "LM tokens a prompt",
            "peak memory, MB", "perplexity",
        ],
    )  # fmt: skip
    for group, chosen in _grouped(experiment, cells):
        for cell in chosen:
            seen = [one.metrics for one in cells[cell.name]]
            kept = [m["knowledge"] for m in seen if m["knowledge"] is not None]  # a T5 continues no texts
            perplexity = " / ".join(
                f"{_mean([knows[reader]['perplexity'] for knows in kept]):,.1f}"
                for reader in ("base", "without_user", "with_users")
                if kept
            )
            table.rows.append(
                [
                    f"{group}: {cell.label}",
                    f"{_mean([sum(m['trainable'].values()) for m in seen]):,.0f}",
                    f"{_mean([m['training']['examples'] for m in seen]):,.0f}",
                    f"{_mean([m['training']['steps'] for m in seen]):,.0f}",
                    *(
                        f"{_mean([m['cpu_s'][stage] for m in seen]):,.0f}"
                        for stage in ("pretrain", "contextualize", "evaluate")
                    ),
                    f"{_mean([prompt_tokens(one) for one in cells[cell.name]]):,.0f}",
                    f"{_mean([m['peak_rss_mb'] for m in seen]):,.0f}",
                    perplexity or "–",
                ]
            )
    return table


def _papers(experiment: Experiment) -> list[Table]:
    """The papers' tables that the cells or claims name."""
    names = {place[0] for cell in experiment.cells.values() for place in cell.paper.values()}
    tables = []
    for name, paper in paper_tables().items():
        if name in names:
            about = f"{paper.title} ({paper.unit}). As published: other data, other language model, other protocol."
            table = Table(f"Paper, {name}", about, ["", *paper.columns])
            table.rows = [
                [row, *("–" if v is None else f"{v:g}" for v in values)] for row, values in paper.rows.items()
            ]
            tables.append(table)
    return tables


def _grouped(experiment: Experiment, cells: dict[str, list[FinishedCell]]) -> list[tuple[str, list[Cell]]]:
    """The finished cells by group, in the experiment's order."""
    groups: dict[str, list[Cell]] = {}
    for name in cells:
        cell = experiment.cell(name)
        groups.setdefault(cell.group, []).append(cell)
    return list(groups.items())


def _paper(cell: Cell, task: str) -> str:
    if task not in cell.paper:
        return "–"
    table, row, column = cell.paper[task]
    figure = paper_figure(table, row, column)
    return "–" if figure is None else f"{figure:g} ({table}, {row})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _value(measured: Measured | None) -> str:
    if measured is None:
        return "–"
    e = measured.estimate
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


def _gain(measured: Measured | None) -> str:
    if measured is None:
        return "–"
    e = measured.estimate
    return f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"


def _markdown(
    experiment: Experiment,
    scale: str,
    facts: list[tuple[str, str]],
    tables: Sequence[Table],
    figures: Sequence[str],
) -> str:
    parts = [f"# {escape(experiment.title)}", escape(experiment.question)]
    parts.append("\n".join(f"- {escape(name)}: {escape(value)}" for name, value in facts))
    parts += [
        f"![{escape(_caption(name))}](figures/{experiment.name}-{scale}-{name}.png)" for name in figures
    ]
    for table in tables:
        lines = [table.columns, ["---"] * len(table.columns), *table.rows]
        parts += [
            f"## {escape(table.title)}",
            escape(table.about),
            "\n".join(
                "| " + " | ".join(escape(cell) if cell != "---" else cell for cell in line) + " |"
                for line in lines
            ),
        ]
    parts += [
        "## How this differs from the papers",
        "\n".join(f"- {escape(note)}" for note in experiment.notes),
    ]
    parts.append(
        f"Written by `userllm experiments report {experiment.name} --scale {scale}` from the files in cells/."
    )
    return "\n\n".join(part for part in parts if part) + "\n"
