"""Twelve users of a small cinema, written as MovieLens-1M is, and one whole run over them from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from userllm.cli import main

ROOT = Path(__file__).parents[2]

MOVIES = """\
1::Toy Story (1995)::Animation|Children's|Comedy
2::Jumanji (1995)::Adventure|Children's|Fantasy
6::Heat (1995)::Action|Crime|Thriller
9::Sudden Death (1995)::Action
10::GoldenEye (1995)::Action|Adventure|Thriller
11::American President, The (1995)::Comedy|Drama|Romance
16::Casino (1995)::Drama|Thriller
17::Sense and Sensibility (1995)::Drama|Romance
21::Get Shorty (1995)::Action|Comedy|Drama
25::Leaving Las Vegas (1995)::Drama|Romance
32::Twelve Monkeys (1995)::Drama|Sci-Fi
34::Babe (1995)::Children's|Comedy|Drama
39::Clueless (1995)::Comedy|Romance
47::Seven (Se7en) (1995)::Crime|Thriller
50::Usual Suspects, The (1995)::Crime|Thriller
73::Misérables, Les (1995)::Drama|Musical
110::Braveheart (1995)::Action|Drama|War
111::Taxi Driver (1976)::Drama|Thriller
150::Apollo 13 (1995)::Drama
260::Star Wars: Episode IV - A New Hope (1977)::Action|Adventure|Fantasy|Sci-Fi
296::Pulp Fiction (1994)::Crime|Drama
318::Shawshank Redemption, The (1994)::Drama
364::Lion King, The (1994)::Animation|Children's|Musical
480::Jurassic Park (1993)::Action|Adventure|Sci-Fi
"""

HISTORIES = {  # user -> items, oldest first
    1: "1 34 364 2 39 11 17 150",
    2: "6 47 50 16 111 296 32 9 10",
    3: "260 480 10 110 32 2",
    4: "17 11 25 39 73 318 150",
    5: "1 364 2 34 480 260 39",
    6: "296 50 47 6 318 111 21 16 32 110",
    7: "9 10 6 480 110 21",
    8: "73 17 25 11 318",
    9: "39 11 34 1 17 364 2",
    10: "318 150 296 110 260 50 47 25",
    11: "2 1 480 260 32 10 9",
    12: "16 111 25 50 296 6 318 73 21",
}

CONFIG = """\
name: demo
threads: 1
data: {release: movielens, path: raw}
encoder: {layers: 1, width: 16, heads: 2, feed_forward: 32, item_width: 16, field_width: 4, max_length: 12}
pretrain: {epochs: 2, batch: {events: 24}}
lm: {name: tiny-random-llama}
fusion: {layers: "last:2", events: 8, cross_attention: {heads: 2, head_width: 8}}
tasks:
  next_item: {prompt: The next movie this user will watch is, teacher: 0.5}
  favorite_genre: {kind: favorite_category, prompt: This user's favorite movie genre is}
contextualize: {steps: 6, histories: 4, examples_per_history: 2}
evaluation: {list_length: 10, beams: 10, batch: 8}
"""


def write_release(folder: Path) -> Path:
    """movies.dat and ratings.dat in a folder; every third event has the time of the one before it."""
    folder.mkdir()
    (folder / "movies.dat").write_bytes(MOVIES.encode("latin-1"))
    lines = [
        f"{user}::{item}::{1 + (user * int(item)) % 5}::{978300000 + 60 * (place - (place % 3 == 2))}\n"
        for user, items in HISTORIES.items()
        for place, item in enumerate(items.split())
    ]
    (folder / "ratings.dat").write_text("".join(lines))
    return folder


@dataclass
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error; whatever else stands on stderr says where files came from."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert "Traceback" not in self.err
        [line] = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.err.rstrip().endswith(line)
        return line


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `userllm run config.yaml` has gone through, in a process of its own."""
    folder = tmp_path_factory.mktemp("work")
    write_release(folder / "raw")
    (folder / "config.yaml").write_text(CONFIG)
    environment = os.environ | {"USERLLM_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "userllm", "run", "config.yaml"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return folder


@pytest.fixture
def userllm(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Said]:
    """Runs a command in this process, in the folder of the finished run unless another one is given."""
    monkeypatch.setenv("USERLLM_CACHE", str(finished / "cache"))

    def run(*argv: object, cwd: Path = finished) -> Said:
        monkeypatch.chdir(cwd)
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return Said(code, *capsys.readouterr())

    return run
