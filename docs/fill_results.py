"""Copies measured results into the marked blocks of README.md and docs/: no number in them is typed by hand.

    python docs/fill_results.py

Reads docs/results/<run>/metrics.json and docs/results/benchmarks/*.json; a block without its file says "not run yet".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
SYSTEMS = {
    "user_llm": "User-LLM",
    "user_llm_shuffled": "User-LLM, another user's history",
    "no_user": "the same LM, no user",
    "encoder": "the encoder's own ranking",
    "popularity": "popularity",
    "own_most_frequent": "the user's own most frequent",
    "majority": "majority genre",
    "exact": "counting (upper bound)",
}
TEXT_SYSTEMS = {
    "user_llm": "User-LLM",
    "user_llm_shuffled": "User-LLM, another user's history",
    "no_user": "the same LM, no user",
    "user_llm_sampled": "User-LLM, drawn",
    "user_llm_shuffled_sampled": "User-LLM, another user's history, drawn",
    "no_user_sampled": "the same LM, no user, drawn",
    "own_last": "the user's own last text, copied",
    "other_last": "another user's last text, copied",
    "target": "what the users wrote",
}


def interval(entry: dict[str, float]) -> str:
    """``value [low, high]``."""
    return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def run_block(name: str, command: str) -> str | None:
    """Tables of one run, or None where it has not been run."""
    file = RESULTS / name / "metrics.json"
    if not file.exists():
        return None
    metrics: dict[str, Any] = json.loads(file.read_text())
    lines = []
    for task, entry in metrics["tasks"].items():
        if "rougeLsum" in entry["user_llm"]:
            lines += text_block(name, task, entry)
            continue
        keys = (
            ["recall@1", "recall@5", "recall@10", "ndcg@10"]
            if task == "next_item"
            else ["recall@1", "recall@5"]
        )
        lines += [f"{task.replace('_', ' ').capitalize()}, n = {entry['n']} of {entry['N']} test users:", ""]
        lines += ["| system | " + " | ".join(keys) + " |", "|---|" + "---|" * len(keys)]
        for system, label in SYSTEMS.items():
            if system in entry:
                lines.append(
                    f"| {label} | " + " | ".join(interval(entry[system][key]) for key in keys) + " |"
                )
        if "encoder" in entry:
            share = entry["user_llm"]["recall@10"]["value"] / entry["encoder"]["recall@10"]["value"]
            lines += ["", f"User-LLM's recall@10 is {share:.2f} of its own encoder's."]
            if weights := metrics.get("catalogue_weights"):
                told = ", ".join(f"{weight:.2f}" for weight in weights)
                lines += [
                    "Where a title is written, its encoder's log-probability is added to the LM's logit "
                    f"(`fusion.catalogue`) with learned weights {told} (first token, second, ...)."
                ]
        gains = entry["gain_nats"]
        lines += [
            "",
            f"Log-likelihood of the truth: {interval(gains['over_shuffled'])} nats over another user's, "
            f"{interval(gains['over_no_user'])} over no user. Invalid items: {entry['invalid_items']}.",
            "",
        ]
    seconds = sum(metrics["timings_s"].values())
    lines += [
        f"95 % bootstrap intervals. `{command}`, commit {metrics['commit'][:12]}, {file_date(name)}, "
        f"{metrics['hardware']}; "
        f"{seconds:.0f} s, peak memory {metrics['peak_rss_mb']:.0f} MiB. {metrics['dataset']['name']} fingerprint "
        f"{metrics['dataset']['fingerprint'][:12]}, split {metrics['split']['kind']} "
        f"{metrics['split']['fingerprint'][:12]}; "
        f"ties: {metrics['split']['tie_rule']}. LM: {metrics['lm']['source']}.",
    ]  # fmt: skip
    return "\n".join(lines)


def text_block(name: str, task: str, entry: dict[str, Any]) -> list[str]:
    """Tables of a task that is answered in free text, and where its first texts are."""
    lines = [
        f"{task.replace('_', ' ').capitalize()}, n = {entry['n']} of {entry['N']} test users:",
        "",
        "| system | ROUGE-1 | ROUGE-2 | ROUGE-Lsum | words | agreement with the rating | distinct-2 |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = ["rouge1", "rouge2", "rougeLsum", "words", "rating_agreement"]
    for system, label in TEXT_SYSTEMS.items():
        if system in entry:
            cells = [interval(entry[system][key]) for key in keys]
            lines.append(f"| {label} | {' | '.join(cells)} | {entry['whole'][system]['distinct_2']:.3f} |")
    nats, rouge = entry["gain_nats"], {over: table["rougeLsum"] for over, table in entry["gain"].items()}
    lines += [
        "",
        f"Paired, over another user's history: ROUGE-Lsum {interval(rouge['over_shuffled'])}, "
        f"{interval(nats['over_shuffled'])} nats a text; over no user: {interval(rouge['over_no_user'])}, "
        f"{interval(nats['over_no_user'])} nats. Texts of the first ten users, not selected: "
        f"`docs/results/{name}/texts/{task}.jsonl`.",
        "",
    ]
    return lines


def examples_block(name: str, task: str) -> str | None:
    """What the first ten users wrote and what was written for them, or None where it has not been run."""
    file = RESULTS / name / "texts" / f"{task}.jsonl"
    if not file.exists():
        return None
    lines = [
        "| asked | the user wrote | User-LLM | another user's history | no user |",
        "|---|---|---|---|---|",
    ]
    for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()[:10]):
        cells = [record[key] for key in ("prompt", "target", "user_llm", "user_llm_shuffled", "no_user")]
        lines.append("| " + " | ".join(escaped(cell) for cell in cells) + " |")
    return "\n".join([*lines, "", "Greedy texts."])


def escaped(text: str) -> str:
    """Somebody's text in a table's cell: on one line, without markup."""
    plain = re.sub(r"([\\`*_<>|~$&\[\]])", r"\\\1", text)
    return " ".join(plain.split())


def file_date(name: str) -> str:
    """The date a run was made, as its record says."""
    return str(json.loads((RESULTS / name / "metrics.json").read_text()).get("date", "date not recorded"))


def bench_block(name: str, command: str, rows: Callable[[dict[str, Any]], list[str]]) -> str | None:
    """A benchmark's ratios, or None where it has not been run."""
    file = RESULTS / "benchmarks" / f"{name}.json"
    if not file.exists():
        return None
    result = json.loads(file.read_text())
    where = f"`{command}`, commit {result['commit'][:12]}, {result['date']}, {result['hardware']}."
    return "\n".join([*rows(result), "", where])


def spread(ratio: dict[str, float]) -> str:
    """``median x (min to max)``."""
    return f"**{ratio['median']:.2f}x** ({ratio['min']:.2f} to {ratio['max']:.2f} over the rounds)"


def text_prompt_rows(result: dict[str, Any]) -> list[str]:
    """A row per way of telling the LM about the user."""
    names = {
        "user_llm_enc": "User-LLM, frozen LM, attention from the answer on",
        "user_llm_lora": "User-LLM, LoRA, attention from all text",
        "text_prompt_lora": f"Text Prompt of {result['events']} events, LoRA",
    }
    rows = [
        "| | LM tokens | GFLOP, training | GFLOP, answering | examples/s, training | examples/s, answering |",
        "|---|---|---|---|---|---|",
    ]
    for name, label in names.items():
        flops, speed = result["flops_per_example"][name], result["median_examples_per_s"]
        rows.append(
            f"| {label} | {result['lm_tokens'][name]:.0f} | {flops['train'] / 1e9:.1f} | {flops['answer'] / 1e9:.1f} | "
            f"{speed['train'][name]:.2f} | {speed['answer'][name]:.2f} |"
        )
    return rows


PREPARED = {
    "userllm": "userllm, ids are whole numbers (`data prepare movielens`)",
    "pandas": "pandas, the same",
    "userllm_table": "userllm, ids are text (`data prepare table`)",
    "pandas_text": "pandas, the same",
}


def prepare_rows(result: dict[str, Any]) -> list[str]:
    """Preparing a synthetic log: seconds and memory of each way, and how soon training starts."""
    log = result["results"]["userllm"][0]
    rounds = len(result["results"]["userllm"])
    lines = [
        f"A synthetic log of {log['events']:,} events, {log['users']:,} users and {log['items']:,} items; "
        f"--memory {result['memory_option']}; medians of {rounds} round{'s' * (rounds > 1)}.",
        "",
        "| | seconds | CPU seconds | peak memory, MiB |",
        "|---|---|---|---|",
    ]
    for way, label in PREPARED.items():
        if runs := result["results"].get(way):
            cells = [median(run[key] for run in runs) for key in ("seconds", "cpu_s", "peak_mib")]
            lines.append(f"| {label} | {cells[0]:.1f} | {cells[1]:.1f} | {cells[2]:,.0f} |")
    starts = median(run["first_batch_s"] for run in result["results"]["first_batch"])
    lines += ["", f"From opening the dataset to the first training batch: {starts:.2f} s."]
    if "over_pandas_seconds" in result:
        lines.append("")
        for way, label in (("userllm", "whole numbers"), ("userllm_table", "text")):
            wall, cpu = result["over_pandas_seconds"][way], result["over_pandas_cpu_s"][way]
            lines.append(
                f"- Over pandas, ids are {label}: {spread(wall)} in seconds, {spread(cpu)} in CPU seconds."
            )
        lines += [
            "",
            f"The machine's load average was {result['load_average'][0]:g} at the end, these processes included. "
            "userllm works on all cores and pandas on one: how many are free decides the first of the two ratios, "
            "not the second.",
        ]
    return lines


PUBLISHED = [  # leave-last-out, full catalogue, MovieLens-1M; each with its own tie rule
    ("BERT4Rec", 0.284, 0.154, "antklen/sasrec-bert4rec-recsys23"),
    ("SASRec, cross-entropy", 0.315, 0.182, "antklen/sasrec-bert4rec-recsys23"),
    ("FuXi-alpha, recomputed", 0.316, 0.181, "blondered/transformer_benchmark"),
    ("HSTU, stable sort", 0.323, 0.188, "RecTools' HSTU tutorial"),
    ("HSTU-large, stable sort", 0.364, 0.216, "RecTools' HSTU tutorial"),
]


def encoder_block() -> str | None:
    """Our encoders beside RecTools' SASRec, trained here, and beside what others have published."""
    names = {"encoder": "autoregressive", "bert4rec": "Bert4Rec"}
    files = {RESULTS / "movielens-1m" / f"{name}.json": label for name, label in names.items()}
    ours = {label: json.loads(file.read_text()) for file, label in files.items() if file.exists()}
    theirs = RESULTS / "benchmarks" / "rectools_sasrec.json"
    if not ours or not theirs.exists():
        return None
    other = json.loads(theirs.read_text())
    best = other["best"]
    lines = [
        "| encoder | recall@10 | ndcg@10 | n | epochs | training, CPU s | target events a CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, mine in ours.items():
        cost = [f"{mine[key]:,.0f}" for key in ("epochs", "train_cpu_seconds", "target_events_a_cpu_second")]
        lines.append(
            f"| userllm, {label}, {mine['layers']} x {mine['width']} | {interval(mine['recall@10'])} | "
            f"{interval(mine['ndcg@10'])} | {mine['n']} | {' | '.join(cost)} |"
        )
    lines.append(
        f"| RecTools SASRec, softmax, epoch {best['epoch']} (best validation; stopped: {other['stopped']}) | "
        f"{best['test']['recall@10']:.3f} | {best['test']['ndcg@10']:.3f} | {other['data']['users']} | "
        f"{best['epoch']} | {best['train_cpu_s']:,.0f} | – |"
    )
    lines += [
        f"| published: {name} ({source}) | {r:.3f} | {n:.3f} | – | – | – | – |"
        for name, r, n, source in PUBLISHED
    ]
    lines += [""]
    lines += [
        f"{label}: commit {m['commit'][:12]}, {m['date']}, {m['hardware']}." for label, m in ours.items()
    ]
    tie = next(iter(ours.values()))["tie_rule"]
    return "\n".join([
        *lines, f"RecTools {other['versions']['rectools']}. Our tie rule: {tie}. The published numbers are on the same "
        "protocol with their authors' own order of events at one time, which moves them by some hundredths.",
    ])  # fmt: skip


def recipes_block() -> str | None:
    """The encoder's recipe, one setting at a time."""
    file = RESULTS / "benchmarks" / "encoder_recipes.json"
    if not file.exists():
        return None
    rows = json.loads(file.read_text())
    base = rows["base"]
    lines = [
        "| one setting changed | recall@10 | ndcg@10 | log-likelihood | epochs | target events a CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        log_likelihood = row["validation"][-1].get("eval_log_likelihood")
        lines.append(
            f"| {name} | {interval(row['recall@10'])} | {interval(row['ndcg@10'])} | {log_likelihood:.3f} | "
            f"{row['epochs']:.1f} | {row['target_events_a_cpu_second']:,.0f} |"
        )
    return "\n".join([
        *lines, "", f"{base['seconds']:.0f} CPU seconds each, one seed, n = {base['n']}, {base['split']}; the "
        "log-likelihood is the validation event's. `python benchmarks/encoder_recipes.py`, commit "
        f"{base['commit'][:12]}, {base['date']}, {base['hardware']}.",
    ])  # fmt: skip


def time_to_recall_block() -> str | None:
    """CPU time of training until RecTools' own best validation recall@10 is reached."""
    files = [
        RESULTS / "movielens-1m" / "encoder.json",
        *(RESULTS / "benchmarks" / f"{name}.json" for name in ("rectools_sasrec", "pretraining")),
    ]
    if not all(file.exists() for file in files):
        return None
    mine, other, speed = (json.loads(file.read_text()) for file in files)
    best = other["best"]
    goal, seconds = best["validation"]["recall@10"], best["train_cpu_s"]
    reached = [one for one in mine["validation"] if one["eval_recall@10"] >= goal]
    if not reached or "eval_train_cpu_s" not in reached[0]:
        return None
    took = reached[0]["eval_train_cpu_s"]
    released = seconds * speed["over_rectools"]["median"] / speed["over_rectools_targets"]["median"]
    return "\n".join([
        f"CPU seconds of training until validation recall@10 is at RecTools' own best, {goal:.4f} (all {mine['n']} "
        "users; the encoder validates once an epoch):", "",
        "| | CPU s | userllm sooner by |", "|---|---|---|",
        f"| userllm, {mine['layers']} x {mine['width']}, item loss first, relative time | {took:.0f} | |",
        f"| RecTools SASRec, logits at targets only, epoch {best['epoch']} | {seconds:.0f} | {seconds / took:.2f}x |",
        f"| RecTools SASRec as released: the same epochs at its own speed (ratio above) | {released:.0f} | "
        f"**{released / took:.2f}x** |", "",
        f"`docs/results/movielens-1m/encoder.json` (commit {mine['commit'][:12]}, {mine['date']}, {mine['hardware']}) "
        "and `docs/results/benchmarks/rectools_sasrec.json`. Trained at different times, each on one core.",
    ])  # fmt: skip


def fill(file: Path, block: str, text: str | None) -> None:
    """Replace what stands between a block's markers."""
    content = file.read_text(encoding="utf-8")
    start, end = f"<!-- {block} -->", f"<!-- /{block} -->"
    if start not in content:
        return
    before, rest = content.split(start, 1)
    _, after = rest.split(end, 1)
    file.write_text(f"{before}{start}\n\n{text or 'Not run yet.'}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Fill every block."""
    blocks = {
        "demo-results": run_block("demo", "make demo"),
        "movielens-1m-results": run_block("movielens-1m", "userllm run configs/movielens-1m.yaml"),
        "rent-the-runway-review-results": run_block(
            "rent-the-runway-review", "userllm run configs/rent-the-runway-review.yaml"
        ),
        "rent-the-runway-review-texts": examples_block("rent-the-runway-review", "review"),
        "encoder-results": encoder_block(),
        "recipe-results": recipes_block(),
        "time-to-recall": time_to_recall_block(),
        "pretraining-performance": bench_block(
            "pretraining",
            ".venv-bench/bin/python benchmarks/pretraining.py",
            lambda r: [
                f"Over RecTools as released: {spread(r['over_rectools'])}; over RecTools with logits at targets only: "
                f"{spread(r['over_rectools_targets'])}. {r['layers']} x {r['width']}, history {r['history']}."
            ],
        ),
        "contextualization-performance": bench_block(
            "contextualization",
            "python benchmarks/bench_contextualization.py",
            lambda r: [spread(r["ratio"])],
        ),
        "text-prompt-performance": bench_block(
            "text_prompt", "python benchmarks/bench_text_prompt.py", text_prompt_rows
        ),
        "prepare-performance": bench_block("prepare", "python benchmarks/bench_prepare.py", prepare_rows),
        "prepare-100m-performance": bench_block(
            "prepare_100m",
            "python benchmarks/bench_prepare.py --log DIR --without-pandas --rounds 1 --name prepare_100m",
            prepare_rows,
        ),
        "decoding-performance": bench_block(
            "decoding",
            "python benchmarks/bench_decoding.py",
            lambda r: [
                f"Speed with the constraint over speed without: {spread(r['constrained_over_unconstrained'])}."
            ],
        ),
    }
    for name, text in blocks.items():
        for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
            fill(file, name, text)


if __name__ == "__main__":
    main()
