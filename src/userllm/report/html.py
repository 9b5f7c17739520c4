"""The report as one HTML page that opens offline, beside the same as Markdown."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from userllm.report import figures, markdown, wording
from userllm.report.current import check_current
from userllm.report.record import RunRecord, read_run
from userllm.whole_file import write_text

SHOWN_EVENTS = 10
"""A user's latest events on show; the earlier ones fold away."""
MOST_ATTENDED = 10


def write_report(run: Path) -> Path:
    """Write report.html, report.md and figures/*.png into a run folder, from its files; returns the page.

    Parts whose numbers the folder lacks are left out, and the report says so. Raises UserError where
    metrics.json is missing, or of other settings than config.yaml's, and where a file is not JSON or of another shape
    than a run's.
    """
    check_current(run)
    record = read_run(run)
    drawn = figures.draw(record)
    folder = run / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in drawn.items():
        figures.save_png(figure, folder / f"{name}.png")
    page = run / "report.html"
    write_text(page, render(record, drawn))
    write_text(run / "report.md", markdown.render(record, list(drawn)))
    return page


def page_template(package: str) -> Template:
    """``page.html.jinja`` of ``userllm.<package>``. Everything a user or publisher wrote is escaped."""
    environment = Environment(
        loader=PackageLoader("userllm", package),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")


def render(run: RunRecord, drawn: dict[str, Figure]) -> str:
    """The page as text."""
    attended = figures.attended_example(run)
    return page_template("report").render(
        run=run,
        images={name: figures.data_uri(figure) for name, figure in drawn.items()},
        caption=figures.caption,
        training=figures.TRAINING,
        summary=wording.summary(run),
        standing=wording.standing(run),
        checks=wording.checks(run),
        what_ran=wording.what_ran(run),
        trainable=wording.trainable(run),
        knowledge=wording.knowledge(run),
        knowledge_note=wording.knowledge_note(run) if run.knowledge else "",
        timings=wording.timings(run),
        peak_memory=wording.peak_memory(run),
        notes=run.metrics.get("notes", []),
        attended=attended,
        most_attended=attended.most_attended(MOST_ATTENDED) if attended else [],
        shown_events=SHOWN_EVENTS,
        **{name: getattr(wording, name) for name in ("SYSTEMS", "TASKS", "GAINS", "METRICS", "STAGES")},
        **{
            name: getattr(wording, name)
            for name in ("label", "number", "duration", "users", "remarks", "context_mark")
        },
    )
