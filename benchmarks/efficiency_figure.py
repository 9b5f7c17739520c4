"""The figure of ``efficiency.json``: cost against the length of the history.

python benchmarks/efficiency_figure.py docs/results/benchmarks/efficiency.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from userllm.experiments.efficiency import LENGTH_WAYS
from userllm.report.figures import STYLE

LINES = {
    "text_prompt": "s-",
    "soft_prompt": "D-",
    "cross_attention": "o-",
    "perceiver": "^-",
    "tokens_kept": "o--",
    "keys_values_kept": "v--",
}


def draw(result: dict[str, Any], file: Path) -> None:
    """Six panels: tokens, first token, each further one, training step, FLOPs, memory."""
    panels: dict[str, Any] = {
        "LM tokens": lambda c: c["lm_tokens"],
        "first token, CPU s": lambda c: c["cpu_s"]["first_token"],
        "each further token, CPU s": lambda c: c["cpu_s"]["per_token"],
        "training step, CPU s": lambda c: c["cpu_s"].get("training_step"),
        "GFLOP to the first token": lambda c: c["flops"]["first_token"] / 1e9,
        "peak memory, answering, MiB": lambda c: c["peak_mib"]["answer"],
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 6.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 3).flat
        for axis, (title, value) in zip(axes, panels.items(), strict=True):
            for name, (label, colour) in LENGTH_WAYS.items():
                points = [(int(n), value(cell)) for n, cell in result["cells"][name].items()]
                points = [(n, y) for n, y in points if y is not None and y > 0]
                if points:
                    axis.plot(
                        *zip(*points, strict=True), LINES[name], color=colour, label=label, markersize=5
                    )
            axis.set(xscale="log", yscale="log")
            axis.set_title(title, fontsize=12, loc="left")
            axis.set_xticks(result["lengths"], [str(n) for n in result["lengths"]])
            axis.minorticks_off()
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axis.set_xlabel("events of the history")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        partial = file.with_name(f".{file.name}.partial")
        figure.savefig(partial, format="png", dpi=110)
        partial.replace(file)


if __name__ == "__main__":
    given = Path(sys.argv[1])
    draw(json.loads(given.read_text()), given.with_suffix(".png"))
