"""What a report is made of, and how that is written: Markdown, and one HTML page that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from userllm.report.figures import data_uri, save_png
from userllm.report.html import page_template
from userllm.report.markdown import escape
from userllm.whole_file import write_text

NOTHING = "–"
"""What a table says where there is no number."""


@dataclass
class Table:
    """A table as texts; the first column is a row's name. Without a title it is its section's only table."""

    title: str
    about: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    folded: bool = False
    """Whether the HTML page shows it only when asked."""
    kind: str = "table"

    def without_empty_columns(self) -> Table:
        """The same, less the columns in which no row says anything."""
        said = [n for n in range(len(self.columns)) if any(row[n] != NOTHING for row in self.rows)]
        rows = [[row[n] for n in said] for row in self.rows]
        return Table(self.title, self.about, [self.columns[n] for n in said], rows, self.folded)


@dataclass
class Picture:
    """A figure. name: of its file, without ending; caption: also for those who cannot see it."""

    name: str
    caption: str
    figure: Figure
    kind: str = "picture"


@dataclass
class Texts:
    """What several systems wrote about one user. texts: (who, text), the user's own first."""

    title: str
    prompt: str
    texts: list[tuple[str, str]]
    kind: str = "texts"


@dataclass
class Notes:
    """A list of sentences."""

    sentences: Sequence[str]
    kind: str = "notes"


Part = Table | Picture | Texts | Notes


@dataclass
class Section:
    """A part of the page with a heading of its own; ``name`` is what links go to."""

    name: str
    title: str
    about: str
    parts: list[Part]


@dataclass
class Page:
    """A whole report. facts: what was run, (what, value). command: what writes the page again."""

    title: str
    lead: str
    facts: list[tuple[str, str]]
    sections: list[Section]
    command: str


def write_page(page: Page, file: Path) -> None:
    """Write ``file`` (HTML), the same as Markdown beside it, and the figures for that as figures/<file>-<name>.png."""
    folder = file.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for section in page.sections:
        for part in section.parts:
            if isinstance(part, Picture):
                save_png(part.figure, folder / f"{file.stem}-{part.name}.png")
    write_text(file, page_template("experiments").render(page=page, data_uri=data_uri))
    write_text(file.with_suffix(".md"), as_markdown(page, f"figures/{file.stem}"))


def as_markdown(page: Page, figures: str) -> str:
    """The page as text; ``figures``: where its figures lie, up to "-<name>.png"."""
    parts = [f"# {escape(page.title)}", escape(page.lead)]
    parts.append("\n".join(f"- {escape(name)}: {escape(value)}" for name, value in page.facts))
    for section in page.sections:
        parts += [f"## {escape(section.title)}", escape(section.about)]
        parts += [_markdown(part, figures) for part in section.parts]
    parts.append(f"Written by `{page.command}` from the files in cells/.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(part: Part, figures: str) -> str:
    match part:
        case Picture(name, caption):
            return f"![{escape(caption)}]({figures}-{name}.png)"
        case Table(title, about, columns, rows):
            heading = f"### {escape(title)}" if title else ""
            return "\n\n".join(filter(None, (heading, escape(about), _rows(columns, rows))))
        case Texts(title, prompt, texts):
            heading = f"### {escape(title)}\n\nAsked: {escape(prompt)}"
            return f"{heading}\n\n{_rows(['', 'Text'], [list(pair) for pair in texts])}"
        case Notes(sentences):
            return "\n".join(f"- {escape(sentence)}" for sentence in sentences)


def _rows(columns: list[str], rows: list[list[str]]) -> str:
    lines = [[escape(cell) for cell in line] for line in (columns, *rows)]
    lines.insert(1, ["---"] * len(columns))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
