import json
import shutil
from dataclasses import replace

import pytest

from userllm.cli import main
from userllm.errors import UserError
from userllm.experiments.cells import CellStore
from userllm.experiments.definition import experiment_names, load_experiment, settings_hash
from userllm.experiments.figures import length_figure
from userllm.experiments.report import write_experiment_report
from userllm.experiments.runner import Runner

from .conftest import QUICK

FAMILY = load_experiment("family")


def commands(calls):
    return [call[0] for call in calls]


def test_equal_stages_are_done_once(done):
    assert commands(done[1]) == ["pretrain", "evaluate", "evaluate"]


def test_a_cell_tells_everything(done):
    out, _ = done
    cell = CellStore(out).find(settings_hash(FAMILY.settings("proj", "smoke", 0, QUICK)))
    assert cell is not None
    told = cell.told
    assert (told["experiment"], told["cell"], told["scale"], cell.seed) == ("family", "proj", "smoke", 0)
    assert told["config"]["contextualize"]["strategy"]["name"] == "proj"
    assert told["commit"] and told["hardware"] and told["date"]
    training = told["metrics"]["training"]
    assert training["steps"] >= 1 and training["examples"] == 8 * training["steps"]
    assert training["seconds"] >= 0.2
    assert set(told["metrics"]["cpu_s"]) == {"data", "pretrain", "contextualize", "evaluate"}
    rows = cell.per_user()
    assert rows.columns == ["task", "user", "system", "rank", "log_likelihood"]
    mine = rows.filter(task="next_item", system="user_llm")
    assert len(mine) == 12
    share = (mine["rank"].is_between(1, 10)).mean()
    assert share == pytest.approx(cell.metrics["tasks"]["next_item"]["user_llm"]["recall@10"]["value"])


def test_both_cells_answer_for_the_same_users(done):
    out, _ = done
    users = [
        set(CellStore(out).find(settings_hash(FAMILY.settings(cell, "smoke", 0, QUICK))).per_user()["user"])
        for cell in ("reference", "proj")
    ]
    assert users[0] == users[1]


def test_run_folders_go_and_shared_stages_stay(done):
    left = sorted(path.name for path in (done[0] / "work" / "runs").iterdir())
    assert len(left) == 1 and left[0].startswith("stage1-")


def test_what_is_done_is_not_done_again(done):
    calls = []
    runner = Runner(done[0], lambda arguments: calls.append(arguments) or 1)
    assert runner.run(FAMILY, "smoke", only=["reference", "proj"], extra=QUICK) == []
    assert calls == []


def test_cells_merge_by_copying(done, tmp_path):
    for file in (done[0] / "cells").glob("smoke-proj-*"):
        (tmp_path / "cells").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "cells")
    runner = Runner(tmp_path, lambda _: 1)
    failed = runner.run(FAMILY, "smoke", only=["reference", "proj"], extra=QUICK)
    assert [name.split("-")[1] for name in failed] == ["reference"]


def test_a_cell_that_fails_costs_the_others_nothing(done, tmp_path):
    """The first cell crashes in its own process; the second is done."""
    calls = []

    def launch(arguments):
        calls.append(arguments)
        return 1 if "proj" in arguments[1] else main(arguments)

    shutil.copytree(done[0] / "work" / "runs", tmp_path / "work" / "runs")
    runner = Runner(tmp_path, launch, keep=True)
    failed = runner.run(FAMILY, "smoke", only=["proj", "reference"], extra=QUICK)
    assert [name.split("-")[1] for name in failed] == ["proj"]
    assert commands(calls) == ["evaluate", "evaluate"]
    assert len(list((tmp_path / "cells").glob("*.json"))) == 1
    kept = [path for path in (tmp_path / "work" / "runs").glob("smoke-reference*") if path.is_dir()]
    assert (kept[0] / "contextualize" / "model" / "config.json").is_file()


def test_a_damaged_cell_is_named(done, tmp_path):
    shutil.copytree(done[0] / "cells", tmp_path / "cells")
    file = next((tmp_path / "cells").glob("smoke-proj-*.json"))
    file.write_text("{")
    with pytest.raises(UserError, match=file.name):
        Runner(tmp_path, lambda _: 1).run(FAMILY, "smoke", only=["proj"], extra=QUICK)


def test_the_report(done):
    out, _ = done
    page = write_experiment_report(FAMILY, "smoke", out, extra=QUICK)
    text = page.with_suffix(".md").read_text(encoding="utf-8")
    assert "Cells: 2 of" in text and "synthetic" in text
    assert "0.203 (v1 T13" in text  # the paper's figure for proj
    [row] = [
        line for line in text.splitlines() if "above the projection alone" in line and "Next item" in line
    ]
    assert row.rstrip(" |").endswith("confirmed") or "the other way round" in row
    assert "not run" in text
    assert "<script" not in page.read_text(encoding="utf-8")


def test_score_against_length(done):
    """A line through the cells of a series, at the events and tokens that their language models get."""
    out, _ = done
    cells = {
        name: [CellStore(out).find(settings_hash(FAMILY.settings(name, "smoke", 0, QUICK)))]
        for name in ("reference", "proj")
    }
    assert length_figure(FAMILY, cells, "next_item", "recall@10") is None
    drawn = replace(FAMILY, curves={"one": ("reference", "proj"), "none": ("tp50",)})
    figure = length_figure(drawn, cells, "next_item", "recall@10")
    [line] = figure.axes[0].get_lines()
    assert line.get_xdata().tolist() == [20, 20]
    value = cells["proj"][0].metrics["tasks"]["next_item"]["user_llm"]["recall@10"]["value"]
    assert line.get_ydata()[1] == pytest.approx(value)
    page = write_experiment_report(drawn, "smoke", out, extra=QUICK)
    assert "figures/family-smoke-lengths.png" in page.with_suffix(".md").read_text(encoding="utf-8")


def test_a_report_of_nothing(tmp_path):
    with pytest.raises(UserError, match="no cell of family"):
        write_experiment_report(FAMILY, "smoke", tmp_path)


def test_the_list_counts_cells(done, capsys):
    where = ["--scale", "smoke", "--out", str(done[0]), "--set", *QUICK]
    assert main(["experiments", "list", *where]) == 0
    said = capsys.readouterr().out
    assert "family: " in said and "(2 of " in said and "1/1 proj" in said


def test_an_unknown_cell(capsys):
    assert main(["experiments", "run", "family", "--only", "nothing"]) == 2
    assert "no cell 'nothing'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", experiment_names())
def test_whole(name, whole):
    """Every cell of every experiment, each in its own process, as a user would run it; what two share is done once."""
    where = ["--scale", "smoke", "--out", str(whole)]
    assert main(["experiments", "run", name, *where]) == 0
    assert main(["experiments", "report", name, *where]) == 0
    text = (whole / f"{name}-smoke.md").read_text(encoding="utf-8")
    assert "not run" not in text
    for file in (whole / "cells").glob("*.json"):
        assert json.loads(file.read_text())["metrics"]["dataset"]["name"] == "synthetic"
