"""What the documentation shows is what works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from userllm.cli import build_parser
from userllm.data import read_history

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [
    pytest.param(match[1], id=f"{page.stem}-{number}")
    for page in PAGES
    for number, match in enumerate(
        re.finditer(r"<!-- run -->\n```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    )
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_python_blocks_run(program, finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    monkeypatch.setenv("USERLLM_CACHE", str(finished / "cache"))
    exec(compile(program, "documentation", "exec"), {})
    assert "Traceback" not in capsys.readouterr().err


def test_there_are_python_blocks_to_run():
    assert len(PROGRAMS) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_commands(page):
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if line.startswith("userllm "):
            build_parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_example_history_is_one():
    assert len(read_history(ROOT / "examples" / "history.json")) == 3
