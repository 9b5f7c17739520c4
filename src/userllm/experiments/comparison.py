"""Cells compared on the same users, and the papers' claims decided by the intervals of the differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from userllm.errors import UserError
from userllm.evaluation.labels import LabelCounts, weighted_f1
from userllm.evaluation.metrics import Estimate, bootstrap_mean, ratio_of_means, sign_flip_p, user_metrics
from userllm.experiments.cells import FinishedCell
from userllm.experiments.definition import Claim, Side

Verdict = Literal["confirmed", "not confirmed", "not run"]

LOG_LIKELIHOOD = "log_likelihood"
RANKING = tuple(user_metrics([1]))
"""Metrics that follow from a rank; any other is a column of a cell's numbers by user."""
WEIGHTED_F1 = "f1"
"""Of all texts together, label by label: no mean of users' values."""
TRIVIAL = ("popularity", "majority", "every_label", "other_last")
"""Baselines that know nothing of the user."""
_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Measured:
    """A mean over ``n`` users, each user's seeds averaged first, or a weighted F1 of all seeds' texts, with its 95 %
    interval over users."""

    n: int
    estimate: Estimate
    by_seed: Mapping[int, float] = field(default_factory=dict)
    """Each training's own mean. Where a cell asks a sample of the users, every seed asks its own."""
    p: float | None = None
    """Of a difference: two-sided p of there being none, by flipping the users' signs."""
    lost: int | None = None
    """Of a difference: users with whom it is below 0; None where users have no difference of their own."""
    won: int | None = None
    """Those with whom it is above 0, likewise."""


@dataclass(frozen=True)
class Decided:
    """A claim, what was measured, and what follows."""

    claim: Claim
    verdict: Verdict
    a: Measured | None = None
    b: Measured | None = None
    difference: Measured | None = None
    """a - b of the claim's metric, on the users both answered for"""
    nats: Measured | None = None
    """a - b of the true answer's log-likelihood, where both sides have one: it shows effects that recall is too coarse
    for, and decides nothing"""
    seeds: int = 0
    """in how many of the seeds the difference lies on the claim's side"""
    loses: bool = False
    """a is below b, by the rule by which "above" is confirmed"""
    weak: str | None = None
    """of "within", confirmed: a system that has learnt nothing (``TRIVIAL``) and that b is not above, so that staying
    near b is easy"""


def per_user(cells: Sequence[FinishedCell], task: str, system: str, metric: str) -> pl.DataFrame:
    """user, seed, value: the metric of every user a cell (one per seed) answered for; empty where it has none.

    metric: one of ``RANKING``, or a column of the cells' numbers by user. Raises UserError for one that a cell which
    has this task and system does not know. Of ``WEIGHTED_F1`` there is no value of one user: in its place stand the
    labels of target and text, "target" and "named".
    """
    frames = []
    for cell in cells:
        rows = cell.per_user().filter((pl.col("task") == task) & (pl.col("system") == system))
        if metric == WEIGHTED_F1:
            if "named" in rows.columns:
                told = rows.filter(pl.col("named").is_not_null())
                frames.append(told.select("user", pl.lit(cell.seed).alias("seed"), "target", "named"))
            continue
        if metric in RANKING:
            rows = rows.filter(pl.col("rank").is_not_null())
            value = pl.Series(user_metrics(rows["rank"].to_numpy())[metric])
        elif metric in rows.columns:
            rows = rows.filter(pl.col(metric).is_finite())
            value = rows[metric]
        elif rows.is_empty():
            continue
        else:
            known = ", ".join((*RANKING, *rows.columns[3:]))
            raise UserError(f"{cell.file}: {task} of {system} has no metric {metric!r}; there are {known}")
        seed = pl.lit(cell.seed).alias("seed")
        frames.append(rows.select("user", seed, value.cast(pl.Float64).alias("value")))
    return pl.concat(frames) if frames else pl.DataFrame(schema={"user": str, "seed": int, "value": float})


def mean(rows: pl.DataFrame) -> Measured | None:
    """The mean over users, each user's seeds averaged first, or the weighted F1; None without users."""
    if "named" in rows.columns:
        return _weighted_f1(rows, ["named"])
    users = _by_user(rows, "value")
    if users.is_empty():
        return None
    return Measured(len(users), bootstrap_mean(users["value"].to_numpy()), _by_seed(rows))


def difference(a: pl.DataFrame, b: pl.DataFrame) -> Measured | None:
    """a - b over the users that both have under the same seed; None without such users."""
    pairs = a.join(b, on=("user", "seed"), suffix="_b")
    if "named" in pairs.columns:
        return _weighted_f1(pairs, ["named", "named_b"])
    pairs = pairs.select("user", "seed", (pl.col("value") - pl.col("value_b")).alias("value"))
    users = _by_user(pairs, "value")
    if users.is_empty():
        return None
    values = users["value"].to_numpy()
    lost, won = int((values < 0).sum()), int((values > 0).sum())
    return Measured(len(users), bootstrap_mean(values), _by_seed(pairs), sign_flip_p(values), lost, won)


def ratio(a: pl.DataFrame, b: pl.DataFrame) -> Measured | None:
    """mean(a) / mean(b) over the users that both have under the same seed; None without such users, where b is 0, or of
    weighted F1s, which are no means."""
    if "named" in a.columns or "named" in b.columns:
        return None
    users = _by_user(a.join(b, on=("user", "seed"), suffix="_b"), "value", "value_b")
    if users.is_empty() or users["value_b"].sum() == 0:
        return None
    return Measured(len(users), ratio_of_means(users["value"].to_numpy(), users["value_b"].to_numpy()))


def _weighted_f1(rows: pl.DataFrame, sides: Sequence[str]) -> Measured | None:
    """Of the labels in the first of ``sides``, or their lead over the second's; users are resampled, with all seeds."""
    if rows.is_empty():
        return None

    def estimate(some: pl.DataFrame, resamples: int = 1000) -> Estimate:
        users = some["user"].rank("dense").to_numpy().astype(int) - 1
        targets = some["target"].to_list()
        counts = [LabelCounts.of_names(targets, some[side].to_list(), users) for side in sides]
        return weighted_f1(*counts, resamples=resamples)

    seeds = {int(some["seed"][0]): estimate(some, 1).value for some in rows.sort("seed").partition_by("seed")}
    return Measured(rows["user"].n_unique(), estimate(rows), seeds)


def _by_user(rows: pl.DataFrame, *columns: str) -> pl.DataFrame:
    return rows.group_by("user").agg(pl.col(column).mean() for column in columns).sort("user")


def _by_seed(rows: pl.DataFrame) -> dict[int, float]:
    return dict(rows.group_by("seed").agg(pl.col("value").mean()).sort("seed").iter_rows())


def _clearly_above(
    between: Measured, needed: float = 0.0, significant: bool = True, reverse: bool = False
) -> bool:
    """Whether the whole interval of a - b lies above ``needed``, and so does every seed; and p is below .05, if asked.

    Resampling pairs of which none speaks against a says nothing of those not seen: there the 95 % bound for something
    that never happened in n trials is taken off, 3 / n. reverse: of b - a.
    """
    low, high, against = between.estimate.low, between.estimate.high, between.lost
    seeds = list(between.by_seed.values())
    if reverse:
        low, high, against, seeds = -high, -low, between.won, [-seed for seed in seeds]
    unseen = against == 0 if against is not None else low == high == 0
    lowest = low - 3 / between.n if unseen else low
    clear = not significant or between.p is None or between.p < _SIGNIFICANT
    return lowest > needed and clear and all(seed > needed for seed in seeds)


def incomparable(task: str, a: Sequence[FinishedCell], b: Sequence[FinishedCell]) -> str | None:
    """Why a task's right answers in one cell are not those in the other, by users' ids; None where they are.

    A favourite category is of the events that a model is shown, so cells that show other numbers of events ask for
    another thing. Cells that were run on several machines may be of other data.
    """

    if len({cell.metrics["dataset"]["fingerprint"] for cell in (*a, *b)}) > 1:
        return "they are of other data (the dataset's fingerprint differs)"
    configs = [told for cell in (*a, *b) if task in (told := cell.told["config"])["tasks"]]
    asked = [told for told in configs if told["tasks"][task]["kind"] == "favorite_category"]
    if len({told["fusion"]["events"] for told in asked}) > 1:
        return f"they show other numbers of events (fusion.events), so {task} has other right answers"
    return None


def decide(claim: Claim, cells: Mapping[str, Sequence[FinishedCell]]) -> Decided:
    """What our cells say of a claim. cells: the finished ones by name, one per seed.

    Confirmed: the whole interval of the difference lies on the claim's side, and so does every seed's own difference;
    of "above", p is below .05, too, since the interval of a few users who differ is too short. a loses by the same
    rule.
    The interval knows users, not trainings; one of several trainings that says the opposite is enough to doubt.
    a and b of the outcome are of the users and seeds that both answered for. Raises UserError where the cells cannot be
    compared (``incomparable``).
    """
    sides = [cells.get(side.cell, ()) for side in (claim.a, claim.b)]
    if (why := incomparable(claim.task, *sides)) is not None:
        files = " and ".join(side[0].file.name for side in sides)
        raise UserError(f"{files}: cannot be compared, as the claim {claim.text!r} does: {why}")

    def rows(side: Side, metric: str) -> pl.DataFrame:
        return per_user(cells.get(side.cell, ()), claim.task, side.system, metric)

    a, b = rows(claim.a, claim.metric), rows(claim.b, claim.metric)
    between = difference(a, b)
    if between is None:
        return Decided(claim, "not run", mean(a), mean(b))
    keys = ["user", "seed"]
    a, b = a.join(b, on=keys, how="semi"), b.join(a, on=keys, how="semi")
    needed = 0.0 if claim.kind == "above" else -claim.margin
    agreeing = sum(value > needed for value in between.by_seed.values())
    holds = _clearly_above(between, needed, significant=claim.kind == "above")
    nats = difference(rows(claim.a, LOG_LIKELIHOOD), rows(claim.b, LOG_LIKELIHOOD))
    verdict: Verdict = "confirmed" if holds else "not confirmed"
    loses = _clearly_above(between, reverse=True)
    weak = None
    if holds and claim.kind == "within":
        weak = _not_beaten(claim, cells.get(claim.b.cell, ()), b)
    return Decided(claim, verdict, mean(a), mean(b), between, nats, agreeing, loses, weak)


def _not_beaten(claim: Claim, cells: Sequence[FinishedCell], b: pl.DataFrame) -> str | None:
    """A baseline of b's cells that knows nothing of the user and that b is not above."""
    for system in TRIVIAL:
        lead = difference(b, per_user(cells, claim.task, system, claim.metric))
        if lead is not None and not _clearly_above(lead):
            return system
    return None
