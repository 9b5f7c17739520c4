"""What User-LLM and Text Prompt cost, from the benchmarks' result files: a section of the report.

Reads efficiency.json (cost by length of the history, benchmarks/efficiency.py) and text_prompt.json (batches of
training and answering, benchmarks/bench_text_prompt.py), whichever are there. Measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from userllm.errors import UserError
from userllm.experiments.figures import plain_log_ticks
from userllm.experiments.page import NOTHING, Notes, Part, Picture, Section, Table
from userllm.report.figures import STYLE

BY_LENGTH, IN_BATCHES = "efficiency.json", "text_prompt.json"
TEXT_PROMPT = "text_prompt"
LENGTH_WAYS = {
    TEXT_PROMPT: ("Text Prompt", "#a4483f"),
    "soft_prompt": ("User-LLM, soft prompt", "#d9a13b"),
    "cross_attention": ("User-LLM, cross-attention", "#1f5fa8"),
    "perceiver": ("User-LLM, cross-attention behind a Perceiver", "#2f8f83"),
    "tokens_kept": ("User-LLM, user tokens kept", "#6f9fd8"),
    "keys_values_kept": ("User-LLM, keys and values kept", "#b58bc4"),
}
BATCH_WAYS = {
    "user_llm_enc": "User-LLM, LM frozen",
    "user_llm_lora": "User-LLM, LoRA",
    "text_prompt_lora": "Text Prompt, LoRA",
}
_DOES = {"train": "training", "answer": "answering"}
_PAPER = (
    'v1 T3: 700, 1,350 and 2,500 tokens against 32 at 50, 100 and 200 events, a "FLOPs reduction" of 21.9, 42.2 and '
    "78.1: exactly the ratio of the tokens, which leaves out encoder, Perceiver and cross-attention."
)

Measure = Callable[[dict[str, Any]], float | None]
"""A number of one way at one length; None where it was not measured."""
MEASURES: dict[str, tuple[Measure, str]] = {
    "LM tokens before the answer": (lambda cell: cell["lm_tokens"], ",.0f"),
    "first token, CPU s": (lambda cell: cell["cpu_s"].get("first_token"), ".3f"),
    "each further token, CPU s": (lambda cell: cell["cpu_s"].get("per_token"), ".4f"),
    "whole answer, CPU s": (lambda cell: cell["cpu_s"].get("answer"), ".3f"),
    "training step, CPU s": (lambda cell: cell["cpu_s"].get("training_step"), ".3f"),
    "FLOPs to the first token": (lambda cell: cell["flops"].get("first_token"), ".2e"),
    "FLOPs of a training step": (lambda cell: cell["flops"].get("training_step"), ".2e"),
    "peak memory of answering above the model's, MiB": (lambda cell: cell["peak_mib"].get("answer"), ",.0f"),
}
_DRAWN = ("LM tokens before the answer", "first token, CPU s", "FLOPs to the first token")


def efficiency_section(benchmarks: Path) -> Section:
    """Tables and figures of the results in a folder; says so where there are none.

    Raises UserError for a file that is not what its benchmark writes.
    """
    section = Section("efficiency", "What it costs beside Text Prompt", "", [])
    for name, read in ((BY_LENGTH, _by_length), (IN_BATCHES, _in_batches)):
        file = benchmarks / name
        if not file.is_file():
            continue
        try:
            section.parts += read(json.loads(file.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: not what the benchmark writes ({type(error).__name__}: {error})"
            ) from error
    if section.parts:
        section.parts.append(Notes([_PAPER]))
    else:
        section.about = f"Not measured: there is no {BY_LENGTH} or {IN_BATCHES} under {benchmarks}."
    return section


def _measured_by(told: dict[str, Any]) -> str:
    return f"Commit {told['commit'][:12]}, {told['date']}, {told['hardware']}; {told['lm']}."


def _by_length(told: dict[str, Any]) -> list[Part]:
    lengths, cells = [str(length) for length in told["lengths"]], told["cells"]
    columns = ["", *(f"{length} events" for length in lengths)]

    def row(name: str, number: Callable[[dict[str, Any], str], float | None], form: str) -> list[str]:
        values = [number(cells[name][n], n) if n in cells[name] else None for n in lengths]
        return [LENGTH_WAYS[name][0], *(NOTHING if v is None else f"{v:{form}}" for v in values)]

    def times(measure: Measure) -> Callable[[dict[str, Any], str], float | None]:
        def ratio(cell: dict[str, Any], length: str) -> float | None:
            ours, theirs = measure(cell), cells[TEXT_PROMPT].get(length)
            text = None if theirs is None else measure(theirs)
            return text / ours if ours and text else None

        return ratio

    parts: list[Part] = [
        Picture(
            "cost-by-length",
            "What an answer costs by length of the history (both axes logarithmic): tokens the LM reads, CPU seconds "
            "and FLOPs to the first token.",
            _length_figure(told),
        )
    ]
    done = [name for name in LENGTH_WAYS if name in cells]
    for called, (measure, _) in MEASURES.items():
        rows = [row(name, times(measure), ",.1f") for name in done if name != TEXT_PROMPT]
        about = f"Text Prompt's by each way's. One user, one process. {_measured_by(told)}"
        folded = called not in _DRAWN
        parts.append(Table(f"Times less than Text Prompt: {called}", about, columns, rows, folded))
    for called, (measure, form) in MEASURES.items():
        rows = [row(name, lambda cell, _, m=measure: m(cell), form) for name in done]
        parts.append(Table(called[0].upper() + called[1:], "", columns, rows, folded=True))
    formula = [row(name, _counted_by_formula, ".2f") for name in done]
    about = "FLOPs to the first token by torch's counter, by 2 x parameters x tokens."
    parts.append(Table("Counted against the formula", about, columns, formula, folded=True))
    return parts


def _counted_by_formula(cell: dict[str, Any], _: str) -> float | None:
    counted, formula = cell["flops"].get("first_token"), cell["formula"].get("first_token")
    return counted / formula if counted and formula else None


def _length_figure(told: dict[str, Any]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 8.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(_DRAWN), 1, sharex=True)
        for axis, called in zip(panels, _DRAWN, strict=True):
            for name, (label, colour) in LENGTH_WAYS.items():
                points = [
                    (int(length), value)
                    for length, cell in told["cells"].get(name, {}).items()
                    if (value := MEASURES[called][0](cell))
                ]
                axis.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, label=label)
            axis.set(xscale="log", yscale="log")
            axis.set_title(called, fontsize=11, loc="left")
            axis.set_xticks(told["lengths"], [str(length) for length in told["lengths"]])
            axis.minorticks_off()
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panels[-1].set_xlabel("events of the history")
        handles, labels = panels[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize=10)
    return figure


def _in_batches(told: dict[str, Any]) -> list[Part]:
    table = Table(
        f"Batches of {told['users']}, {told['events']} events",
        "Tokens the LM reads, FLOPs by torch's counter, examples a CPU second (median of repeated runs); encoder and "
        f"fusion are inside User-LLM's. {_measured_by(told)}",
        [
            "",
            "LM tokens",
            "FLOPs, training",
            "FLOPs, answering",
            "examples a CPU s, training",
            "examples a CPU s, answering",
        ],
    )
    for way, called in BATCH_WAYS.items():
        flops, speed = told["flops_per_example"][way], told["median_examples_per_cpu_s"]
        table.rows.append(
            [
                called,
                f"{told['lm_tokens'][way]:,.0f}",
                *(f"{flops[part]:.2e}" for part in _DOES),
                *(f"{speed[part][way]:.2f}" for part in _DOES),
            ]
        )
    times = Table(
        "Times less than Text Prompt, in batches",
        "CPU time: median of the runs, lowest and highest beside it.",
        ["", "LM tokens", *(f"{what}, {does}" for does in _DOES.values() for what in ("FLOPs", "time"))],
    )
    read = told["lm_tokens"]
    for way in ("user_llm_enc", "user_llm_lora"):
        row = [BATCH_WAYS[way], f"{read['text_prompt_lora'] / read[way]:.1f}"]
        for part in _DOES:
            speed = told["speed_ratio"][part][way]
            row.append(f"{told['flops_ratio'][part][way]:.1f}")
            row.append(f"{speed['median']:.1f} [{speed['min']:.1f}, {speed['max']:.1f}]")
        times.rows.append(row)
    caption = (
        f"Batches of {told['users']}, {told['events']} events: how many times less than Text Prompt's are LM tokens, "
        "FLOPs and time (logarithmic)."
    )
    return [Picture("cost-in-batches", caption, _batch_figure(told)), table, times]


def _batch_figure(told: dict[str, Any]) -> Figure:
    read = told["lm_tokens"]
    style: dict[Any, Any] = STYLE | {"axes.grid.axis": "x"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        names, values, colours = [], [], []
        for way in ("user_llm_enc", "user_llm_lora"):
            names.append(f"{BATCH_WAYS[way]}: tokens")
            values.append(read["text_prompt_lora"] / read[way])
            colours.append("#9aa1ab")
            for (part, does), colour in zip(_DOES.items(), ("#1f5fa8", "#d9a13b"), strict=True):
                names += [f"FLOPs, {does}", f"time, {does}"]
                values += [told["flops_ratio"][part][way], told["speed_ratio"][part][way]["median"]]
                colours += [colour] * 2
        bars = axes.barh(range(len(names)), values, color=colours)
        axes.bar_label(bars, [f" {value:.0f}" for value in values])
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
        axes.set_xlim(right=max(values) * 2)
        axes.set_xlabel("times less than Text Prompt")
    return figure
