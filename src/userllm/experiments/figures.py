"""An experiment's figures: its rows with their intervals, and score against history length (the papers' Fig. 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from userllm.experiments.cells import FinishedCell
from userllm.experiments.comparison import LOG_LIKELIHOOD, Measured, difference, mean, per_user
from userllm.experiments.definition import Experiment
from userllm.report.figures import INK, STYLE

_COLOURS = ("#1f5fa8", "#d9a13b", "#2f8f83", "#b58bc4", "#9aa1ab", "#a4483f")


def rows_figure(
    experiment: Experiment, cells: Mapping[str, Sequence[FinishedCell]], task: str, metric: str
) -> Figure:
    """Every row's metric, and its difference to the reference in nats on the same users, with 95 % intervals."""
    names = list(cells)
    reference = cells.get(experiment.reference, ())
    base = per_user(reference, task, "user_llm", LOG_LIKELIHOOD)
    scores = [mean(per_user(cells[name], task, "user_llm", metric)) for name in names]
    gains = [
        None
        if name == experiment.reference
        else difference(per_user(cells[name], task, "user_llm", LOG_LIKELIHOOD), base)
        for name in names
    ]
    style: dict[Any, Any] = STYLE | {"axes.grid.axis": "x"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 1.2 + 0.32 * len(names)), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        _intervals(left, scores)
        _intervals(right, gains)
        right.axvline(0, color=INK, linewidth=0.8)
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        left.set_xlabel(metric)
        right.set_xlabel("nats to the reference")
    return figure


def length_figure(
    experiment: Experiment, cells: Mapping[str, Sequence[FinishedCell]], task: str, metric: str
) -> Figure | None:
    """The metric against events of the history, and against tokens the LM reads; None without curves to draw."""
    curves = {
        series: done
        for series, names in experiment.curves.items()
        if (done := [cells[name] for name in names if name in cells])
    }
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        by_events, by_tokens = figure.subplots(1, 2, sharey=True)
        for colour, (series, done) in zip(_COLOURS * len(curves), curves.items(), strict=False):
            scores = [mean(per_user(one, task, "user_llm", metric)) for one in done]
            for axis, place in ((by_events, events_shown), (by_tokens, prompt_tokens)):
                points = [(place(one[0]), s.estimate) for one, s in zip(done, scores, strict=True) if s]
                axis.plot(
                    [x for x, _ in points], [e.value for _, e in points], "o-", color=colour, label=series
                )
                axis.vlines(
                    [x for x, _ in points],
                    [e.low for _, e in points],
                    [e.high for _, e in points],
                    color=colour,
                    alpha=0.5,
                )
        by_events.set_xlabel("events of the history")
        by_tokens.set_xlabel("tokens the LM reads before its answer")
        by_tokens.set_xscale("log")
        by_events.set_ylabel(metric)
        by_events.legend()
    return figure


def events_shown(cell: FinishedCell) -> int:
    """Latest events that the language model is told of, in whichever way: embeddings know what the encoder saw."""
    fusion: dict[str, Any] = cell.told["config"]["fusion"]
    embedded = 0 if fusion["kind"] == "none" else int(cell.told["config"]["encoder"]["max_length"])
    return max(embedded, int(fusion["text"]["events"]))


def prompt_tokens(cell: FinishedCell) -> float:
    """Tokens the language model reads before its answer, mean over the users of the first task."""
    first = next(iter(cell.metrics["tasks"].values()))
    return float(first["user_llm"]["prompt_tokens"]["value"])


def _intervals(axis: Any, measured: Sequence[Measured | None]) -> None:
    for place, one in enumerate(measured):
        if one is not None:
            axis.hlines(place, one.estimate.low, one.estimate.high, color=_COLOURS[0], linewidth=2)
            axis.plot(one.estimate.value, place, "o", color=_COLOURS[0], markersize=5)
