import subprocess
import sys

import pytest

LIGHT = """
import sys
from userllm.cli import main
assert main(["data", "prepare", "movielens", "--path", "raw", "--out", sys.argv[1]]) == 0
assert main(["data", "inspect", sys.argv[1], "--user", "8"]) == 0
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {"torch", "transformers", "matplotlib", "jsonargparse", "sklearn"} & set(sys.modules)
assert not heavy, heavy
"""


def test_prepare_inspect_and_help_without_torch(finished, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, tmp_path / "tiny"], cwd=finished, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "12 users, 24 items (24 with events), 89 events" in done.stdout
    assert "user 7 (id 8): 5 events" in done.stdout
    assert "Misérables, Les (1995)  [Drama, Musical]" in done.stdout
    assert "history lengths: shortest 5, median 7, longest 10" in done.stdout
    assert sorted(p.name[:5] for p in (tmp_path / "tiny").iterdir()) == ["card.", "data-"]


def test_the_default_folder(userllm, finished, tmp_path):
    assert userllm("data", "prepare", "movielens", "--path", finished / "raw", cwd=tmp_path).code == 0
    assert (tmp_path / "data/movielens/card.json").is_file()


@pytest.mark.parametrize(
    "command", [[], ["run"], ["data", "prepare"], ["recommend"], ["generate"], ["report"]]
)
def test_help(command, capsys):
    from userllm.cli import main

    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert "usage: userllm" in capsys.readouterr().out


def test_version(capsys):
    from userllm.cli import main

    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("userllm ")
