"""The words and judgements of a report: labels, the claim, and how numbers are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from userllm.evaluation.metrics import Estimate
from userllm.report.record import RunRecord, Task

SYSTEMS = {
    "user_llm": "User-LLM",
    "user_llm_shuffled": "User-LLM, another user's history",
    "no_user": "Same LM, no user",
    "encoder": "User encoder alone",
    "popularity": "Popularity",
    "own_most_frequent": "User's own most frequent",
    "majority": "Majority class",
    "exact": "Exact answer (upper bound)",
    "user_llm_sampled": "User-LLM, drawn",
    "user_llm_shuffled_sampled": "User-LLM, another user's history, drawn",
    "no_user_sampled": "Same LM, no user, drawn",
    "own_last": "The user's own last text, copied",
    "other_last": "Another user's last text, copied",
    "target": "What the users wrote",
    "every_label": "Every label, for everyone",
}
TASKS = {
    "next_item": "Next item",
    "favorite_genre": "Favourite genre",
    "favorite_category": "Favourite category",
    "genre_preference": "Genre preference",
    "review": "Review",
    "review_rated": "Review, the rating given",
}
GAINS = {"over_shuffled": "over another user's history", "over_no_user": "over no user"}
METRICS = {
    "log_likelihood": "log-likelihood (nats)",
    "prompt_tokens": "LM tokens before the answer",
    "nats_per_token": "nats per token",
    "precision": "weighted precision",
    "recall": "weighted recall",
    "f1": "weighted F1",
    "user_f1": "F1 per user",
    "labels": "labels named",
    "unknown_words": "unknown words",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeLsum": "ROUGE-Lsum",
    "rating_agreement": "agreement with the rating",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
}
STAGES = {
    "data": "Data",
    "pretrain": "User encoder pretraining",
    "contextualize": "Contextualisation of the LM",
    "evaluate": "Evaluation",
    "report": "Report",
}

READERS = {
    "base": "Base LM, before stage 2",
    "without_user": "After stage 2, no user",
    "with_users": "After stage 2, with a user",
}
"""Who read the general English text."""
RIVALS = {
    "no_user": "the same LM with no user",
    "user_llm_shuffled": "User-LLM with another user's history",
    "majority": "the majority class",
    "popularity": "popularity",
}
"""Systems by how a sentence names them."""


@dataclass(frozen=True)
class Check:
    """A statement that the numbers bear out or not; the claim needs it, or it is context."""

    text: str
    holds: bool
    part_of_claim: bool = True


def label(name: str, labels: Mapping[str, str]) -> str:
    """The label of a known name; a name of someone's own system, task or stage stands for itself."""
    return labels.get(name, name.replace("_", " "))


def number(value: float) -> str:
    """Three decimals; a value too small for them is not shown as nothing."""
    if 0 < abs(value) < 0.0005:
        return "<0.001" if value > 0 else ">-0.001"
    return f"{value:.3f}"


def interval(estimate: Estimate) -> str:
    """``value [low, high]``."""
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def gain(estimate: Estimate) -> str:
    """``+value [low, high]`` in nats."""
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def duration(seconds: float) -> str:
    """``8.2 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def users(task: Task) -> str:
    """How many users of the split's part were measured, of how many."""
    if task.users is None:
        return f"number of {task.part} users not recorded"
    if task.users_in_all is None:
        return f"{task.users:,} {task.part} users"
    if task.users == task.users_in_all:
        return f"all {task.users:,} {task.part} users"
    return f"{task.users:,} of {task.users_in_all:,} {task.part} users"


def checks(run: RunRecord) -> list[Check]:
    """What the intervals say, first what the claim rests on."""
    found: list[Check] = []
    for task in run.tasks:
        name, ours = label(task.name, TASKS), task.systems.get("user_llm", {})
        for against, estimate in task.gains.items():
            text = f"{name}: log-likelihood of the true answer {gain(estimate)} nats {label(against, GAINS)}"
            found.append(Check(text, estimate.low > 0))
        if task.name == "favorite_genre" and "recall@1" in ours:
            rivals = [rival for rival in RIVALS if "recall@1" in task.systems.get(rival, {})]
            found += [_comparison(task, "recall@1", rival, part_of_claim=True) for rival in rivals]
        if "rougeLsum" in ours:
            rivals = [rival for rival in RIVALS if "rougeLsum" in task.systems.get(rival, {})]
            found += [_comparison(task, "rougeLsum", rival, part_of_claim=True) for rival in rivals]
        if (
            task.name == "next_item"
            and "recall@10" in ours
            and "recall@10" in task.systems.get("popularity", {})
        ):
            found.append(_comparison(task, "recall@10", "popularity", part_of_claim=False))
    return sorted(found, key=lambda check: not check.part_of_claim)


def _comparison(task: Task, metric: str, rival: str, part_of_claim: bool) -> Check:
    ours, theirs = task.systems["user_llm"][metric], task.systems[rival][metric]
    relation = "lies above" if ours.above(theirs) else "does not lie above"
    name = label(task.name, TASKS)
    shown = METRICS.get(metric, metric)
    text = f"{name}: User-LLM's {shown} {interval(ours)} {relation} {interval(theirs)} of {RIVALS[rival]}"
    return Check(text, ours.above(theirs), part_of_claim)


def summary(run: RunRecord) -> str:
    """One sentence: the claim, its main numbers, and whether the intervals support it."""
    lm = _mapping(run.metrics.get("lm")).get("name", "The language model")
    needed = [check for check in checks(run) if check.part_of_claim]
    part = f"{sum(check.holds for check in needed)} of {len(needed)} comparisons"
    verdict = {
        "none": "can be neither supported nor refuted by what this run measured",
        "all": "is supported by the 95 % intervals",
        "some": f"is only partly supported by the 95 % intervals ({part})",
        "no": "is not supported by the 95 % intervals",
    }[standing(run)]
    claim = f"The claim that {lm} gives better answers about a user when it attends to that user's embeddings"
    numbers = "; ".join(filter(None, map(_headline, run.tasks)))
    return f"{claim} {verdict}{': ' + numbers if numbers else ''}."


def standing(run: RunRecord) -> Literal["all", "some", "no", "none"]:
    """How many of the comparisons the claim rests on hold; "none" where there is no such comparison."""
    needed = [check.holds for check in checks(run) if check.part_of_claim]
    if not needed:
        return "none"
    return "all" if all(needed) else "some" if any(needed) else "no"


def _headline(task: Task) -> str:
    name = label(task.name, TASKS).lower()
    ours, base = (task.systems.get(system, {}).get("recall@1") for system in ("user_llm", "no_user"))
    if task.name == "favorite_genre" and ours and base:
        return f"{name} recall@1 {number(ours.value)} with the user against {number(base.value)} without"
    systems = [task.systems.get(system, {}).get("rougeLsum") for system in ("user_llm", "user_llm_shuffled")]
    if systems[0] and systems[1]:
        mine, other = (number(estimate.value) for estimate in systems if estimate)
        return f"{name} ROUGE-Lsum {mine} with the user against {other} with another user's history"
    against = next(iter(task.gains), None)
    return f"{name} {gain(task.gains[against])} nats {label(against, GAINS)}" if against else ""


def remarks(task: Task) -> list[str]:
    """Facts that belong under a task's table."""
    found = []
    ours, encoder = (task.systems.get(s, {}).get("recall@10") for s in ("user_llm", "encoder"))
    if ours and encoder and encoder.value > 0:
        found.append(f"User-LLM's recall@10 is {ours.value / encoder.value:.2f} of the user encoder's own.")
    if task.invalid_items is not None:
        found.append(f"Answers outside the catalogue or labels: {task.invalid_items:,}.")
    for name, settings in task.decoding.items():
        told = ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in settings.items())
        found.append(f"Decoding, {'drawn' if name == 'sampled' else name}: {told}.")
    for metric in dict.fromkeys(name for table in task.whole.values() for name in table):
        told = ", ".join(
            f"{label(system, SYSTEMS)} {table[metric]:.3f}"
            for system, table in task.whole.items()
            if metric in table
        )
        found.append(f"{METRICS.get(metric, metric)} of all texts together: {told}.")
    return found


def text_gains(task: Task) -> list[tuple[str, str, str]]:
    """(over whom, metric, gain) of the greedy texts, pair by pair."""
    return [
        (label(against, GAINS), METRICS.get(metric, metric), gain(estimate))
        for against, table in task.text_gains.items()
        for metric, estimate in table.items()
    ]


def what_ran(run: RunRecord) -> list[tuple[str, str]]:
    """(what, value) rows that identify the run; "not recorded" where metrics.json does not say."""
    lm, dataset, split = (_mapping(run.metrics.get(key)) for key in ("lm", "dataset", "split"))
    counts = [f"{dataset[key]:,} {key}" for key in ("users", "items", "events") if key in dataset]
    parameters = lm.get("parameters")
    model = [
        _text(lm.get("name")),
        f"{parameters:,} parameters" if parameters else "",
        "frozen" if lm.get("frozen") else "",
    ]
    return [
        ("Commit", _text(run.metrics.get("commit"))),
        ("Hardware", _text(run.metrics.get("hardware"))),
        ("Software", _text(run.metrics.get("software"))),
        ("Language model", ", ".join(filter(None, model))),
        ("LM source", _text(lm.get("source"))),
        ("LM sha256", _text(lm.get("sha256"))),
        ("Dataset", ", ".join([_text(dataset.get("name")), *counts])),
        ("Dataset source", _text(dataset.get("source"))),
        ("Dataset fingerprint", _text(dataset.get("fingerprint"))),
        ("Split", _text(split.get("kind")).replace("_", "-")),
        ("Split fingerprint", _text(split.get("fingerprint"))),
        ("Ties in time", _text(split.get("tie_rule"))),
        *((f"Ties, {label(task.name, TASKS).lower()}", task.tie_rule) for task in run.tasks if task.tie_rule),
        *((f"Users, {label(task.name, TASKS).lower()}", users(task)) for task in run.tasks),
    ]


def context_mark(check: Check) -> str:
    """What to add to a statement that the claim does not need."""
    return "" if check.part_of_claim else " (told for context; the claim does not rest on it)"


def timings(run: RunRecord) -> list[tuple[str, float]]:
    """(stage, seconds) as recorded."""
    return [
        (label(name, STAGES), float(seconds))
        for name, seconds in _mapping(run.metrics.get("timings_s")).items()
    ]


def peak_memory(run: RunRecord) -> str | None:
    """The most memory any stage took, as recorded."""
    resident, on_gpu = (run.metrics.get(f"peak_{where}_mb") for where in ("rss", "gpu"))
    if resident is None:
        return None
    return f"Peak memory: {resident:,.0f} MB{'' if on_gpu is None else f', of the GPU {on_gpu:,.0f} MB'}."


def trainable(run: RunRecord) -> list[tuple[str, int]]:
    """(group, trainable parameters) as recorded, without a total."""
    groups = _mapping(run.metrics.get("trainable"))
    return [(name.replace("_", " "), int(count)) for name, count in groups.items() if name != "total"]


def knowledge(run: RunRecord) -> list[tuple[str, str, str]]:
    """(who read the general English text, perplexity, how much above the base LM's); empty where nobody did."""
    if run.knowledge is None:
        return []
    base = run.knowledge.perplexity["base"]
    return [
        (READERS[reader], f"{value:,.2f}", "" if reader == "base" else _change(value / base - 1))
        for reader, value in run.knowledge.perplexity.items()
    ]


def knowledge_note(run: RunRecord) -> str:
    """What was read, and by whom."""
    assert run.knowledge is not None
    return (
        f"Perplexity on {run.knowledge.tokens:,} tokens of general English; with users: the mean over "
        f"{run.knowledge.users}. Text sha256 {run.knowledge.sha256[:12]}."
    )


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _change(share: float) -> str:
    return "exactly the same" if share == 0 else f"{100 * share:+.2f} %"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key.replace('_', ' ')}: {'none' if part is None else _text(part)}"
            for key, part in value.items()
        )
    return "not recorded" if value is None or value == "" else str(value)
