"""Training on histories as text with freed memory kept in the process, as every run does, against handing it back.

Steps of FLAN-T5-small on 16 histories of 512 tokens, forward and backward. Each way runs in a process of its own, in
turns; CPU seconds count, those in the kernel (which clears the pages) among them.

    python benchmarks/bench_freed_memory.py
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

HISTORIES, TOKENS, TARGET, STEPS = 16, 512, 12, 3
WAYS = ("kept", "handed_back")


def steps(keep: bool) -> dict[str, float]:
    """CPU seconds a step in user mode and in the kernel, after one step of warm-up, and the peak memory in MiB."""
    import torch

    from userllm.freed_memory import keep_freed_memory
    from userllm.language_models.pretrained import LanguageModelConfig, load

    if keep and not keep_freed_memory():
        raise SystemExit("the C library is not glibc: nothing to compare")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lm, _, _ = load(LanguageModelConfig(name="flan-t5-small", products="bfloat16"))
    lm.train()
    text = torch.randint(5, 30_000, (HISTORIES, TOKENS))
    answer = torch.randint(5, 30_000, (HISTORIES, TARGET))

    def step() -> None:
        lm(input_ids=text, attention_mask=torch.ones_like(text), labels=answer).loss.backward()
        lm.zero_grad()

    step()
    began = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(STEPS):
        step()
    ended = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "user_s": (ended.ru_utime - began.ru_utime) / STEPS,
        "kernel_s": (ended.ru_stime - began.ru_stime) / STEPS,
        "peak_mib": ended.ru_maxrss / 1024,
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results/benchmarks"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(steps(args.way == "kept")))
        return
    from measure import ratio, write_result

    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--way", way]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            results[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"  round {number} {way}: {results[way][-1]}", flush=True)
    rates = {
        way: [1 / (one["user_s"] + one["kernel_s"]) for one in several] for way, several in results.items()
    }
    write_result(
        "freed_memory",
        {
            "step": f"{HISTORIES} x {TOKENS} tokens",
            "results": results,
            "kept_over_handed_back": ratio(rates, *WAYS),
        },
        args.out,
    )


if __name__ == "__main__":
    main()
