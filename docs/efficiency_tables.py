"""Tables of what knowing the user costs, for ``fill_results.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from userllm.experiments.efficiency import LENGTH_WAYS

Cell = dict[str, Any]
WAYS = {way: label for way, (label, _) in LENGTH_WAYS.items()}


def efficiency_rows(result: dict[str, Any]) -> list[str]:
    """A table per measure, a row per way, a column per length; then what became of the papers' ratio of tokens."""
    cells, lengths = result["cells"], [str(n) for n in result["lengths"]]
    measures: dict[str, tuple[Callable[[Cell], float | None], str]] = {
        "LM tokens before the answer": (lambda c: c["lm_tokens"], ",.0f"),
        "First token, CPU s": (lambda c: c["cpu_s"]["first_token"], ".3g"),
        "Each further token, CPU s": (lambda c: c["cpu_s"]["per_token"], ".3g"),
        f"Whole answer of {result['answer_tokens']} tokens, CPU s": (lambda c: c["cpu_s"]["answer"], ".3g"),
        "Training step on one example, CPU s": (lambda c: c["cpu_s"].get("training_step"), ".3g"),
        "GFLOP to the first token": (lambda c: c["flops"]["first_token"] / 1e9, ",.1f"),
        "Of these, 2ND": (lambda c: _share(c, "first_token"), ".0%"),
        "GFLOP of a training step": (lambda c: _giga(c["flops"].get("training_step")), ",.1f"),
        "GFLOP of a training step, LM's layers alone, from shapes": (
            lambda c: _giga(c["flops_from_shapes"].get("training_step")),
            ",.1f",
        ),
        "6ND, GFLOP": (lambda c: _giga(c["formula"].get("training_step")), ",.1f"),
        "Peak memory above the model's, answering, MiB": (lambda c: c["peak_mib"]["answer"], ",.0f"),
        "Peak memory above the model's, training, MiB": (
            lambda c: c["peak_mib"].get("training_step"),
            ",.0f",
        ),
    }
    lines = ["![cost by length of the history](results/benchmarks/efficiency.png)", ""]
    for name, (value, spec) in measures.items():
        lines += [f"| {name} | {' | '.join(lengths)} |", "|---|" + "---|" * len(lengths)]
        for way, label in WAYS.items():
            found = [value(cells[way][n]) for n in lengths]
            if any(one is not None for one in found):
                shown = ["–" if one is None else format(one, spec) for one in found]
                lines.append(f"| {label} | {' | '.join(shown)} |")
        lines.append("")
    return [*lines, *_verdict(result, "200" if "200" in lengths else lengths[-1])]


def _giga(flops: float | None) -> float | None:
    return None if flops is None else flops / 1e9


def _share(cell: Cell, what: str) -> float | None:
    """The formula's FLOPs over the counted ones."""
    return cell["formula"][what] / cell["flops"][what] if what in cell["flops"] else None


def _verdict(result: dict[str, Any], n: str) -> list[str]:
    """How much sooner, and how the ratio of FLOPs and that of tokens come apart."""
    at = {way: cells[n] for way, cells in result["cells"].items()}

    def over(way: str, clock: str, what: str) -> float:
        return at["text_prompt"][clock][what] / at[way][clock][what]

    text, mine = at["text_prompt"]["flops"], at["cross_attention"]["flops"]
    tokens = at["text_prompt"]["lm_tokens"] / at["cross_attention"]["lm_tokens"]
    flops = text["first_token"] / mine["first_token"]
    linear = at["text_prompt"]["formula"]["first_token"]
    squared = (text["lm"] - linear) / 1e9
    own, user = mine["lm"] / 1e9, mine["user"] / 1e9
    fusion = mine["first_token"] / 1e9 - own - user
    rounds = [
        n for cells in result["cells"].values() for cell in cells.values() for n in cell["rounds"].values()
    ]
    papers = {"50": 21.9, "100": 42.2, "200": 78.1}
    table = [
        "| Text Prompt over cross-attention | tokens | FLOPs to the first token | FLOPs, training | paper (v1 T3) |",
        "|---|---|---|---|---|",
    ]
    for length in map(str, result["lengths"]):
        long, short = result["cells"]["text_prompt"][length], result["cells"]["cross_attention"][length]
        ratios = [
            long["lm_tokens"] / short["lm_tokens"],
            long["flops"]["first_token"] / short["flops"]["first_token"],
        ]
        trained = long["flops"].get("training_step")
        shown = [f"{ratio:.1f}" for ratio in ratios]
        shown.append("–" if trained is None else f"{trained / short['flops']['training_step']:.1f}")
        table.append(f"| {length} events | {' | '.join(shown)} | {papers.get(length, '–')} |")
    sooner = over("tokens_kept", "cpu_s", "first_token")
    whole = over("tokens_kept", "cpu_s", "answer")
    return [
        f"With {n} events and user tokens kept the first token comes **{sooner:.0f} times sooner** than with Text "
        f"Prompt ({over('tokens_kept', 'wall_s', 'first_token'):.0f} times by the wall clock), the whole answer "
        f"{whole:.1f} times. With the history read anew the first token comes "
        f"{over('cross_attention', 'cpu_s', 'first_token'):.0f} times sooner.",
        "",
        *table,
        "",
        f"The papers' ratio, that of tokens, is {tokens:.1f} at {n} events; that of FLOPs to the first token is "
        f"{flops:.1f} ({flops / tokens - 1:+.0%}). Two things are left out of a ratio of tokens, and pull in opposite "
        f"directions. Text Prompt: beside 2ND, {linear / 1e9:,.0f} GFLOP, attention takes {squared:,.0f}, since it "
        f"grows with the square of the text. User-LLM: beside the language model's own {own:.1f} GFLOP encoder and "
        f"user tokens take {user:.1f}, the cross-attention {fusion:.1f}. In training the answer's tokens are read, "
        "too, which makes the two prompts less unlike.",
        "",
        f"N: {result['parameters_without_embeddings'] / 1e6:.1f}M weights without embeddings; D: tokens read. "
        "Attention is counted as torch counts it, in full although half of it is masked. Where no training step "
        f"stands, none was run (more than {result['train_tokens']:,} tokens). Of a history that the language model's "
        f"window cannot hold the latest events count. Medians of {min(rounds)} to {max(rounds)} rounds: a call that "
        f"takes long is in fewer. LM: {result['lm_weights']}; encoder and fusion: random weights.",
    ]


def update_rows(result: dict[str, Any]) -> list[str]:
    """A row per encoder."""
    rows = [
        "| encoder | update, CPU ms | anew, CPU ms | update / anew | largest difference of an embedding | state, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        ratio = row["update_over_recompute"]
        rows.append(
            f"| {name} | {row['update_ms']:.1f} | {row['recompute_ms']:.0f} | **{ratio['median']:.1%}** "
            f"({ratio['min']:.1%} to {ratio['max']:.1%}) | {row['largest_difference']:.0e} | {row['state_mb']:.1f} |"
        )
    return [
        *rows,
        "",
        f"{result['added']} events added one by one to {result['events']:,}; the difference is that after all of them. "
        "Random weights.",
    ]
