"""An experiment's report, and the report of all experiments together, from the stored cells."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from userllm.errors import UserError
from userllm.experiments import tables
from userllm.experiments.cells import CellStore, FinishedCell
from userllm.experiments.comparison import Decided
from userllm.experiments.definition import Experiment
from userllm.experiments.efficiency import efficiency_section
from userllm.experiments.figures import gate_figure, length_figure, rows_figure
from userllm.experiments.page import NOTHING, Notes, Page, Part, Picture, Section, Table, Texts, write_page
from userllm.experiments.paper import PaperTable, paper_tables
from userllm.experiments.stored import Stored
from userllm.report.record import printable
from userllm.report.wording import METRICS, SYSTEMS, TASKS, label

SHOWN_USERS = 3
"""Users whose texts stand side by side; the first ones, not selected."""


_SCALE = {
    "smoke": "smoke: generated data and a tiny language model with random weights. It shows that everything runs; its "
    "numbers and verdicts mean nothing",
    "cpu": "cpu",
    "gpu": "gpu",
}
_READING = Section("reading", "How to read the tables", "", [Notes(tables.READING)])


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
    stored = Stored(experiment, scale, store, seeds, extra)
    if not stored.cells:
        raise UserError(
            f"{store.folder}: no cell of {experiment.name} at scale {scale}; run them first "
            f"(userllm experiments run {experiment.called} --scale {scale})"
        )
    missing = [name for name in experiment.cells if name not in stored.cells]
    counted = f"{len(stored.cells)} of {len(experiment.cells)}"
    facts = [
        ("Scale", _SCALE[scale]),
        ("Cells", counted + (f"; not run: {', '.join(missing)}" if missing else "")),
        ("Seeds", _seeds(stored)),
        *_facts([cell for cells in stored.cells.values() for cell in cells]),
    ]
    named = {place.table for cell in experiment.cells.values() for place in cell.published}
    page = Page(
        experiment.title,
        _question(experiment),
        facts,
        [
            Section(
                "results",
                "Results",
                "",
                [*_figures(stored), tables.verdicts(stored.decided), *_tables(stored), *_texts(stored)],
            ),
            _published("As published by the papers", [t for n, t in paper_tables().items() if n in named]),
            Section("notes", "How this differs from the papers", "", [Notes(experiment.notes)]),
            _READING,
        ],
        _command(shlex.quote(experiment.called), scale, seeds, extra),
    )
    file = out / f"{experiment.name}-{scale}.html"
    write_page(page, file)
    return file


def write_whole_report(
    experiments: Sequence[Experiment],
    scale: str,
    out: Path,
    seeds: Sequence[int] | None = None,
    extra: Sequence[str] = (),
    benchmarks: Path = Path("docs/results/benchmarks"),
) -> Path:
    """Write OUT/report-<scale>.md and .html, all experiments on one page; returns the page.

    benchmarks: folder of the efficiency measurements. Raises UserError where no cell at all is stored.
    """
    store = CellStore(out)
    every = [Stored(one, scale, store, seeds, extra) for one in experiments if scale in one.scales]
    cells = {cell.file: cell for one in every for some in one.cells.values() for cell in some}
    if not cells:
        raise UserError(
            f"{store.folder}: no cell at scale {scale}; run some first (userllm experiments run NAME --scale {scale})"
        )
    whole = {one.hash_of(name, seed) for one in every for name in one.experiment.cells for seed in one.seeds}
    facts = [
        ("Scale", _SCALE[scale]),
        ("Cells", f"{len(cells)} of {len(whole)}, some of them in several experiments"),
        ("Seeds", ", ".join(str(seed) for seed in sorted({cell.seed for cell in cells.values()}))),
        *_facts(list(cells.values())),
    ]
    sections = [
        _overview(every),
        *(_of_experiment(one) for one in every),
        efficiency_section(benchmarks),
        _coverage(every),
        _published("As published by the papers", list(paper_tables().values())),
        Section(
            "notes",
            "How this differs from the papers",
            "",
            [Notes(list(dict.fromkeys(note for one in every for note in one.experiment.notes)))],
        ),
        _READING,
    ]
    page = Page(
        "The papers' comparisons, redone",
        "User-LLM (arXiv 2402.13598) and UEM (arXiv 2401.04858): every table and figure that could be redone, "
        "the papers' figures beside ours, and a verdict per claim. Unofficial; other data, another language model.",
        facts,
        sections,
        _command("", scale, seeds, extra),
    )
    file = out / f"report-{scale}.html"
    write_page(page, file)
    return file


def _command(name: str, scale: str, seeds: Sequence[int] | None, extra: Sequence[str]) -> str:
    """What writes the page again, less the folder (``--out``)."""
    parts = ["userllm experiments report", name, f"--scale {scale}"]
    parts += ["--seeds " + " ".join(map(str, seeds))] if seeds else []
    parts += ["--set " + shlex.join(extra)] if extra else []
    return " ".join(part for part in parts if part)


def _overview(every: Sequence[Stored]) -> Section:
    """One row per claim; one that several experiments make is shown once, as the smallest of them words it."""
    made: dict[tuple[object, ...], list[tuple[Stored, Decided]]] = {}
    for one in sorted(every, key=lambda one: len(one.experiment.cells)):
        for claim in one.decided:
            made.setdefault(one.asks(claim), []).append((one, claim))
    table = Table(
        "",
        "a - b: the paired difference with its 95 % interval. Both sides' figures stand in the experiments' sections.",
        ["Claim", "Verdict", "a - b", "p", "seeds on its side", "users", "Source", "Experiments"],
    )
    counts: Counter[str] = Counter()
    for one in every:
        for claim in one.decided:
            makers = made[one.asks(claim)]
            if makers[0][0] is not one:
                continue
            counts[claim.verdict] += 1
            between = claim.difference
            sources = dict.fromkeys(source for _, same in makers for source in same.claim.sources)
            table.rows.append(
                [
                    tables.claim_of(claim),
                    tables.verdict_of(claim),
                    tables.gain(between),
                    tables.p_value(between),
                    tables.agreement(claim),
                    str(between.n) if between else NOTHING,
                    ", ".join(sources),
                    ", ".join(maker.experiment.name for maker, _ in makers),
                ]
            )
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("confirmed", "not confirmed", "not run"))
    return Section(
        "overview", "Verdicts", f"{counts.total()} claims: {said}.", [table.without_empty_columns()]
    )


def _of_experiment(one: Stored) -> Section:
    experiment = one.experiment
    section = Section(experiment.name, experiment.title, _question(experiment), [])
    if not one.cells:
        section.parts.append(Notes(["No cell of this experiment is stored."]))
        return section
    if missing := [name for name in experiment.cells if name not in one.cells]:
        section.about += f" Cells not run: {', '.join(missing)}."
    section.parts += [
        *_figures(one, f"{experiment.name}-"),
        tables.verdicts(one.decided),
        *_tables(one),
        *_texts(one),
    ]
    return section


def _question(experiment: Experiment) -> str:
    redone = ", ".join(experiment.redoes)
    return f"{experiment.question} ({redone})" if redone else experiment.question


def _tables(one: Stored) -> list[Table]:
    experiment, cells = one.experiment, one.cells
    return [
        *(tables.results(experiment, task, cells) for task in one.tasks),
        *(
            table
            for table in (tables.tokens(experiment, cells), tables.gate_table(experiment, cells))
            if table is not None
        ),
        tables.costs(experiment, cells),
    ]


def _figures(one: Stored, before: str = "") -> list[Picture]:
    """before: what the figures' names begin with."""
    experiment, cells = one.experiment, one.cells
    found = []
    first = one.tasks[0]
    lengths = length_figure(experiment, cells, first, tables.SHOWN[tables.kind_of(first, cells)][0])
    if lengths is not None:
        figure = " (the papers' Fig. 3)" if "v2 Fig. 3" in experiment.redoes else ""
        caption = f"Score against the history's length, and against what the language model reads{figure}."
        found.append(Picture(f"{before}lengths", caption, lengths))
    for task in one.tasks:
        metric = tables.SHOWN[tables.kind_of(task, cells)][0]
        caption = (
            f"{label(task, TASKS)}: every row's {METRICS.get(metric, metric)} with its 95 % interval, and its "
            "difference to the reference in nats."
        )
        found.append(Picture(f"{before}{task}", caption, rows_figure(experiment, cells, task, metric)))
    gated = gate_figure(cells)
    if gated is not None:
        caption = (
            "Size of the gates after training by LM layer, mean over seeds; grey: nothing is inserted there."
        )
        found.append(Picture(f"{before}gates", caption, gated))
    return found


def _texts(one: Stored) -> list[Texts]:
    """What the reference's systems and the other cells wrote about the same first users (v1 T15)."""
    reference = one.cells.get(one.experiment.reference)
    shown = []
    for task, records in (reference[0].texts if reference else {}).items():
        for record in records[:SHOWN_USERS]:
            texts = [("What the user wrote", printable(record["target"]))]
            texts += [
                (label(system, SYSTEMS), printable(text))
                for system, text in record.items()
                if system not in ("user", "prompt", "target")
            ]
            for name, cells in one.cells.items():
                others = [o for o in cells[0].texts.get(task, []) if o["user"] == record["user"]]
                if name != one.experiment.reference and others:
                    texts.append((one.experiment.cell(name).label, printable(others[0]["user_llm"])))
            title = f"{label(task, TASKS)}, user {record['user']}"
            shown.append(Texts(title, printable(record["prompt"]), texts))
    return shown


def _coverage(every: Sequence[Stored]) -> Section:
    """Which table of the papers is redone where."""
    table = Table("", "", ["Paper", "What", "Redone in"])
    for name, paper in paper_tables().items():
        redone = [one for one in every if name in one.experiment.redoes and one.cells]
        where = [
            one.experiment.name + (" (in part)" if len(one.cells) < len(one.experiment.cells) else "")
            for one in redone
        ]
        reason = f"not redone: {paper.not_redone}" if paper.not_redone else "not redone"
        table.rows.append([name, paper.title, ", ".join(where) or reason])
    about = "Every table and figure of the papers with numbers to compare, and the experiments beside it."
    return Section("coverage", "What is redone where", about, [table])


def _published(title: str, chosen: Sequence[PaperTable]) -> Section:
    """The papers' tables."""
    about = "As published: other data, other language model, other protocol."
    parts: list[Part] = []
    for paper in chosen:
        if not paper.rows:
            continue  # texts, or a figure whose values are not at hand
        rows = [
            [row, *(NOTHING if v is None else f"{v:g}" for v in values)] for row, values in paper.rows.items()
        ]
        parts.append(
            Table(
                f"Paper, {paper.name}",
                f"{paper.title} ({paper.unit}).",
                ["", *paper.columns],
                rows,
                folded=True,
            )
        )
    return Section("papers", title, about, parts)


def _seeds(stored: Stored) -> str:
    """Which seeds every row has, and which rows have more."""
    of_rows = {name: [cell.seed for cell in cells] for name, cells in stored.cells.items()}
    common = sorted(set.intersection(*(set(seeds) for seeds in of_rows.values())))
    more: dict[str, list[str]] = {}
    for name, seeds in of_rows.items():
        if other := [str(seed) for seed in seeds if seed not in common]:
            more.setdefault(", ".join(other), []).append(name)
    parts = [", ".join(map(str, common))] if common else []
    return "; ".join([*parts, *(f"{seeds} of {', '.join(names)} alone" for seeds, names in more.items())])


def _facts(cells: Sequence[FinishedCell]) -> list[tuple[str, str]]:
    """What was run, in words: one line for each machine, commit, data set and language model."""

    def lines(name: str, values: Sequence[str]) -> list[tuple[str, str]]:
        return [
            (name, f"{value} ({count} of {len(cells)} cells)" if count < len(cells) else value)
            for value, count in Counter(values).items()
        ]

    dates = sorted({cell.told["date"] for cell in cells})
    return [
        *lines("Data", [_data(cell) for cell in cells]),
        *lines("Language model", [_lm(cell) for cell in cells]),
        *lines("Hardware", [_hardware(cell) for cell in cells]),
        *lines("Software", [cell.metrics["software"] for cell in cells if "software" in cell.metrics]),
        *lines("Commit", [cell.told["commit"] for cell in cells]),
        ("Date", dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"),
    ]


def _hardware(cell: FinishedCell) -> str:
    first, second = cell.pace
    if first == second:
        paced = "" if first == 1 else f", given {first:g} times the seconds"
    else:
        paced = f", given {first:g} times the seconds of stage 1 and {second:g} times those of stage 2"
    return f"{cell.told['hardware']}{paced}"


def _data(cell: FinishedCell) -> str:
    data, split = cell.metrics["dataset"], cell.metrics["split"]
    return (
        f"{data['name']}, {data['users']:,} users, {data['events']:,} events, {split['kind']}, {split['part']}; split "
        f"fingerprint {split['fingerprint'][:12]}; ties: {split['tie_rule']}"
    )


def _lm(cell: FinishedCell) -> str:
    lm = cell.metrics["lm"]
    return f"{lm['name']}, {lm['parameters']:,} parameters"
