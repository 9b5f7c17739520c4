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

from efficiency_tables import efficiency_rows, update_rows

from userllm.experiments.cells import CellStore, FinishedCell
from userllm.experiments.comparison import WEIGHTED_F1, difference, per_user
from userllm.experiments.definition import load_experiment, settings_hash
from userllm.experiments.figures import events_shown, prompt_tokens

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


def split_facts(metrics: dict[str, Any]) -> str:
    """Which split, and how it orders events of one time."""
    split = metrics["split"]
    return f"split {split['kind']} {split['fingerprint'][:12]}; ties: {split['tie_rule']}."


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
        f"{metrics['dataset']['fingerprint'][:12]}, {split_facts(metrics)} "
        f"LM: {metrics['lm']['name']}, {metrics['lm']['source']}.",
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


LABEL_SYSTEMS = {
    ("uem-movielens-1m", "user_llm"): "UEM",
    ("uem-movielens-1m-text", "user_llm"): "the same LM, the history as text",
    ("uem-movielens-1m", "user_llm_shuffled"): "UEM, another user's history",
    ("uem-movielens-1m-text", "user_llm_shuffled"): "the same LM, another user's history as text",
    ("uem-movielens-1m", "no_user"): "UEM's LM, no user",
    ("uem-movielens-1m", "majority"): "the most common answer",
    ("uem-movielens-1m", "every_label"): "every genre to everybody",
}


def genres_block(task: str = "genre_preference") -> str | None:
    """UEM beside a text history: one run each, on the same users; None where one of them has not been run."""
    files = {name: RESULTS / name / "metrics.json" for name, _ in LABEL_SYSTEMS}
    if not all(file.exists() for file in files.values()):
        return None
    runs: dict[str, Any] = {name: json.loads(file.read_text()) for name, file in files.items()}
    entries = {name: run["tasks"][task] for name, run in runs.items()}
    uem, text = (runs[name] for name in files)
    asked = {(entries[name]["n"], run["split"]["fingerprint"]) for name, run in runs.items()}
    if len(asked) > 1:
        raise SystemExit("UEM and the text history were not asked about the same users")
    first = entries["uem-movielens-1m"]
    lines = [
        f"n = {first['n']} of {first['N']} test users, the same in every row:",
        "",
        "| | weighted F1 | precision | recall | tokens the LM reads |",
        "|---|---|---|---|---|",
    ]
    for (name, system), label in LABEL_SYSTEMS.items():
        if system not in entries[name]:
            continue  # evaluated without another user
        entry = entries[name][system]
        read = f"{entry['prompt_tokens']['value']:.0f}" if "prompt_tokens" in entry else "–"
        cells = [interval(entry[key]) for key in ("f1", "precision", "recall")]
        lines.append(f"| {label} | {' | '.join(cells)} | {read} |")
    lead = first["user_llm"]["f1"]["value"] - entries["uem-movielens-1m-text"]["user_llm"]["f1"]["value"]
    cost = [
        f"{run['training']['examples']:,} examples in {run['cpu_s']['contextualize']:,.0f} CPU s"
        for run in (uem, text)
    ]
    lines += [
        "",
        f"UEM leads the text history by {lead:+.3f}; the paper reports leads of up to .21 and .25, with larger "
        "language models and more examples. Over another user's history: "
        f"{interval(first['gain_nats']['over_shuffled'])} nats an answer. Training: {cost[0]} (UEM), {cost[1]} (text).",
        "",
        f"95 % intervals, users resampled. Commits {uem['commit'][:12]} and {text['commit'][:12]}, {uem['date']}, "
        f"{uem['hardware']}. {uem['dataset']['name']} fingerprint {uem['dataset']['fingerprint'][:12]}, "
        f"{split_facts(uem)} LM: {uem['lm']['name']}, {uem['lm']['source']}.",
    ]
    return "\n".join(lines)


def lengths_block(task: str = "genre_preference") -> str | None:
    """UEM and a text history by the events they are shown, from the cells of the experiment ``uem``."""
    experiment, store = load_experiment("uem"), CellStore(RESULTS / "experiments")
    found: dict[tuple[str, int], FinishedCell] = {}
    for series, names in experiment.curves.items():
        for name in names:
            cell = store.find(settings_hash(experiment.settings(name, "cpu", seed=0)))
            if cell is not None:
                found[series, events_shown(cell)] = cell
    if not found:
        return None
    lines = [
        "| events | UEM, weighted F1 | tokens the LM reads | the history as text, weighted F1 | tokens the LM reads "
        "| UEM less text, paired |",
        "|---|---|---|---|---|---|",
    ]
    for events in sorted({events for _, events in found}):
        columns, pair = [], [found.get((series, events)) for series in ("UEM", "Text history")]
        for cell in pair:
            if cell is None:
                columns.append("not run | –")
            else:
                f1 = cell.metrics["tasks"][task]["user_llm"]["f1"]
                columns.append(f"{interval(f1)} | {prompt_tokens(cell):.0f}")
        lead = difference(*(per_user([cell] if cell else [], task, "user_llm", WEIGHTED_F1) for cell in pair))
        columns.append("–" if lead is None else interval(lead.estimate.as_dict()))
        lines.append(f"| {events} | {' | '.join(columns)} |")
    every = [cell.metrics for cell in found.values()]
    commits = sorted({cell.told["commit"][:12] for cell in found.values()})
    examples = {metrics["training"]["examples"] for metrics in every}
    users = {metrics["tasks"][task]["n"] for metrics in every}
    if len(examples) > 1 or len(users) > 1:
        raise SystemExit("cells of the experiment uem have different examples or users")
    lines += [
        "",
        f"{examples.pop():,} examples in every row, n = {users.pop():,}, the same users. `userllm experiments run uem "
        f"--scale cpu`, commits {' and '.join(commits)}, {every[0]['date']}, {every[0]['hardware']}, "
        f"{split_facts(every[0])}",
    ]
    return "\n".join(lines)


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
        "| | LM tokens | GFLOP, training | GFLOP, answering | examples a CPU s, training | answering "
        "| training lifts the peak memory by, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, label in names.items():
        flops, speed = result["flops_per_example"][name], result["median_examples_per_cpu_s"]
        rows.append(
            f"| {label} | {result['lm_tokens'][name]:.0f} | {flops['train'] / 1e9:.1f} | {flops['answer'] / 1e9:.1f} | "
            f"{speed['train'][name]:.2f} | {speed['answer'][name]:.2f} | "
            f"{result['peak_memory_lift_mb'][name]['train']:,.0f} |"
        )
    return rows


PREPARED = {
    "userllm": "userllm, ids are whole numbers (`data prepare movielens`)",
    "pandas": "pandas, the least that will do",
    "pandas_whole": "pandas, the same whole",
    "userllm_table": "userllm, ids are text (`data prepare table`)",
    "pandas_text": "pandas, the least that will do",
    "pandas_text_whole": "pandas, the same whole",
}


def text_tree_rows(result: dict[str, Any]) -> list[str]:
    """A row per way of telling the LM about the user: speed of both beam searches."""
    labels = {"user_llm_enc": "User-LLM, frozen LM", "text_prompt_lora": "Text Prompt of 50 events, LoRA"}
    lines = ["| | side by side over rows, by CPU time | same answers |", "|---|---|---|"]
    for way, label in labels.items():
        found = result["ways"][way]
        lines.append(f"| {label} | {spread(found['side_by_side_over_rows'])} | {found['places_alike']:.1%} |")
    return [*lines, "", f"{result['beams']} beams, {result['users']} users together."]


def freed_memory_rows(result: dict[str, Any]) -> list[str]:
    """CPU seconds and memory of a step, freed memory kept or handed back."""
    labels = {"kept": "kept (what a run does)", "handed_back": "handed back (glibc's way)"}
    lines = [
        "| freed memory | CPU s a step | of these in the kernel | peak memory, MiB |",
        "|---|---|---|---|",
    ]
    for way, label in labels.items():
        of = {
            key: median(run[key] for run in result["results"][way])
            for key in ("user_s", "kernel_s", "peak_mib")
        }
        total = of["user_s"] + of["kernel_s"]
        lines.append(f"| {label} | {total:.1f} | {of['kernel_s']:.1f} | {of['peak_mib']:,.0f} |")
    return [*lines, "", f"A step: {result['step']}. {spread(result['kept_over_handed_back'])}"]


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
        labels = {
            "pandas": "ids are whole numbers, the least that will do",
            "pandas_whole": "ids are whole numbers, the same whole",
            "pandas_text": "ids are text, the least that will do",
            "pandas_text_whole": "ids are text, the same whole",
        }
        for way, label in labels.items():
            wall, cpu = result["over_pandas_seconds"][way], result["over_pandas_cpu_s"][way]
            lines.append(f"- Over pandas, {label}: {spread(wall)} in seconds, {spread(cpu)} in CPU seconds.")
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
        "log-likelihood is the validation event's. `python benchmarks/encoder_recipes.py --seconds "
        f"{base['seconds']:.0f}`, commit {base['commit'][:12]}, {base['date']}, {base['hardware']}.",
    ])  # fmt: skip


def time_to_recall_block() -> str | None:
    """How much sooner RecTools' own best validation recall@10 is reached: epochs needed, times the ratio of speeds.

    The two were trained on different days and machines, so their seconds cannot be compared; the ratio of events per
    second was measured in one run, and both go through the same events in an epoch.
    """
    files = [
        RESULTS / "movielens-1m" / "encoder.json",
        *(RESULTS / "benchmarks" / f"{name}.json" for name in ("rectools_sasrec", "pretraining")),
    ]
    if not all(file.exists() for file in files):
        return None
    mine, other, speed = (json.loads(file.read_text()) for file in files)
    best = other["best"]
    goal = best["validation"]["recall@10"]
    reached = [one for one in mine["validation"] if one["eval_recall@10"] >= goal]
    if not reached:
        return None
    epochs = reached[0]["epoch"] * mine["epochs"]
    rows = [
        f"| RecTools SASRec, {how} | {best['epoch']} | {speed[key]['median']:.2f}x | "
        f"{best['epoch'] / epochs * speed[key]['median']:.2f}x |"
        for how, key in (
            ("logits at targets only", "over_rectools_targets"),
            ("as released", "over_rectools"),
        )
    ]
    return "\n".join([
        f"Until validation recall@10 is at RecTools' own best, {goal:.4f} (all {mine['n']} users; both validate once "
        "an epoch and train on each user's latest 200 events):", "",
        "| | epochs | events a second, userllm over it | userllm sooner by |", "|---|---|---|---|",
        f"| userllm, {mine['layers']} x {mine['width']}, item loss first, relative time | {epochs:.0f} | | |",
        *rows, "",
        f"`docs/results/movielens-1m/encoder.json` (commit {mine['commit'][:12]}, {mine['date']}, {mine['hardware']}), "
        "`docs/results/benchmarks/rectools_sasrec.json`, and the speeds above. The last column is the product of the "
        "two ratios: trained on different days, their seconds cannot be compared.",
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
        "amazon-review-results": run_block(
            "amazon-review",
            "userllm run configs/amazon-review.yaml data.path=reviews_Musical_Instruments_5.json.gz",
        ),
        "amazon-review-texts": examples_block("amazon-review", "review"),
        "uem-results": genres_block(),
        "uem-lengths": lengths_block(),
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
        "efficiency": bench_block("efficiency", "python benchmarks/efficiency.py", efficiency_rows),
        "update-performance": bench_block("update", "python benchmarks/bench_update.py", update_rows),
        "prepare-performance": bench_block("prepare", "python benchmarks/bench_prepare.py", prepare_rows),
        "text-tree-performance": bench_block(
            "text_tree", "python benchmarks/bench_text_tree.py", text_tree_rows
        ),
        "freed-memory-performance": bench_block(
            "freed_memory", "python benchmarks/bench_freed_memory.py", freed_memory_rows
        ),
        "sentence-embeddings-performance": bench_block(
            "sentence_embeddings",
            "python benchmarks/bench_sentence_embeddings.py",
            lambda r: [
                f"Over `SentenceTransformer.encode`: {spread(r['ratio'])}. {r['encoder']}, {r['texts']} of the "
                f"catalogue's {r['distinct_texts']:,} texts, by CPU time; the largest difference between vectors is "
                f"{r['largest_difference']:.0e}. Each text serves {r['events_per_text']:.0f} look-ups of the events."
            ],
        ),
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
