"""What User-LLM and Text Prompt cost, from the benchmarks' result files: a section of the report.

Reads text_prompt.json as benchmarks/bench_text_prompt.py writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from userllm.errors import UserError
from userllm.experiments.figures import plain_log_ticks
from userllm.experiments.page import NOTHING, Notes, Part, Picture, Section, Table
from userllm.report.figures import STYLE

FILE = "text_prompt.json"
WAYS = {
    "user_llm_enc": "User-LLM, LM frozen",
    "user_llm_lora": "User-LLM, LoRA",
    "text_prompt_lora": "Text Prompt, LoRA",
}
_COLOURS = {"train": "#1f5fa8", "answer": "#d9a13b"}
_DOES = {"train": "training", "answer": "answering"}


def efficiency_section(benchmarks: Path) -> Section:
    """Tables and figure of the results in a folder; says so where there are none.

    Raises UserError for a file that is not what the benchmark writes.
    """
    file = benchmarks / FILE
    section = Section("efficiency", "What it costs beside Text Prompt", "", [])
    if not file.is_file():
        section.about = f"Not measured: there is no {FILE} under {benchmarks}."
        return section
    try:
        told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        section.about = (
            f"{told['events']} events, batches of {told['users']}, {told['lm']}; the same examples in one run. Encoder "
            f"and fusion are inside User-LLM's figures. Commit {told['commit'][:12]}, {told['date']}, "
            f'{told["hardware"]}. The papers\' "FLOPs reduction" is the ratio of tokens alone.'
        )
        section.parts = _parts(told)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not what the benchmark writes ({type(error).__name__}: {error})") from error
    return section


def _parts(told: dict[str, Any]) -> list[Part]:
    table = Table(
        "Text Prompt against User-LLM, measured",
        "Tokens the LM reads, FLOPs by torch's counter, examples a second (median of repeated runs).",
        [
            "",
            "LM tokens",
            "FLOPs, training",
            "FLOPs, answering",
            "examples/s, training",
            "examples/s, answering",
        ],
    )
    for way, called in WAYS.items():
        flops, speed = told["flops_per_example"][way], told["median_examples_per_s"]
        table.rows.append(
            [
                called,
                f"{told['lm_tokens'][way]:,.0f}",
                *(f"{flops[part]:.2e}" for part in _DOES),
                *(f"{speed[part][way]:.2f}" for part in _DOES),
            ]
        )
    times = Table(
        "Times less than Text Prompt",
        "Speed: median of the runs, lowest and highest beside it.",
        ["", "LM tokens", *(f"{what}, {does}" for does in _DOES.values() for what in ("FLOPs", "time"))],
    )
    read = told["lm_tokens"]
    for way in ("user_llm_enc", "user_llm_lora"):
        row = [WAYS[way], f"{read['text_prompt_lora'] / read[way]:.1f}"]
        for part in _DOES:
            speed = told["speed_ratio"][part].get(way)
            row.append(f"{told['flops_ratio'][part][way]:.1f}")
            row.append(
                NOTHING
                if speed is None
                else f"{speed['median']:.1f} [{speed['min']:.1f}, {speed['max']:.1f}]"
            )
        times.rows.append(row)
    caption = "How many times less than Text Prompt's: LM tokens, FLOPs and time (logarithmic)."
    return [Picture("efficiency", caption, _figure(told)), table, times, Notes([_PAPER])]


_PAPER = (
    'v1 T3: 700, 1,350 and 2,500 tokens against 32 at 50, 100 and 200 events, a "FLOPs reduction" of 21.9, 42.2 and '
    "78.1: exactly the ratio of the tokens, which leaves out encoder, Perceiver and cross-attention."
)


def _figure(told: dict[str, Any]) -> Figure:
    read = told["lm_tokens"]
    style: dict[Any, Any] = STYLE | {"axes.grid.axis": "x"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        names, values, colours = [], [], []
        for way in ("user_llm_enc", "user_llm_lora"):
            names.append(f"{WAYS[way]}: tokens")
            values.append(read["text_prompt_lora"] / read[way])
            colours.append("#9aa1ab")
            for part, does in _DOES.items():
                names += [f"FLOPs, {does}", f"time, {does}"]
                values += [told["flops_ratio"][part][way], told["speed_ratio"][part][way]["median"]]
                colours += [_COLOURS[part]] * 2
        bars = axes.barh(range(len(names)), values, color=colours)
        axes.bar_label(bars, [f" {value:.0f}" for value in values])
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
        axes.set_xlim(right=max(values) * 2)
        axes.set_xlabel("times less than Text Prompt")
    return figure
