"""An experiment's figures: its rows with their intervals, score against history length (the papers' Fig. 3), gates.

Sized for a telephone's width; wider screens show them no larger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from userllm.experiments.cells import FinishedCell
from userllm.experiments.comparison import LOG_LIKELIHOOD, Measured, difference, incomparable, mean, per_user
from userllm.experiments.definition import Experiment
from userllm.report.figures import INK, STYLE
from userllm.report.wording import METRICS

_COLOURS = ("#1f5fa8", "#d9a13b", "#2f8f83", "#b58bc4", "#9aa1ab", "#a4483f")
_WIDTH = 5.4
_NOT_FUSED = "#e4e5e8"


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
        if name == experiment.reference or incomparable(task, cells[name], reference)
        else difference(per_user(cells[name], task, "user_llm", LOG_LIKELIHOOD), base)
        for name in names
    ]
    style: dict[Any, Any] = STYLE | {"axes.grid.axis": "x"}
    with matplotlib.rc_context(style):
        figure = _figure(1.2 + 0.32 * len(names))
        left, right = figure.subplots(1, 2, sharey=True)
        _intervals(left, scores)
        _intervals(right, gains)
        right.axvline(0, color=INK, linewidth=0.8)
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        left.set_xlabel(METRICS.get(metric, metric))
        right.set_xlabel("nats to\nthe reference")
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
        figure = _figure(6.4 + 0.3 * ((len(curves) + 1) // 2))
        by_events, by_tokens = figure.subplots(2, 1, sharey=True)
        methods = list(dict.fromkeys(series.split(",")[0] for series in curves))
        for series, done in curves.items():  # a colour for each method, dashed where the LM is tuned
            colour = _COLOURS[methods.index(series.split(",")[0]) % len(_COLOURS)]
            scores = [mean(per_user(one, task, "user_llm", metric)) for one in done]
            for axis, place in ((by_events, events_shown), (by_tokens, prompt_tokens)):
                points = [
                    (x, s.estimate)
                    for one, s in zip(done, scores, strict=True)
                    if s and (x := place(one[0])) is not None
                ]
                x = [events for events, _ in points]
                style = "o--" if "tuned" in series else "o-"
                axis.plot(x, [e.value for _, e in points], style, color=colour, label=series)
                axis.vlines(
                    x, [e.low for _, e in points], [e.high for _, e in points], color=colour, alpha=0.5
                )
        lengths = sorted({events_shown(one[0]) for done in curves.values() for one in done})
        if lengths[-1] >= 10 * lengths[0]:
            by_events.set_xscale("log")
            by_events.xaxis.set_minor_locator(NullLocator())
        by_events.set_xticks(lengths, [str(length) for length in lengths])
        by_events.set_xlabel("events of the history")
        by_tokens.set_xlabel("tokens the language model reads before its answer")
        by_tokens.set_xscale("log")
        plain_log_ticks(by_tokens.xaxis)
        for axis in (by_events, by_tokens):
            axis.set_ylabel(METRICS.get(metric, metric))
            axis.set_ylim(bottom=0)
        handles, labels = by_events.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=10)
    return figure


def gate_figure(cells: Mapping[str, Sequence[FinishedCell]]) -> Figure | None:
    """Every row's gates by LM layer, as colours; None where no cell has any."""
    found = {name: gates(some) for name, some in cells.items()}
    found = {name: values for name, values in found.items() if values}
    if not found:
        return None
    layers = range(max(max(values) for values in found.values()) + 1)
    shown = np.array([[values.get(layer, np.nan) for layer in layers] for values in found.values()])
    style: dict[Any, Any] = STYLE | {"axes.grid": False}
    with matplotlib.rc_context(style):
        figure = _figure(1.6 + 0.3 * len(found))
        axes = figure.add_subplot()
        axes.set_facecolor(_NOT_FUSED)
        image = axes.imshow(shown, cmap="Blues", vmin=0, aspect="auto")
        axes.set_yticks(range(len(found)), list(found))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("LM layer")
        figure.colorbar(image, label="|tanh(alpha)|", location="bottom", shrink=0.7, aspect=40)
    return figure


def gates(cells: Sequence[FinishedCell]) -> dict[int, float]:
    """|tanh(alpha)| by LM layer, mean over seeds; empty for cells without gates.

    The sign says nothing: the block's output projection can turn it round.
    """
    seen: dict[int, list[float]] = {}
    for cell in cells:
        if cell.told["config"]["fusion"]["cross_attention"]["gate"] == "none":
            continue  # always open: their 1 is no outcome
        for gate in cell.metrics["gates"]:
            seen.setdefault(int(gate["layer"]), []).append(abs(float(gate["value"])))
    return {layer: sum(values) / len(values) for layer, values in sorted(seen.items())}


def events_shown(cell: FinishedCell) -> int:
    """Latest events that the language model is told of, in whichever way: embeddings know what the encoder saw."""
    fusion: dict[str, Any] = cell.told["config"]["fusion"]
    embedded = 0 if fusion["kind"] == "none" else int(cell.told["config"]["encoder"]["max_length"])
    return max(embedded, int(fusion["text"]["events"]))


def prompt_tokens(cell: FinishedCell) -> float | None:
    """Tokens the language model reads before its answer, mean over the users of the first task that tells."""
    for entry in cell.metrics["tasks"].values():
        if "prompt_tokens" in entry["user_llm"]:
            return float(entry["user_llm"]["prompt_tokens"]["value"])
    return None


def plain_log_ticks(axis: Any) -> None:
    """Numbers as they are written, at 1, 3, 10, 30, ...: the house's style prints no formulas such as powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _intervals(axis: Any, measured: Sequence[Measured | None]) -> None:
    for place, one in enumerate(measured):
        if one is not None:
            axis.hlines(place, one.estimate.low, one.estimate.high, color=_COLOURS[0], linewidth=2)
            axis.plot(one.estimate.value, place, "o", color=_COLOURS[0], markersize=5)
