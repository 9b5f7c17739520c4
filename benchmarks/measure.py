"""What the benchmarks share: rounds that alternate between two ways of doing one thing, and a result file.

Machines are shared and noisy, so only ratios within one run are quoted: each round times both ways, one right after the
other, and the median of the rounds' ratios counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from userllm.pipeline import commit, hardware, software


def argument_parser(doc: str | None, out: str = "docs/results/benchmarks") -> argparse.ArgumentParser:
    """The arguments every script on a configuration takes; a script adds its own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/movielens-1m.yaml"))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("overrides", nargs="*", help="a.b=c overrides of the configuration")
    return parser


def alternate(
    ways: dict[str, Callable[[], float]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Runs every way once per round, after one round of warm-up. A way returns how many units of work it did; the
    result is units per second by way and round. clock: ``time.process_time`` for CPU seconds, which other work on the
    machine does not lengthen."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = clock()
            units = way()
            rate = units / (clock() - began)
            if number:
                rates[name].append(rate)
            print(f"  round {number} {name}: {rate:.2f}/s" + ("" if number else " (warm-up)"), flush=True)
    return rates


def ratio(rates: dict[str, list[float]], a: str, b: str) -> dict[str, float]:
    """Rate of ``a`` over rate of ``b``: median, smallest and largest over the rounds."""
    ratios = [x / y for x, y in zip(rates[a], rates[b], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def flop_counter() -> FlopCounterMode:
    """Torch's counter of FLOPs, which by itself sees no attention on a CPU. Attention counts in full, masked or not."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def attention_backward(_grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        # scores anew, and the gradients of the scores, queries, keys and values: five products to the forward's two
        return 5 * sdpa_flop_count(q, k, v) // 2

    return FlopCounterMode(display=False, custom_mapping={forward: attention, backward: attention_backward})


def write_result(name: str, result: dict[str, Any], out: Path) -> None:
    """Adds command-independent facts and writes ``out``/NAME.json, atomically."""
    result = {
        "benchmark": name,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "software": software(),
    } | result
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", result)
    print(json.dumps(result, indent=1))


def write_json(file: Path, result: dict[str, Any]) -> None:
    """Writes a result file, atomically."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, file)
