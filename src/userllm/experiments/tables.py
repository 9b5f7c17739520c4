"""An experiment's cells as tables: verdicts, results beside the papers' figures, tokens, gates, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from userllm.experiments.cells import FinishedCell
from userllm.experiments.comparison import (
    LOG_LIKELIHOOD,
    TRIVIAL,
    WEIGHTED_F1,
    Decided,
    Measured,
    difference,
    incomparable,
    mean,
    per_user,
    ratio,
)
from userllm.experiments.definition import Cell, Experiment
from userllm.experiments.figures import events_shown, gates, prompt_tokens
from userllm.experiments.page import NOTHING, Table
from userllm.experiments.paper import paper_figure
from userllm.report.wording import METRICS, SYSTEMS, TASKS, label

Cells = Mapping[str, Sequence[FinishedCell]]
"""The finished cells of an experiment by name, one per seed."""

SHOWN: dict[str, tuple[str, ...]] = {
    "next_item": ("recall@10", "recall@1", "recall@5", "ndcg@10"),
    "favorite_category": ("recall@1", "recall@5"),
    "review": ("rougeLsum", "rouge1", "rouge2", "words"),
    "genre_preference": (WEIGHTED_F1, "user_f1", "labels", "unknown_words"),
}
"""Metrics by kind of task; the first one decides the order of things."""

READING = (
    "A claim is confirmed where the whole 95 % interval of the paired difference lies on its side (where no user "
    "speaks against it, 3 / n is taken off: what was never seen may yet happen), where each seed's own difference lies "
    "there, too, and, if one side is to be above the other, where p is below .05. It is not confirmed otherwise, and "
    "not run where a cell is missing or no user was asked in both. It is the other way round, or a loses, by the same "
    "rule. a and b are of the users of the difference.",
    "To stay within a margin of a row that has learnt nothing is easy: where b is not above popularity or the majority "
    "class, on the same users and by the same rule, that stands behind the verdict.",
    "Differences are paired: the same users under the same seed. Intervals are bootstrap intervals over users, each "
    "user's seeds averaged first; they know nothing of trainings, for which the seeds stand beside them (lowest to "
    "highest). Where a cell asks a sample of the users, each seed asks its own sample.",
    "A weighted F1 is of all texts together, label by label, and no mean over users: its interval computes it anew for "
    "each resample of the users, a difference with both rows' texts of the same users; it has no p.",
    "p: two-sided, of no difference, by flipping the signs of the users' differences 1,999 times, so never below "
    ".0005. It is not corrected for the number of claims.",
    "Favourite genre and category are of the events that a row is shown: rows that are shown another number of events "
    "have other right answers, and are not set against each other.",
    "Nats: the difference in log-likelihood of the true answer. It shows effects that recall is too coarse for, and "
    "decides nothing.",
    "Its encoder alone: the encoder's own ranking after stage 1, without a language model; beside it the share of that "
    "which User-LLM reaches, where there was a stage 1.",
    "The papers' figures are of other data, another language model and another protocol; ROUGE they print times 100.",
)
"""What a reader has to know of the tables."""


def kind_of(task: str, cells: Cells) -> str:
    """What kind of task that is, as the cells' configurations say."""
    kinds = [
        told["kind"]
        for some in cells.values()
        for cell in some
        if (told := cell.told["config"]["tasks"].get(task)) is not None
    ]
    return str(kinds[0])


def verdict_of(one: Decided) -> str:
    """The verdict in words."""
    said: str = one.verdict
    if one.verdict == "not confirmed" and one.loses:
        said += ": the other way round" if one.claim.kind == "above" else ": it loses"
    if one.weak is not None:
        said += f" (b is not above {label(one.weak, SYSTEMS).lower()})"
    return said


def claim_of(one: Decided) -> str:
    """A claim with the task and the metric it is about, in words."""
    claim = one.claim
    return f"{claim.text}: {label(claim.task, TASKS).lower()}, {METRICS.get(claim.metric, claim.metric)}"


def verdicts(decided: Sequence[Decided]) -> Table:
    """The claims with both sides' figures."""
    table = Table(
        "What the papers claim",
        "",
        ["Claim", "Verdict", "a - b", "p", "seeds on its side", "users", "a", "b", "a - b, nats", "Source"],
    )
    for one in decided:
        between = one.difference
        table.rows.append(
            [
                claim_of(one),
                verdict_of(one),
                gain(between),
                p_value(between),
                agreement(one),
                str(between.n) if between else NOTHING,
                value(one.a),
                value(one.b),
                gain(one.nats),
                one.claim.source,
            ]
        )
    return table.without_empty_columns()


def results(experiment: Experiment, task: str, cells: Cells) -> Table:
    """Every row's metrics for one task, against the reference and beside the papers' figures.

    A row is a cell's User-LLM; other systems of a cell are rows where a claim or a published figure is about them.
    """
    metrics: tuple[str, ...] = SHOWN[kind_of(task, cells)]
    main, called = metrics[0], [METRICS.get(metric, metric) for metric in metrics]
    table = Table(
        label(task, TASKS),
        f"Means over users with their 95 % intervals; differences of {called[0]} and of nats to the reference.",
        ["Row", "users", called[0], "between seeds", "to the reference", "p", "nats to the reference", "pairs",
         "its encoder alone", "of its encoder's", *called[1:], "paper"],
    )  # fmt: skip
    reference = cells.get(experiment.reference, [])
    base = {name: per_user(reference, task, "user_llm", name) for name in (main, LOG_LIKELIHOOD)}
    for cell in in_groups(experiment, cells):
        alone = per_user(cells[cell.name], task, "encoder", main)
        pretrained = cells[cell.name][0].told["config"].get("pretrain") is not None
        for system in _systems(experiment, cell, task):
            own = {
                name: per_user(cells[cell.name], task, system, name) for name in (*metrics, LOG_LIKELIHOOD)
            }
            ours, measured = system == "user_llm", mean(own[main])
            if measured is None and not ours:
                continue  # cells of an older version, or without another user
            is_reference = ours and cell.name == experiment.reference
            alike = not is_reference and incomparable(task, cells[cell.name], reference) is None
            against = difference(own[main], base[main]) if alike else None
            nats = difference(own[LOG_LIKELIHOOD], base[LOG_LIKELIHOOD]) if alike else None
            table.rows.append(
                [
                    f"{cell.name}: {cell.label}" if ours else f"{cell.name} / {label(system, SYSTEMS)}",
                    str(measured.n) if measured else NOTHING,
                    value(measured),
                    spread(measured),
                    gain(against),
                    p_value(against),
                    gain(nats),
                    str(against.n) if against else NOTHING,
                    value(mean(alone)) if ours else NOTHING,
                    value(ratio(own[main], alone)) if ours and pretrained else NOTHING,
                    *(value(mean(own[metric])) for metric in metrics[1:]),
                    _published(cell, task, system),
                ]
            )
    return table.without_empty_columns()


def tokens(experiment: Experiment, cells: Cells) -> Table | None:
    """What the language model reads, by history length (v1 T3); None where the experiment has no curves."""
    done = {
        series: [cells[name] for name in names if name in cells]
        for series, names in experiment.curves.items()
    }
    if not any(done.values()):
        return None
    first = next(iter(done))
    about = (
        f"Before its answer, mean over users and seeds; how many times those of {first} at as many events."
    )
    if "v1 T3" in experiment.redoes:
        about += ' The papers\' ratios are also their "FLOPs reduction".'
    columns = ["Row", "events", "tokens", "times", "paper"]
    table = Table("Tokens the language model reads", about, columns)
    ours = {events_shown(cell[0]): _tokens(cell) for cell in done[first]}
    for series, some in done.items():
        for cell in some:
            name = next(name for name in experiment.curves[series] if cells.get(name) is cell)
            events, read = events_shown(cell[0]), _tokens(cell)
            base = ours.get(events)
            table.rows.append(
                [
                    series,
                    str(events),
                    NOTHING if read is None else f"{read:,.0f}",
                    NOTHING if read is None or not base else f"{read / base:,.1f}",
                    _published(experiment.cell(name), "prompt_tokens", "user_llm"),
                ]
            )
    return table.without_empty_columns()


def gate_table(experiment: Experiment, cells: Cells) -> Table | None:
    """The gates that training ended with; None where no cell has any."""
    table = Table(
        "Gates after training",
        "|tanh(alpha)| of the inserted cross-attention by LM layer, mean over seeds. It starts at 0, where the layer "
        "does not see the user.",
        ["Row", "fused layers", "lowest layer", "highest layer", "largest", "mean, lower half",
         "mean, upper half", "paper"],
        folded=True,
    )  # fmt: skip
    for cell in in_groups(experiment, cells):
        found = gates(cells[cell.name])
        if not found:
            continue
        layers = sorted(found)
        sizes = [found[layer] for layer in layers]
        middle = len(layers) // 2
        largest = max(layers, key=lambda layer: found[layer])
        table.rows.append(
            [
                f"{cell.name}: {cell.label}",
                str(len(layers)),
                f"{found[layers[0]]:.3f} ({layers[0]})",
                f"{found[layers[-1]]:.3f} ({layers[-1]})",
                f"{found[largest]:.3f} ({largest})",
                f"{average(sizes[:middle]):.3f}" if middle else NOTHING,
                f"{average(sizes[middle:]):.3f}",
                _published(cell, "gates", "user_llm"),
            ]
        )
    return table.without_empty_columns() if table.rows else None


def costs(experiment: Experiment, cells: Cells) -> Table:
    """What each cell took."""
    table = Table(
        "What it cost",
        "Means over seeds. Seconds of CPU time of each stage, all threads together (on an accelerator, of the host); "
        "examples drawn in stage 2, those without a right answer (an empty review) among them; perplexity of a general "
        "English text read by the base LM, by the trained LM without a user, and with one. Pace: seconds that a slower "
        "machine was given for one of the budget of stage 2, by seed where they differ.",
        [
            "Row", "trainable", "examples", "steps", "stage 1, s", "stage 2, s", "pace", "evaluation, s",
            "LM tokens a prompt", "peak memory, MB", "of the GPU, MB", "perplexity",
        ],
        folded=True,
    )  # fmt: skip
    for cell in in_groups(experiment, cells):
        seen = [one.metrics for one in cells[cell.name]]
        paces = [one.pace[1] for one in cells[cell.name]]
        read = _tokens(cells[cell.name])
        on_gpu = [m["peak_gpu_mb"] for m in seen if "peak_gpu_mb" in m]
        table.rows.append(
            [
                f"{cell.name}: {cell.label}",
                f"{average([sum(m['trainable'].values()) for m in seen]):,.0f}",
                f"{average([m['training']['examples'] for m in seen]):,.0f}",
                f"{average([m['training']['steps'] for m in seen]):,.0f}",
                _seconds(seen, "pretrain"),
                _seconds(seen, "contextualize"),
                NOTHING if set(paces) == {1.0} else ", ".join(f"{pace:g}" for pace in dict.fromkeys(paces)),
                _seconds(seen, "evaluate"),
                NOTHING if read is None else f"{read:,.0f}",
                f"{average([m['peak_rss_mb'] for m in seen]):,.0f}",
                f"{average(on_gpu):,.0f}" if on_gpu else NOTHING,
                _perplexity(seen),
            ]
        )
    return table.without_empty_columns()


def _seconds(seen: Sequence[Mapping[str, Any]], stage: str) -> str:
    return f"{average([metrics['cpu_s'][stage] for metrics in seen]):,.0f}"


def in_groups(experiment: Experiment, cells: Cells) -> list[Cell]:
    """The finished cells, those of a group together, in the experiment's order."""
    chosen = [experiment.cell(name) for name in cells]
    groups = list(dict.fromkeys(cell.group for cell in chosen))
    return sorted(chosen, key=lambda cell: groups.index(cell.group))


def value(measured: Measured | None) -> str:
    """``.000 [low, high]``."""
    if measured is None:
        return NOTHING
    e = measured.estimate
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


def gain(measured: Measured | None) -> str:
    """``+.000 [low, high]``."""
    if measured is None:
        return NOTHING
    e = measured.estimate
    return f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"


def p_value(measured: Measured | None) -> str:
    """A difference's p."""
    return NOTHING if measured is None or measured.p is None else f"{measured.p:.4f}"


def spread(measured: Measured | None) -> str:
    """The lowest and the highest seed's mean, where there are several."""
    if measured is None or len(measured.by_seed) < 2:
        return NOTHING
    seeds = measured.by_seed.values()
    return f"{min(seeds):.3f} to {max(seeds):.3f} ({len(seeds)})"


def agreement(one: Decided) -> str:
    """In how many of several seeds a difference lies on the claim's side, and how far apart they are."""
    if one.difference is None or len(one.difference.by_seed) < 2:
        return NOTHING
    seeds = one.difference.by_seed.values()
    return f"{one.seeds} of {len(seeds)} ({min(seeds):+.3f} to {max(seeds):+.3f})"


def average(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def _systems(experiment: Experiment, cell: Cell, task: str) -> list[str]:
    """User-LLM, and the other systems of a cell that claims or published figures are about; of the reference also what
    knows nothing of the user."""
    claimed = (
        side.system
        for claim in experiment.claims
        for side in (claim.a, claim.b)
        if claim.task == task and side.cell == cell.name
    )
    published = (place.system for place in cell.published if place.task == task)
    trivial = TRIVIAL if cell.name == experiment.reference else ()
    return list(dict.fromkeys(("user_llm", *claimed, *published, *trivial)))


def _published(cell: Cell, task: str, system: str) -> str:
    found = [
        f"{place.metric}: {figure:g} ({place.table})" if place.metric else f"{figure:g} ({place.table})"
        for place in cell.published
        if (place.task, place.system) == (task, system)
        and (figure := paper_figure(place.table, place.row, place.column)) is not None
    ]
    return "; ".join(found) or NOTHING


def _tokens(cells: Sequence[FinishedCell]) -> float | None:
    read = [tokens for cell in cells if (tokens := prompt_tokens(cell)) is not None]
    return average(read) if read else None


def _perplexity(seen: Sequence[dict[str, Any]]) -> str:
    if any(metrics["knowledge"] is None for metrics in seen):
        return NOTHING  # an encoder-decoder continues no text
    return " / ".join(
        f"{average([metrics['knowledge'][reader]['perplexity'] for metrics in seen]):,.1f}"
        for reader in ("base", "without_user", "with_users")
    )
