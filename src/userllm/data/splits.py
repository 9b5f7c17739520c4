"""Which events train, validate and test. The split is a function of the dataset and its configuration alone.

Positions count a user's events from 0, in the dataset's order (time, ties by the source's rows).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from userllm.data.store import Dataset
from userllm.data.unseen_items import unseen_items
from userllm.errors import UserError
from userllm.ranges import PositiveFloat, PositiveInt

VALIDATION_USERS = 10
"""Under the paper's protocol one user in this many gives its last training target to validation (ours)."""


@dataclass(frozen=True)
class SplitConfig:
    """How to split a dataset."""

    kind: Literal["leave_last_out", "paper", "unseen_items"] = "leave_last_out"
    """leave_last_out: the last event of a user is test, the last but one validation. paper: windows of equal length.
    unseen_items (ours): a share of the items is in no training history, and histories of these alone are asked about;
    see ``unseen``."""
    window: PositiveInt = 50
    """Events of a window (paper: 50, also 100 and 200). Only used by ``paper``."""
    min_events: PositiveInt = 5
    """Users with fewer events are left out (ours, the field's custom). Not used by ``paper``."""
    unseen: PositiveFloat = 0.2
    """Share of the items that training never meets, by a hash of their ids. A user's events of these become a user of
    their own, who is asked; those of all others one who trains. Only used by ``unseen_items``."""

    def build(self, dataset: Dataset) -> Split:
        """Raises UserError where a setting is out of range or no user is left."""
        if self.kind == "leave_last_out":
            return _leave_last_out(dataset, self)
        if self.kind == "paper":
            return _paper(dataset, self)
        if self.kind == "unseen_items":
            return _unseen_items(dataset, self)
        raise UserError(f"split.kind is {self.kind!r}; use leave_last_out, paper or unseen_items")


@dataclass(frozen=True)
class Split:
    """A split; arrays are aligned, one entry per kept user.

    users: numbers of the kept users. train_end: their first ``train_end`` events may train.
    validation, test: position of the validation and the test target, -1 where the user has none.
    """

    config: SplitConfig
    dataset_fingerprint: str
    dataset_users: int
    users: np.ndarray
    train_end: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def examples(self, part: Literal["validation", "test"], max_length: int | None = None) -> np.ndarray:
        """Rows (user, start, stop), [n, 3]: the history is events ``start:stop`` and the target is event ``stop``.

        The history is the latest ``max_length`` events before the target; under ``paper`` at most a window.
        """
        target = self.validation if part == "validation" else self.test
        kept = target >= 0
        users, stop = self.users[kept], target[kept]
        length = self.visible(int(stop.max(initial=0)) if max_length is None else max_length)
        start = np.maximum(0, stop - length)
        return np.stack([users, start, stop], axis=1)

    def visible(self, events: int) -> int:
        """How many of a history's latest ``events`` events count: under ``paper`` at most a window."""
        return min(events, self.config.window) if self.config.kind == "paper" else events

    def answers(self, dataset: Dataset) -> np.ndarray | None:
        """Rows of the catalogue that training may know of, [n], rising; None: all of them."""
        if self.config.kind != "unseen_items":
            return None
        return np.flatnonzero(~unseen_items(dataset, self.config.unseen))

    @property
    def fingerprint(self) -> str:
        """sha256 over the dataset's fingerprint, the settings and every position."""
        settings = f"{self.config.window}" if self.config.kind == "paper" else f"{self.config.min_events}"
        if self.config.kind == "unseen_items":
            settings += f" {self.config.unseen:g}"
        digest = hashlib.sha256(f"split v1 {self.dataset_fingerprint} {self.config.kind} {settings}".encode())
        for positions in (self.users, self.train_end, self.validation, self.test):
            digest.update(positions.astype("<i8").tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line for a person."""
        rule = (
            f"window {self.config.window}"
            if self.config.kind == "paper"
            else f"min_events {self.config.min_events}"
        )
        if self.config.kind == "unseen_items":
            rule += f", {self.config.unseen:g} of the items unseen"
        return (
            f"{self.config.kind} ({rule}): {len(self.users):,} of {self.dataset_users:,} users; "
            f"{self.num_training_targets:,} training targets, {int((self.validation >= 0).sum()):,} validation, "
            f"{int((self.test >= 0).sum()):,} test; fingerprint {self.fingerprint[:12]}"
        )

    @property
    def num_training_targets(self) -> int:
        """Next events that training may predict: every one (leave_last_out), or one per window (paper)."""
        return int(np.maximum(0, self.train_end - self.first_target).sum())

    @property
    def first_target(self) -> int:
        """Position of the first event of a user that may be a training target."""
        return self.config.window if self.config.kind == "paper" else 1


def _leave_last_out(dataset: Dataset, config: SplitConfig) -> Split:
    if config.min_events < 3:
        raise UserError(
            f"split.min_events is {config.min_events}; leave_last_out needs at least 3 events of a user"
        )
    lengths = dataset.lengths
    users = np.flatnonzero(lengths >= config.min_events)
    if len(users) == 0:
        raise UserError(f"{dataset.folder}: no user has {config.min_events} events; lower split.min_events")
    n = lengths[users]
    return Split(config, dataset.card.fingerprint, dataset.num_users, users, n - 2, n - 2, n - 1)


def _unseen_items(dataset: Dataset, config: SplitConfig) -> Split:
    """Of a dataset with these events apart: who has unseen items is asked, of others the last event is validation."""
    if not 0 < config.unseen < 1 or config.min_events < 3:
        raise UserError(
            f"split.unseen is {config.unseen:g}, split.min_events {config.min_events}; unseen_items needs a share "
            "between 0 and 1, and at least 3 events of a user"
        )
    lengths = dataset.lengths
    users = np.flatnonzero(lengths >= config.min_events)
    first = dataset.events["item"][dataset.offsets[:-1][users]]
    asked = unseen_items(dataset, config.unseen)[first]
    if not asked.any() or asked.all():
        raise UserError(
            f"{dataset.folder}: no user has {config.min_events} events of items that are "
            f"{'seen' if asked.any() else 'unseen'}; change split.unseen, or lower split.min_events"
        )
    n = lengths[users]
    return Split(
        config,
        dataset.card.fingerprint,
        dataset.num_users,
        users,
        train_end=np.where(asked, 0, n - 1),
        validation=np.where(asked, -1, n - 1),
        test=np.where(asked, n - 1, -1),
    )


def _paper(dataset: Dataset, config: SplitConfig) -> Split:
    """Users with n >= N + 1 events; n - N - 1 training windows, whose targets are N..n-2, and one test window.

    The papers name no validation set. Ours: for a fixed tenth of the users the target n-2 is validation, not training.
    The tenth is chosen by a hash of the user's number, which does not depend on a release's style of user ids.
    """
    if config.window < 1:
        raise UserError(f"split.window is {config.window}; it must be at least 1")
    lengths = dataset.lengths
    users = np.flatnonzero(lengths >= config.window + 1)
    if len(users) == 0:
        raise UserError(f"{dataset.folder}: no user has more than {config.window} events; lower split.window")
    n = lengths[users]
    chosen = np.array([_in_validation(user) for user in users.tolist()]) & (n >= config.window + 2)
    return Split(
        config,
        dataset.card.fingerprint,
        dataset.num_users,
        users,
        train_end=np.where(chosen, n - 2, n - 1),
        validation=np.where(chosen, n - 2, -1),
        test=n - 1,
    )


def _in_validation(user: int) -> bool:
    return (
        int.from_bytes(hashlib.sha256(f"validation user {user}".encode()).digest()[:8]) % VALIDATION_USERS
        == 0
    )
