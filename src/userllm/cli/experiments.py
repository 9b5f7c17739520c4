"""``userllm experiments``: the papers' comparisons, cell by cell."""

from __future__ import annotations

import argparse
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from userllm.cli.arguments import add_command
from userllm.errors import UserError

if TYPE_CHECKING:
    from userllm.experiments.runner import Launch

SCALES_NOTE = """\
smoke: generated data and a tiny random language model, seconds a cell; its numbers mean nothing
cpu:   SmolLM2-135M on MovieLens-1M and Rent the Runway, a stated budget of CPU seconds a cell
gpu:   the same in full, on one GPU
"""
RUN_NOTE = (
    SCALES_NOTE
    + """
NAME is one of `userllm experiments list`, or a YAML file of your own; "all" is every one of the list. A cell that is
stored is not done again, a run that is killed loses the cell it was at. Cells go to DIR/cells: copy those of several
machines into one folder and they are one result. --set changes every cell, and the report has to be asked for with the
same --set. At scale smoke the cells run in this process, at the others and with --jobs each in its own.
"""
)
PACE_NOTE = (
    SCALES_NOTE
    + """
An experiment whose cells have equal time is done on like machines, or on a slower one at its pace: the CPU seconds it
needs for the steps of the reference that is stored in DIR/cells, to those that the other one needed. It does stage 2 of
that reference once more to know, or of another cell: rows that train the language model may have a pace of their own.
Then `userllm experiments run NAME --pace N` gives both stages of every cell N times their seconds, and `--pace N M`
stage 1 N times and stage 2 M times; the report says so.
"""
)
REPORT_NOTE = (
    SCALES_NOTE
    + """
Without NAME all experiments stand on one page, DIR/report-SCALE.html and .md: an overview with a verdict per claim, a
section for each, and what User-LLM costs. With NAMEs each gets a page of its own, DIR/NAME-SCALE.html and .md.
"""
)


def add_parser(commands: Any) -> None:
    """Add this command."""
    parser = add_command(commands, "experiments", "redo the papers' comparisons, cell by cell")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = add_command(
        actions, "list", "list the experiments and which of their cells are done", SCALES_NOTE
    )
    listing.set_defaults(command=show)
    running = add_command(actions, "run", "do the missing cells of some experiments", RUN_NOTE)
    running.add_argument("names", nargs="+", metavar="NAME", help='experiments, or "all"')
    running.add_argument("--only", nargs="+", metavar="CELL", help="these cells only")
    running.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds (default: the scale's)")
    running.add_argument("--keep", action="store_true", help="keep the run folders, models included")
    running.add_argument(
        "--pace",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="N",
        help="give the stages of each cell N times their seconds, since this machine is so much slower than the "
        "one that did the stored cells (see `userllm experiments pace`); two numbers: stage 1 and stage 2",
    )
    running.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="cells at a time, each with its output in DIR/work/CELL.log; they share the machine, and its GPU",
    )
    running.set_defaults(command=run)
    pacing = add_command(
        actions, "pace", "measure how much slower this machine is than that of the stored cells", PACE_NOTE
    )
    pacing.add_argument("name", metavar="NAME", help="the experiment")
    pacing.add_argument("--cell", metavar="CELL", help="a stored cell (default: the reference)")
    pacing.add_argument(
        "--steps", type=int, metavar="N", help="train N steps only (default: all the stored cell took)"
    )
    pacing.set_defaults(command=pace)
    reporting = add_command(actions, "report", "write the tables and verdicts of what is stored", REPORT_NOTE)
    reporting.add_argument("names", nargs="*", metavar="NAME", help="a page for each (default: one for all)")
    reporting.add_argument(
        "--benchmarks",
        type=Path,
        default=Path("docs/results/benchmarks"),
        metavar="DIR",
        help="where the efficiency measurements are (default: docs/results/benchmarks)",
    )
    reporting.add_argument("--seeds", nargs="+", type=int, metavar="N", help="seeds (default: the scale's)")
    reporting.set_defaults(command=report)
    for action in (listing, running, pacing, reporting):
        action.add_argument(
            "--scale", choices=("smoke", "cpu", "gpu"), default="cpu", help="how large (default: cpu)"
        )
        action.add_argument(
            "--out", type=Path, default=Path("experiments"), metavar="DIR", help="where cells are kept"
        )
        action.add_argument("--set", nargs="+", default=[], metavar="a.b=c", help="settings of every cell")


def show(arguments: argparse.Namespace) -> None:
    """One block per experiment."""
    from userllm.experiments.cells import CellStore
    from userllm.experiments.definition import experiment_names, load_experiment, settings_hash

    store = CellStore(arguments.out)
    for name in experiment_names():
        experiment = load_experiment(name)
        if arguments.scale not in experiment.scales:
            print(f"{name}: {experiment.title} (not at this scale)")
            continue
        seeds = experiment.scale(arguments.scale).seeds
        done = {
            cell: sum(
                store.find(settings_hash(experiment.settings(cell, arguments.scale, seed, arguments.set)))
                is not None
                for seed in seeds
            )
            for cell in experiment.cells
        }
        whole = len(experiment.cells) * len(seeds)
        print(
            f"{name}: {experiment.title} ({sum(done.values())} of {whole} cells done at scale {arguments.scale})"
        )
        for cell, count in done.items():
            print(f"  {count}/{len(seeds)} {cell:<18} {experiment.cell(cell).label}")


def run(arguments: argparse.Namespace) -> None:
    """Every missing cell. Raises UserError at the end where some failed, and at once where settings cannot be."""
    from userllm.cli.configuration import checked_config
    from userllm.experiments.definition import experiment_names, load_experiment
    from userllm.experiments.runner import Runner

    if len(arguments.pace) > 2 or not all(0 < pace < float("inf") for pace in arguments.pace):
        said = " ".join(f"{pace:g}" for pace in arguments.pace)
        raise UserError(f"--pace is {said}; give one number above 0, or one for each of the two stages")
    if arguments.jobs < 1:
        raise UserError(f"--jobs is {arguments.jobs}; it must be at least 1")
    first, second = arguments.pace[0], arguments.pace[-1]
    names = arguments.names
    if names == ["all"]:
        names = [name for name in experiment_names() if arguments.scale in load_experiment(name).scales]
    experiments = [load_experiment(name) for name in names]
    _check_alone("run")
    # before hours go into the first cells; those that ship are known to be right
    for experiment in (one for one in experiments if arguments.set or one.called != one.name):
        for cell in arguments.only or experiment.cells:
            settings = experiment.settings(cell, arguments.scale, 0, arguments.set)
            checked_config(settings, f"{experiment.called}, cell {cell}")
    runner = Runner(
        arguments.out,
        _launch(arguments.scale),
        keep=arguments.keep,
        pace=(first, second),
        jobs=arguments.jobs,
    )
    with runner.ended_by_sigterm():
        failed = runner.run(experiments, arguments.scale, arguments.seeds, arguments.only, arguments.set)
    if failed:
        raise UserError(f"{len(failed)} cells failed: {', '.join(failed)}; what they said stands above")


def pace(arguments: argparse.Namespace) -> None:
    """How long this machine takes beside the one that did the stored reference."""
    from userllm.experiments.definition import load_experiment
    from userllm.experiments.runner import Runner

    if arguments.steps is not None and arguments.steps < 1:
        raise UserError(f"--steps is {arguments.steps}; it must be at least 1")
    _check_alone("pace")
    experiment = load_experiment(arguments.name)
    with Runner(arguments.out, _launch(arguments.scale)).ended_by_sigterm() as runner:
        measured = runner.measured_pace(
            experiment, arguments.scale, arguments.set, arguments.steps, arguments.cell
        )
    print(
        f"{experiment.name}, {arguments.cell or experiment.reference}: "
        f"stage 2 of {measured.steps:,} steps took {measured.here:,.0f} CPU "
        f"seconds here and {measured.there:,.0f} on {measured.hardware}\n--pace {measured.factor:.2f}"
    )


def _check_alone(action: str) -> None:
    """Raises UserError among processes that a launcher started: each would do every cell, and wait for the others."""
    from userllm import processes

    if (count := processes.launched()) > 1:
        raise UserError(
            f"experiments {action} is one process, and a launcher started {count}; several cells at a time are --jobs N"
        )


def _launch(scale: str) -> Launch:
    from userllm.experiments.runner import in_own_process

    return _in_this_process if scale == "smoke" else in_own_process


def _in_this_process(command: list[str]) -> int:
    """``userllm COMMAND`` here: a cell of a few seconds is not worth starting Python and torch anew."""
    from userllm.cli import main

    try:
        return main(command)
    except Exception:  # noqa: BLE001 - as where each cell has its process: a crash is shown, and the others go on
        traceback.print_exc()
        return 1


def report(arguments: argparse.Namespace) -> None:
    """One page for all experiments, or a page for each that is named, into --out."""
    from userllm.experiments.definition import experiment_names, load_experiment
    from userllm.experiments.report import write_experiment_report, write_whole_report

    scale, out, seeds, extra = arguments.scale, arguments.out, arguments.seeds, arguments.set
    if not arguments.names:
        experiments = [load_experiment(name) for name in experiment_names()]
        print(write_whole_report(experiments, scale, out, seeds, extra, arguments.benchmarks))
    for name in arguments.names:
        print(write_experiment_report(load_experiment(name), scale, out, seeds, extra))
