"""A run's figures. They hold no titles: those stay in the page, which escapes and wraps them."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from userllm.report.record import Example, RunRecord, Task
from userllm.report.wording import METRICS, STAGES, SYSTEMS, label
from userllm.whole_file import whole

COLOURS = {
    "user_llm": "#1f5fa8",
    "user_llm_shuffled": "#9fc0e6",
    "no_user": "#9aa1ab",
    "encoder": "#2f8f83",
    "popularity": "#d9a13b",
    "majority": "#d9a13b",
    "exact": "#ccd2d9",
    "user_llm_sampled": "#5b8fc9",
    "user_llm_shuffled_sampled": "#cfe0f3",
    "no_user_sampled": "#ccd2d9",
}
_OTHER = "#b58bc4"
_LINES = ["#1f5fa8", "#d9a13b", "#2f8f83", "#b58bc4", "#9aa1ab"]
_BOOKKEEPING = {"step", "epoch", "learning_rate", "grad_norm", "eval_runtime", "eval_samples_per_second",
                "eval_steps_per_second", "num_input_tokens_seen"}  # fmt: skip
"""What the Trainer logs besides losses and metrics."""

TRAINING = ("loss", "parts", "validation", "measures")
"""Kinds of training curves, in the order of the page."""
INK, _MUTED, _LINE = "#24292f", "#59636e", "#d8dee4"
_SIZE = (5.8, 3.5)
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 12,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#eceff2",
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "userllm",
    "svg.fonttype": "path",
}


def draw(run: RunRecord) -> dict[str, Figure]:
    """The figures of a run by name; a figure whose numbers were not recorded is not among them."""
    figures: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE):
        for task in run.tasks:
            if task.recalls:
                figures[f"recall-{task.name}"] = bars(task, task.recalls)
            if task.rouges:
                figures[f"rouge-{task.name}"] = bars(task, task.rouges, without="target")
        for stage, history in run.history.items():
            figures |= {f"{kind}-{stage}": figure for kind, figure in training_curves(history).items()}
        if run.gates:
            figures["gates"] = gate_bars(run.gates)
        example = attended_example(run)
        if example:
            figures["attention"] = attention_bars(example)
    return figures


def attended_example(run: RunRecord) -> Example | None:
    """The first shown user for whom attention was recorded."""
    return next((example for example in run.examples if example.attended), None)


def bars(task: Task, metrics: list[str], without: str | None = None) -> Figure:
    """Metrics by system, with 95 % intervals, but for the system ``without``."""
    figure, axes = _axes()
    systems = [
        system
        for system, table in task.systems.items()
        if system != without and any(metric in table for metric in metrics)
    ]
    width = 0.84 / len(systems)
    for i, system in enumerate(systems):
        table = task.systems[system]
        here = [j for j, metric in enumerate(metrics) if metric in table]
        estimates = [table[metrics[j]] for j in here]
        values = np.array([e.value for e in estimates])
        # In a tiny, skewed sample an interval need not hold the mean, and no error bar points backwards.
        errors = np.maximum([values - [e.low for e in estimates], [e.high for e in estimates] - values], 0)
        places = np.array(here) + (i - (len(systems) - 1) / 2) * width
        axes.bar(
            places, values, width * 0.92, label=label(system, SYSTEMS), color=COLOURS.get(system, _OTHER)
        )
        axes.errorbar(places, values, errors, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
    axes.set_xticks(range(len(metrics)), [METRICS.get(metric, metric) for metric in metrics])
    axes.set_ylim(bottom=0)
    figure.set_figheight(4.3)
    figure.legend(loc="outside lower center", ncols=2, handlelength=1.2, columnspacing=1.2)
    return figure


def training_curves(history: list[dict[str, Any]]) -> dict[str, Figure]:
    """What a stage logged, by kind of curve: loss, its parts, validation's rankings and other measures."""
    logged = [entry for entry in history if "step" in entry]
    trained = [
        {k: v for k, v in entry.items() if k not in _BOOKKEEPING} for entry in logged if "loss" in entry
    ]
    parts = dict.fromkeys(name for entry in trained for name in entry if name != "loss")
    validated = dict.fromkeys(name for entry in logged for name in entry if name.startswith("eval_"))
    measures = [name for name in validated if name not in _BOOKKEEPING and name != "eval_loss"]
    rankings = [name for name in measures if "@" in name or name.endswith("mrr")]
    others = [name for name in measures if name not in rankings]

    def figure_of(names: dict[str, str], ylabel: str, **kind: bool) -> Figure:
        return curves({told: _series(logged, name) for name, told in names.items()}, ylabel, **kind)

    figures: dict[str, Figure] = {}
    losses = {
        name: told
        for name, told in (("loss", "training"), ("eval_loss", "validation"))
        if _logs(logged, name)
    }
    if losses:
        figures["loss"] = figure_of(losses, "loss (nats)")
    if len(parts) > 1:
        figures["parts"] = figure_of({name: name.replace("_", " ") for name in parts}, "loss (nats)")
    if rankings:
        figures["validation"] = figure_of(
            {n: n.removeprefix("eval_") for n in rankings}, "validation", from_zero=True
        )
    if others:
        figures["measures"] = figure_of(
            {n: n.removeprefix("eval_").replace("_", " ") for n in others}, "validation"
        )
    return figures


def curves(
    series: dict[str, tuple[np.ndarray, np.ndarray]], ylabel: str, *, from_zero: bool = False
) -> Figure:
    """Lines of (steps, values) by label; one with many points is drawn thin, under its moving average."""
    figure, axes = _axes()
    for i, (name, (steps, values)) in enumerate(series.items()):
        colour = _LINES[i % len(_LINES)]
        window = len(values) // 25
        if window > 1:
            axes.plot(steps, values, color=colour, alpha=0.35, linewidth=1)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            axes.plot(steps[window - 1 :], smooth, color=colour, label=name)
        else:
            axes.plot(steps, values, color=colour, marker="o", markersize=4, label=name)
    axes.set_xlim(left=0)
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def gate_bars(gates: list[tuple[int, float]]) -> Figure:
    """The gate of each fused LM layer after training; at 0 the layer would not see the user."""
    figure, axes = _axes()
    axes.bar(
        [str(layer) for layer, _ in gates], [value for _, value in gates], 0.7, color=COLOURS["user_llm"]
    )
    axes.axhline(0, color=_MUTED, linewidth=0.8)
    axes.set_xlabel("LM layer")
    axes.set_ylabel("gate")
    return figure


def attention_bars(example: Example) -> Figure:
    """Share of attention by past event, oldest left, against an even spread."""
    figure, axes = _axes()
    weights = [math.nan if event.attention is None else event.attention for event in example.history]
    ago = np.arange(len(weights), 0, -1)
    axes.bar(ago, weights, 0.85, color=COLOURS["user_llm"])
    even = 1 / sum(event.attention is not None for event in example.history)
    axes.axhline(even, color=COLOURS["popularity"], linewidth=1.2, linestyle="--", label="even spread")
    axes.set_xlim(len(weights) + 0.6, 0.4)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
    axes.set_xlabel("events ago")
    axes.set_ylabel("share of attention")
    figure.legend(loc="outside upper left")
    return figure


def data_uri(figure: Figure) -> str:
    """The figure as an inline SVG image, the same bytes each time."""
    with matplotlib.rc_context(STYLE):
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def save_png(figure: Figure, path: Path) -> None:
    """The figure as a PNG file of 144 dots per inch."""
    with matplotlib.rc_context(STYLE), whole(path) as partial:
        figure.savefig(partial, dpi=144, format="png")


def caption(name: str) -> str:
    """What a figure shows, in one sentence; also its text for those who cannot see it."""
    kind, _, of = name.partition("-")
    stage = label(of, STAGES)
    return {
        "recall": "Recall by system; lines are 95 % intervals.",
        "rouge": "ROUGE by system; lines are 95 % intervals.",
        "loss": f"{stage}: loss by step; where a line is smoothed, the thin one is as logged.",
        "parts": f"{stage}: the parts of the loss, likewise.",
        "validation": f"{stage}: ranking metrics of validation users by step.",
        "measures": f"{stage}: other measures of validation users by step.",
        "gates": "Gate of each fused LM layer after training; at 0 the layer does not see the user.",
        "attention": "Attention to each past event, oldest left; the dashed line is an even spread.",
    }[kind]


def _axes() -> tuple[Figure, Any]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _logs(history: Iterable[dict[str, Any]], name: str) -> bool:
    return any(name in entry for entry in history)


def _series(history: Iterable[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(entry["step"], entry[name]) for entry in history if name in entry]
    steps, values = zip(*points, strict=True)
    return np.array(steps), np.array(values, dtype=float)
