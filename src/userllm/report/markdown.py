"""The report as Markdown, for a repository or a pull request; its figures are PNG files under figures/."""

from __future__ import annotations

import re
from collections.abc import Iterable

from userllm.report import figures, wording
from userllm.report.record import Answers, Example, RunRecord, Task, Written
from userllm.report.wording import GAINS, METRICS, STAGES, SYSTEMS, TASKS, label

_SHOWN_EVENTS = 10
_SPECIAL = re.compile(r"([\\`*_<>|~$&]|\](?=[(\[:]))")
"""What would start emphasis, code, HTML, a formula, a table cell or (a bracket before another) a link."""


def render(run: RunRecord, drawn: list[str]) -> str:
    """The report as text; ``drawn``: names of the figures that lie under figures/."""
    parts = [
        f"# {escape(run.name)}",
        escape(wording.summary(run)),
        "\n".join(
            f"- {'✓ yes' if c.holds else '✗ no'}: {escape(c.text)}{wording.context_mark(c)}"
            for c in wording.checks(run)
        ),
        *(_task(task, drawn) for task in run.tasks),
        "## Users and the answers about them",
        *(
            [_example(example) for example in run.examples]
            or [_missing("Users", "the run has no examples.json")]
        ),
        "## What the LM attended to",
        _attention(run),
        "## Training",
        *_training(run, drawn),
        "## Gates",
        _picture("gates") if "gates" in drawn else _missing("Gates", "metrics.json records none"),
        "## Trainable parameters",
        _trainable(run),
        "## Knowledge kept",
        _knowledge(run),
        "## Timings",
        _timings(run),
        "## What ran",
        _table(("", ""), wording.what_ran(run), align="ll"),
        "\n".join(f"- {escape(note)}" for note in run.metrics.get("notes", [])),
        "Intervals: percentile bootstrap over users, 95 %.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Text as itself, on one line: no markup, no HTML, no link, no table cell of its own."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _task(task: Task, drawn: list[str]) -> str:
    rows = [
        (label(system, SYSTEMS), *(wording.interval(table[m]) if m in table else "–" for m in task.metrics))
        for system, table in task.systems.items()
    ]
    gains = [(label(against, GAINS), wording.gain(estimate)) for against, estimate in task.gains.items()]
    names = [name for kind in ("recall", "rouge") if (name := f"{kind}-{task.name}") in drawn]
    text_gains = wording.text_gains(task)
    parts = [
        f"## {escape(label(task.name, TASKS))}",
        f"{wording.users(task).capitalize()}; mean over users [95 % interval].",
        _table(
            ("System", *(METRICS.get(metric, metric) for metric in task.metrics)),
            rows,
            align="l" + "r" * len(task.metrics),
        ),
        *map(escape, wording.remarks(task)),
        _table(("Gain in log-likelihood of the true answer", "nats per answer"), gains) if gains else "",
        _table(("Gain, text by text", "", "mean"), text_gains, align="llr") if text_gains else "",
        *map(_picture, names),
        *([f"### Texts of the first {len(task.written)} of these users"] if task.written else []),
        *map(_written, task.written),
    ]
    return "\n\n".join(part for part in parts if part)


def _written(written: Written) -> str:
    rows = [
        (label(system, SYSTEMS), text)
        for system, text in [("target", written.target), *written.texts.items()]
    ]
    heading = f"**User {escape(written.user)}**, asked: {escape(written.prompt)}"
    return heading + "\n\n" + _table(("", "Text"), rows, align="ll")


def _example(example: Example) -> str:
    latest = example.history[-_SHOWN_EVENTS:]
    rows = [(e.time, e.title, e.rating) for e in latest]
    parts = [
        f"### User {escape(example.user)}",
        f"{len(example.history):,} events, the latest {len(latest)}:",
        _table(("Date", "Title", "Rating"), rows, align="llr"),
        *(_answers(answers) for answers in example.answers),
    ]
    return "\n\n".join(parts)


def _answers(answers: Answers) -> str:
    def cell(listed: list, place: int) -> str:
        if place >= len(listed):
            return ""
        answer = listed[place]
        score = "" if answer.log_likelihood is None else f" ({answer.log_likelihood:.2f})"
        return answer.text + score + (" ✓ true" if answer.text == answers.truth else "")

    sides = answers.with_user, answers.without_user
    rows = [(str(i + 1), *(cell(side, i) for side in sides)) for i in range(max(map(len, sides)))]
    heading = f"**{escape(label(answers.task, TASKS))}**, true answer: {escape(answers.truth or 'none for this user')}"
    return heading + "\n\n" + _table(("", "With this user", "Without the user"), rows, align="rll")


def _attention(run: RunRecord) -> str:
    example = figures.attended_example(run)
    if example is None:
        return _missing("Attention", "no attention weights were recorded in examples.json")
    rows = [
        (e.title, str(ago), f"{100 * (e.attention or 0.0):.1f} %")
        for ago, e in example.most_attended(_SHOWN_EVENTS)
    ]
    table = _table(("Most attended event", "Events ago", "Share"), rows)
    return f"User {escape(example.user)}.\n\n{_picture('attention')}\n\n{table}"


def _training(run: RunRecord, drawn: list[str]) -> Iterable[str]:
    for stage in run.history:
        names = [name for kind in figures.TRAINING if (name := f"{kind}-{stage}") in drawn]
        if f"loss-{stage}" not in names:
            yield _missing(label(stage, STAGES), f"{stage}/log_history.json has no losses or is not there")
        yield from map(_picture, names)


def _trainable(run: RunRecord) -> str:
    groups = wording.trainable(run)
    if not groups:
        return _missing("Trainable parameters", "metrics.json records none")
    groups.append(("in all", sum(count for _, count in groups)))
    return _table(("Group", "Parameters"), [(name, f"{count:,}") for name, count in groups])


def _knowledge(run: RunRecord) -> str:
    rows = wording.knowledge(run)
    if not rows:
        return _missing("Knowledge kept", "metrics.json records none")
    table = _table(("Who read a general English text", "Perplexity", "Against the base LM"), rows)
    return f"{table}\n\n{wording.knowledge_note(run)}"


def _timings(run: RunRecord) -> str:
    stages = wording.timings(run)
    if not stages:
        return _missing("Timings", "metrics.json records none")
    stages.append(("in all", sum(seconds for _, seconds in stages)))
    table = _table(("Stage", "Time"), [(name, wording.duration(seconds)) for name, seconds in stages])
    peak = wording.peak_memory(run)
    return table if peak is None else f"{table}\n\n{peak}"


def _picture(name: str) -> str:
    return f"![{figures.caption(name)}](figures/{name}.png)"


def _missing(what: str, where: str) -> str:
    return f"*{what}: left out, {where}.*"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], align: str = "") -> str:
    """A table, aligned left then right, right, ... unless ``align`` has a letter (l, r) for each column."""
    head = list(head)
    align = align or "l" + "r" * (len(head) - 1)
    rule = ["---:" if side == "r" else "---" for side in align]
    lines = [head, rule, *([escape(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
