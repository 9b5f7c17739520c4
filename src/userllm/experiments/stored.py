"""An experiment with those of its cells that are done, and what they decide."""

from __future__ import annotations

from collections.abc import Sequence

from userllm.experiments.cells import CellStore, FinishedCell
from userllm.experiments.comparison import Decided, decide
from userllm.experiments.definition import Experiment, Side, settings_hash


class Stored:
    """An experiment at one scale with its finished cells. extra: the settings that the cells were run with, too."""

    def __init__(
        self,
        experiment: Experiment,
        scale: str,
        store: CellStore,
        seeds: Sequence[int] | None = None,
        extra: Sequence[str] = (),
    ):
        self.experiment, self.scale, self.extra = experiment, scale, extra
        self.seeds = list(seeds or experiment.scale(scale).seeds)
        self.cells: dict[str, list[FinishedCell]] = {}
        for name in experiment.cells:
            found = [store.find(self.hash_of(name, seed)) for seed in self.seeds]
            if some := [cell for cell in found if cell is not None]:
                self.cells[name] = some
        self.decided = [decide(claim, self.cells) for claim in experiment.claims]

    def hash_of(self, cell: str, seed: int) -> str:
        """The hash a cell goes by."""
        return settings_hash(self.experiment.settings(cell, self.scale, seed, self.extra))

    @property
    def tasks(self) -> list[str]:
        """Every task of the cells."""
        return list(
            dict.fromkeys(task for cells in self.cells.values() for task in cells[0].metrics["tasks"])
        )

    def asks(self, one: Decided) -> tuple[object, ...]:
        """What a claim comes down to: two experiments may make the same one."""

        def of(side: Side) -> tuple[str, str]:
            return self.hash_of(side.cell, self.seeds[0]), side.system

        claim = one.claim
        return claim.task, claim.metric, of(claim.a), of(claim.b), claim.kind, claim.margin
