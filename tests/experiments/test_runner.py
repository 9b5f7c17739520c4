import json
import os
import shutil
import signal
import sys
import time
from threading import Thread

import pytest
import torch
import transformers
import yaml
from filelock import FileLock

import userllm
from userllm.cli import main
from userllm.errors import UserError
from userllm.experiments import runner as runner_module
from userllm.experiments.cells import CellStore
from userllm.experiments.definition import experiment_names, load_experiment, settings_hash
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
    assert (
        f"torch {torch.__version__}, transformers {transformers.__version__}" in told["metrics"]["software"]
    )
    page = write_experiment_report(FAMILY, "smoke", out, extra=QUICK).with_suffix(".md").read_text("utf-8")
    assert f"- Software: userllm {userllm.__version__}, Python " in page
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
    assert runner.run([FAMILY], "smoke", only=["reference", "proj"], extra=QUICK) == []
    assert calls == []


def test_other_data_is_not_taken_for_done(done, tmp_path):
    """Where files lie is not in the hash of a cell; what they hold must be what it was run on."""
    from userllm.data.sources.synthetic import prepare_synthetic_reviews

    prepare_synthetic_reviews(tmp_path / "mine")
    runner = Runner(done[0], lambda _: 1)
    with pytest.raises(UserError, match=r"smoke-proj.*was run on synthetic.*and data.folder .*mine holds"):
        runner.run([FAMILY], "smoke", only=["proj"], extra=[*QUICK, f"data.folder={tmp_path / 'mine'}"])


def test_half_a_copy_of_the_shared_stage_is_not_gone_on_with(done, tmp_path, monkeypatch):
    shutil.copytree(done[0] / "work" / "runs", tmp_path / "work" / "runs")

    def cut_off(first, folder, **_):
        folder.mkdir()
        shutil.copy(first / "stages.json", folder)
        raise KeyboardInterrupt

    runner = Runner(tmp_path, main, say=lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            runner.run([FAMILY], "smoke", only=["proj"], extra=QUICK)
    assert runner.run([FAMILY], "smoke", only=["proj"], extra=QUICK) == []


def test_cells_merge_by_copying(done, tmp_path):
    for file in (done[0] / "cells").glob("smoke-proj-*"):
        (tmp_path / "cells").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "cells")
    runner = Runner(tmp_path, lambda _: 1)
    failed = runner.run([FAMILY], "smoke", only=["reference", "proj"], extra=QUICK)
    assert [name.split("-")[1] for name in failed] == ["reference"]


def test_a_cell_that_fails_costs_the_others_nothing(done, tmp_path):
    """The first cell crashes in its own process; the second is done."""
    calls = []

    def launch(arguments):
        calls.append(arguments)
        return 1 if "proj" in arguments[1] else main(arguments)

    shutil.copytree(done[0] / "work" / "runs", tmp_path / "work" / "runs")
    runner = Runner(tmp_path, launch, keep=True)
    failed = runner.run([FAMILY], "smoke", only=["proj", "reference"], extra=QUICK)
    assert [name.split("-")[1] for name in failed] == ["proj"]
    assert commands(calls) == ["pretrain", "evaluate", "evaluate"]  # which finds it done
    assert len(list((tmp_path / "cells").glob("*.json"))) == 1
    kept = [path for path in (tmp_path / "work" / "runs").glob("smoke-reference*") if path.is_dir()]
    assert (kept[0] / "contextualize" / "model" / "config.json").is_file()


def test_a_shared_stage_of_another_version_is_done_again_for_all(done, tmp_path):
    shutil.copytree(done[0] / "work" / "runs", tmp_path / "work" / "runs")
    shared = next((tmp_path / "work" / "runs").glob("stage1-*")) / "stages.json"
    records = json.loads(shared.read_text())
    records["pretrain"]["settings"] = "what another version would call them"
    shared.write_text(json.dumps(records))
    runner = Runner(tmp_path, main, keep=True)
    assert runner.run([FAMILY], "smoke", only=["proj"], extra=QUICK) == []
    again = json.loads(shared.read_text())["pretrain"]
    cell = next((tmp_path / "work" / "runs").glob("smoke-proj-*/stages.json"))
    assert again["settings"] != records["pretrain"]["settings"]
    assert json.loads(cell.read_text())["pretrain"] == again


def test_a_damaged_cell_is_named(done, tmp_path):
    shutil.copytree(done[0] / "cells", tmp_path / "cells")
    file = next((tmp_path / "cells").glob("smoke-proj-*.json"))
    file.write_text("{")
    with pytest.raises(UserError, match=file.name):
        Runner(tmp_path, lambda _: 1).run([FAMILY], "smoke", only=["proj"], extra=QUICK)


def test_the_list_counts_cells(done, capsys):
    where = ["--scale", "smoke", "--out", str(done[0]), "--set", *QUICK]
    assert main(["experiments", "list", *where]) == 0
    said = capsys.readouterr().out
    assert "family: " in said and "(2 of " in said and "1/1 proj" in said


def test_an_unknown_cell(capsys):
    assert main(["experiments", "run", "family", "--only", "nothing"]) == 2
    assert "no cell 'nothing'" in capsys.readouterr().err


def test_a_setting_that_cannot_be_is_said_once_before_any_cell(tmp_path, capsys):
    where = ["--scale", "smoke", "--out", str(tmp_path / "out")]
    for wrong, problem in (("foo.bar=1", "foo"), ("threads=0", "threads is 0; it must be at least 1")):
        assert main(["experiments", "run", "ablations", *where, "--set", wrong]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("error:") == 1
        assert said.err.startswith("error: ablations, cell ") and problem in said.err
    assert not (tmp_path / "out").exists()


def test_at_scale_smoke_a_crash_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    """The cells run in this process there, and yet one that crashes is shown and the others go on."""
    calls = []

    def crash(arguments):
        calls.append(arguments.config)
        raise RuntimeError("out of luck")

    monkeypatch.setattr("userllm.cli.pretrain.run", crash)
    where = ["--scale", "smoke", "--out", str(tmp_path)]
    assert main(["experiments", "run", "ablations", *where]) == 2
    said = capsys.readouterr().err
    assert "RuntimeError: out of luck" in said and "4 cells failed" in said
    assert len(calls) == 4


def test_interrupting_a_cell_in_this_process_stops_all(tmp_path, monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("userllm.cli.pretrain.run", interrupt)
    assert main(["experiments", "run", "ablations", "--scale", "smoke", "--out", str(tmp_path)]) == 130
    assert "failed; the other cells" not in capsys.readouterr().out


@pytest.mark.slow  # some sixty cells of two to three seconds
@pytest.mark.timeout(1800)
def test_every_experiment(tmp_path, capsys):
    """Every cell of every experiment at scale smoke, and the page of them all: `make smoke` does the same."""
    where = ["--scale", "smoke", "--out", str(tmp_path)]
    assert main(["experiments", "run", "all", *where]) == 0
    assert main(["experiments", "report", *where]) == 0
    text = (tmp_path / "report-smoke.md").read_text(encoding="utf-8")
    assert ", 0 not run." in text and "Cells not run" not in text
    for name in experiment_names():
        assert load_experiment(name).title in text
    for file in (tmp_path / "cells").glob("*.json"):
        assert json.loads(file.read_text())["metrics"]["dataset"]["name"].startswith("synthetic")
    capsys.readouterr()
    assert main(["experiments", "run", "all", *where]) == 0
    assert "failed" not in capsys.readouterr().out


def test_a_slower_machine_is_given_more_seconds_and_says_so(done, tmp_path):
    shutil.copytree(done[0] / "work" / "runs", tmp_path / "work" / "runs")
    runner = Runner(tmp_path, main, say=lambda _: None, pace=(1.5, 1.5))
    assert runner.run([FAMILY], "smoke", only=["proj"], extra=QUICK) == []
    cell = CellStore(tmp_path).find(settings_hash(FAMILY.settings("proj", "smoke", 0, QUICK)))
    assert cell is not None and cell.pace == (1.5, 1.5)
    assert cell.told["settings"]["contextualize"]["seconds"] == 0.2
    assert cell.told["config"]["contextualize"]["seconds"] == pytest.approx(0.3)
    assert cell.metrics["training"]["seconds"] >= 0.3
    assert cell.told["config"]["pretrain"]["seconds"] == pytest.approx(0.15)
    page = (
        write_experiment_report(FAMILY, "smoke", tmp_path, extra=QUICK).with_suffix(".md").read_text("utf-8")
    )
    assert "given 1.5 times the seconds" in page
    [costs] = [line for line in page.splitlines() if line.startswith("| Row | trainable")]
    assert "| pace |" in costs


def test_the_pace_is_what_the_steps_of_the_reference_take(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "out")
    runner = Runner(tmp_path / "out", main, say=lambda _: None)
    reference = CellStore(done[0]).find(settings_hash(FAMILY.settings("reference", "smoke", 0, QUICK)))
    assert reference is not None and reference.pace == (1, 1)
    steps = reference.metrics["training"]["steps"]
    whole = runner.measured_pace(FAMILY, "smoke", QUICK)
    assert whole.steps == steps and whole.here > 0
    assert whole.there == pytest.approx(reference.metrics["training"]["seconds"])
    assert whole.factor == pytest.approx(whole.here / whole.there)
    one = runner.measured_pace(FAMILY, "smoke", QUICK, steps=1)
    assert (one.steps, one.there) == (1, pytest.approx(whole.there / steps))
    left = {path.name.split("-")[0] for path in (tmp_path / "out" / "work" / "runs").iterdir()}
    assert left == {"stage1"}
    assert runner.measured_pace(FAMILY, "smoke", QUICK, steps=1, cell="proj").factor > 0


def test_a_pace_needs_no_stage_1(done, tmp_path):
    shutil.copytree(done[0] / "cells", tmp_path / "cells")
    Runner(tmp_path, main, say=lambda _: None).measured_pace(FAMILY, "smoke", QUICK, steps=1)
    (file,) = (tmp_path / "work").glob("stage1-*.yaml")
    assert yaml.safe_load(file.read_text("utf-8"))["pretrain"] is None


@pytest.mark.slow  # a cell, as those around it
def test_the_stages_may_have_paces_of_their_own(done, tmp_path):
    told = CellStore(done[0]).find(settings_hash(FAMILY.settings("proj", "smoke", 0, QUICK)))
    assert told is not None and told.pace == (1, 1)
    shutil.copytree(done[0] / "cells", tmp_path / "cells")
    file = tmp_path / "cells" / told.file.name
    for pace, says in (
        ([1.0, 2.5], "given 1 times the seconds of stage 1 and 2.5 times those"),
        (2.5, "given 2.5 times"),
    ):
        file.write_text(json.dumps(told.told | {"pace": pace}))
        page = write_experiment_report(FAMILY, "smoke", tmp_path, extra=QUICK).with_suffix(".md")
        assert says in page.read_text("utf-8")


def test_a_pace_needs_a_stored_reference_of_so_many_seconds(done, tmp_path):
    with pytest.raises(UserError, match=r"no cell reference \(seed 0, scale smoke\) of family"):
        Runner(tmp_path, lambda _: 1).measured_pace(FAMILY, "smoke", QUICK)


@pytest.mark.parametrize(
    ("said", "why"), [(["--pace", "0"], "--pace is 0"), (["--pace", "1", "nan"], "--pace is 1 nan")]
)
def test_a_pace_that_cannot_be_is_refused(said, why, tmp_path, capsys):
    assert main(["experiments", "run", "family", "--out", str(tmp_path), *said]) == 2
    assert why in capsys.readouterr().err


def test_the_pace_as_a_command(done, tmp_path, capsys):
    shutil.copytree(done[0], tmp_path / "out")
    command = ["experiments", "pace", "family", "--scale", "smoke", "--out", str(tmp_path / "out")]
    assert main([*command, "--steps", "1", "--set", *QUICK]) == 0
    assert "family, reference: stage 2 of 1 steps took" in (said := capsys.readouterr().out)
    assert float(said.split("--pace ")[1]) > 0
    assert main([*command, "--steps", "0"]) == 2


def test_without_a_pace_the_shared_stage_keeps_its_name(tmp_path):
    """Whole seconds stay whole, so that a stage 1 that lies there is found."""
    settings = FAMILY.settings("proj", "cpu", 0)
    calls = []
    Runner(tmp_path, lambda arguments: calls.append(arguments) or 1, say=lambda _: None).run(
        [FAMILY], "cpu", only=["proj"]
    )
    mine = {key: settings[key] for key in ("data", "split", "encoder", "pretrain", "seed") if key in settings}
    assert calls[0][1].endswith(f"stage1-{settings_hash(mine)}.yaml")


@pytest.mark.slow  # four processes, each of which loads torch
def test_several_cells_at_a_time_share_one_stage_1(tmp_path):
    """Each cell in a process of its own: the results are those of one after the other."""
    said = []
    runner = Runner(tmp_path, lambda _: 1, say=said.append, jobs=3)
    steps = [*QUICK, "contextualize.seconds=null", "contextualize.steps=2", "pretrain.seconds=null"]
    steps += ["pretrain.epochs=1", "evaluation.users=4"]
    both = [FAMILY, load_experiment("integration")]
    assert runner.run(both, "smoke", only=["reference", "proj"], extra=steps) == []
    assert len(said) == 2  # the experiments share them
    cells = [
        CellStore(tmp_path).find(settings_hash(FAMILY.settings(cell, "smoke", 0, steps)))
        for cell in ("reference", "proj")
    ]
    assert all(cell is not None for cell in cells)
    logs = {file.name.split("-")[0] for file in (tmp_path / "work").glob("*.log")}
    assert logs == {"stage1", "smoke"}
    [first] = (tmp_path / "work").glob("stage1-*.log")
    assert first.read_text().count("done before") == 0
    one = Runner(tmp_path / "one", main, say=said.append)
    assert one.run([FAMILY], "smoke", only=["proj"], extra=steps) == []
    alone = CellStore(tmp_path / "one").find(settings_hash(FAMILY.settings("proj", "smoke", 0, steps)))
    assert alone.metrics["tasks"] == cells[1].metrics["tasks"]


@pytest.mark.slow  # two processes, each of which loads torch
def test_of_several_at_a_time_one_may_fail(tmp_path):
    said = []
    runner = Runner(tmp_path, main, say=said.append, jobs=2)
    bad = [
        *QUICK,
        "pretrain=null",
        "evaluation.users=4",
        "contextualize.seconds=null",
        "contextualize.steps=0",
    ]
    failed = runner.run([FAMILY], "smoke", only=["reference"], extra=bad)
    assert len(failed) == 1 and "failed (see " in said[-1]
    [log] = (tmp_path / "work").glob("smoke-reference-*.log")
    assert "contextualize.steps is 0" in log.read_text()


def test_jobs_that_cannot_be_are_refused(tmp_path, capsys):
    assert main(["experiments", "run", "family", "--out", str(tmp_path), "--jobs", "0"]) == 2
    assert "--jobs is 0" in capsys.readouterr().err


def test_a_cell_that_another_runner_did_in_the_meantime_is_not_done_again(done, tmp_path):
    calls, said = [], []

    def launch(arguments):
        calls.append(arguments)
        shutil.copytree(done[0] / "cells", tmp_path / "cells", dirs_exist_ok=True)
        return 1

    runner = Runner(tmp_path, launch, say=said.append)
    failed = runner.run([FAMILY], "smoke", only=["reference", "proj"], extra=QUICK)
    assert [name.split("-")[1] for name in failed] == ["reference"]
    assert len(calls) == 1 and "in the meantime" in said[-1]


def test_ctrl_c_is_the_end_of_every_job(tmp_path, monkeypatch):
    """A process that was interrupted is no failed cell, and nothing is started after it."""
    calls = []

    def interrupted(command, output):
        calls.append(command)
        return 130

    monkeypatch.setattr("userllm.experiments.runner.in_own_process", interrupted)
    said = []
    runner = Runner(tmp_path, lambda _: 1, say=said.append, jobs=2)
    with pytest.raises(KeyboardInterrupt):
        runner.run([FAMILY], "smoke", only=["reference", "proj", "mlp"], extra=QUICK)
    assert len(calls) == 1  # the second one waited for the stage 1 that they share
    assert not any("failed" in line for line in said)


@pytest.mark.parametrize("jobs", [1, 2])
def test_sigterm_reaches_the_processes(tmp_path, monkeypatch, jobs):
    """As a scheduler sends it: to the runner alone."""
    script = tmp_path / "sleeper.py"
    script.write_text(
        "import os, pathlib, sys, time\npathlib.Path(sys.argv[0]).with_suffix('.pid').write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    own = runner_module.subprocess.Popen
    monkeypatch.setattr(
        runner_module.subprocess, "Popen", lambda command, **how: own([sys.executable, str(script)], **how)
    )

    def send() -> None:
        while not (script.with_suffix(".pid").is_file() and script.with_suffix(".pid").read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = Thread(target=send, daemon=True)
    said = []
    sender.start()
    began = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        Runner(tmp_path, say=said.append, jobs=jobs).ended_by_sigterm() as runner,
    ):
        runner.run([FAMILY], "smoke", only=["reference", "proj"], extra=QUICK)
    sender.join()
    child = int(script.with_suffix(".pid").read_text())
    while time.monotonic() < began + 30:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    assert time.monotonic() < began + 30
    assert not any("failed" in line for line in said)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_two_runners_do_a_cell_once(done, tmp_path):
    """The second one waits for the first, and finds the cell."""
    settings = FAMILY.settings("proj", "smoke", 0, QUICK)
    cell = CellStore(done[0]).find(settings_hash(settings))
    said, calls = [], []
    runner = Runner(tmp_path, lambda arguments: calls.append(arguments) or 1, say=said.append)
    (tmp_path / "work").mkdir()
    second = Thread(target=runner.run, args=([FAMILY], "smoke", None, ["proj"], QUICK))
    with FileLock(tmp_path / "work" / f"{cell.file.stem}.lock"):
        second.start()
        second.join(0.5)
        assert second.is_alive() and said == []
        shutil.copytree(done[0] / "cells", tmp_path / "cells")
    second.join(20)
    assert calls == [] and "done by another runner" in said[0]


@pytest.mark.parametrize("jobs", [1, 2])
def test_runners_share_the_work(done, tmp_path, monkeypatch, jobs):
    """One that meets a cell of another's goes on to the next, and comes back to it at the end."""
    names = ["reference", "proj"]
    digests = [settings_hash(FAMILY.settings(name, "smoke", 0, QUICK)) for name in names]
    held, free = (CellStore(done[0]).find(digest) for digest in digests)
    (tmp_path / "work").mkdir()
    lock = FileLock(tmp_path / "work" / f"{held.file.stem}.lock", thread_local=False)
    said, order = [], []

    def cell(self, name, settings, told):
        order.append(name)
        if name == free.file.stem:
            lock.release()
        return held

    monkeypatch.setattr(Runner, "_cell", cell)
    lock.acquire()
    runner = Runner(tmp_path, say=said.append, jobs=jobs)
    assert runner.run([FAMILY], "smoke", only=names, extra=QUICK) == []
    assert order == [free.file.stem, held.file.stem]
    assert [line.split(": ")[1] for line in said] == order


def test_a_cell_with_half_its_numbers_is_named(done, tmp_path):
    shutil.copytree(done[0] / "cells", tmp_path / "cells")
    cell = CellStore(tmp_path).find(settings_hash(FAMILY.settings("proj", "smoke", 0, QUICK)))
    whole = cell.file.with_suffix(".parquet").read_bytes()
    cell.file.with_suffix(".parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{cell.file.stem}\.parquet: cannot be read .* run it again"):
        write_experiment_report(FAMILY, "smoke", tmp_path, extra=QUICK)
    cell.file.write_text('{"format_version": 1}')
    with pytest.raises(UserError, match=rf"{cell.file.stem}\.json: not a whole cell"):
        write_experiment_report(FAMILY, "smoke", tmp_path, extra=QUICK)


def test_a_launcher_of_several_processes_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["experiments", "run", "family", "--out", str(tmp_path)]) == 2
    assert "several cells at a time are --jobs N" in capsys.readouterr().err


def test_every_cells_settings_are_checked_before_the_first_runs(tmp_path, capsys):
    command = ["experiments", "run", "family", "--scale", "smoke", "--out", str(tmp_path)]
    assert main([*command, "--only", "reference", "dual", "--set", "encoder.positions=learned"]) == 2
    assert "family, cell dual: " in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
