"""Cells compared on the same users, and the papers' claims decided by the intervals of the differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from userllm.evaluation.labels import LabelCounts, weighted_f1
from userllm.evaluation.metrics import Estimate, bootstrap_mean, ratio_of_means, user_metrics
from userllm.experiments.cells import FinishedCell
from userllm.experiments.definition import Claim, Side

Verdict = Literal["confirmed", "not confirmed", "not run"]

LOG_LIKELIHOOD = "log_likelihood"
WEIGHTED_F1 = "f1"
"""Of all texts together, label by label: no mean of users' values."""


@dataclass(frozen=True)
class Measured:
    """A mean over ``n`` users, or a weighted F1 of them all, with its 95 % interval."""

    n: int
    estimate: Estimate


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


def per_user(cells: Sequence[FinishedCell], task: str, system: str, metric: str) -> pl.DataFrame:
    """user, seed, value: the metric of every user a cell (one per seed) answered for; empty where it has none.

    Of ``WEIGHTED_F1`` there is no value of one user: instead, the labels of target and text, "target" and "named".
    """
    frames = []
    for cell in cells:
        rows = cell.per_user().filter((pl.col("task") == task) & (pl.col("system") == system))
        if metric == WEIGHTED_F1:
            if "named" in rows.columns:
                told = rows.filter(pl.col("named").is_not_null())
                frames.append(told.select("user", pl.lit(cell.seed).alias("seed"), "target", "named"))
            continue
        rows = rows if metric == LOG_LIKELIHOOD else rows.filter(pl.col("rank").is_not_null())
        if metric == LOG_LIKELIHOOD:
            rows = rows.filter(pl.col(LOG_LIKELIHOOD).is_finite())
            value = rows[LOG_LIKELIHOOD]
        else:
            value = pl.Series(user_metrics(rows["rank"].to_numpy())[metric])
        seed = pl.lit(cell.seed).alias("seed")
        frames.append(rows.select("user", seed, value.cast(pl.Float64).alias("value")))
    return pl.concat(frames) if frames else pl.DataFrame(schema={"user": str, "seed": int, "value": float})


def mean(rows: pl.DataFrame) -> Measured | None:
    """The mean over users, each user's seeds averaged first; None without users. A weighted F1 is of all texts of all
    seeds."""
    if "named" in rows.columns:
        return _weighted_f1(rows)
    users = rows.group_by("user").agg(pl.col("value").mean()).sort("user")
    if users.is_empty():
        return None
    return Measured(len(users), bootstrap_mean(users["value"].to_numpy()))


def difference(a: pl.DataFrame, b: pl.DataFrame) -> Measured | None:
    """a - b over the users that both have under the same seed; None without such users."""
    pairs = a.join(b, on=("user", "seed"), suffix="_b")
    if "named" in pairs.columns:
        return _weighted_f1(pairs, "named_b")
    return mean(pairs.select("user", "seed", (pl.col("value") - pl.col("value_b")).alias("value")))


def ratio(a: pl.DataFrame, b: pl.DataFrame) -> Measured | None:
    """mean(a) / mean(b) over the users that both have under the same seed; None without such users, where b is 0, or of
    weighted F1s, which are no means."""
    if "named" in a.columns or "named" in b.columns:
        return None
    pairs = a.join(b, on=("user", "seed"), suffix="_b").group_by("user")
    users = pairs.agg(pl.col("value").mean(), pl.col("value_b").mean()).sort("user")
    if users.is_empty() or users["value_b"].sum() == 0:
        return None
    return Measured(len(users), ratio_of_means(users["value"].to_numpy(), users["value_b"].to_numpy()))


def _weighted_f1(rows: pl.DataFrame, against: str | None = None) -> Measured | None:
    """Of the labels in "named", or their lead over those in ``against``; the users are resampled, with all seeds."""
    if rows.is_empty():
        return None
    users = rows["user"].rank("dense").to_numpy().astype(int) - 1
    targets = rows["target"].to_list()
    sides = ["named"] if against is None else ["named", against]
    counts = [LabelCounts.of_names(targets, rows[side].to_list(), users) for side in sides]
    return Measured(int(users.max()) + 1, weighted_f1(*counts))


def _lowest(between: Measured) -> float:
    """The interval's lower end. Resampling pairs of which none differs says nothing of those not seen: there the 95 %
    bound for something that never happened in n trials counts, 3 / n."""
    estimate = between.estimate
    return estimate.low - 3 / between.n if estimate.low == estimate.high == 0 else estimate.low


def decide(claim: Claim, cells: Mapping[str, Sequence[FinishedCell]]) -> Decided:
    """What our cells say of a claim. cells: the finished ones by name, one per seed."""

    def rows(side: Side, metric: str) -> pl.DataFrame:
        return per_user(cells.get(side.cell, ()), claim.task, side.system, metric)

    a, b = rows(claim.a, claim.metric), rows(claim.b, claim.metric)
    between = difference(a, b)
    if between is None:
        return Decided(claim, "not run", mean(a), mean(b))
    needed = 0.0 if claim.kind == "above" else -claim.margin
    verdict: Verdict = "confirmed" if _lowest(between) > needed else "not confirmed"
    nats = difference(rows(claim.a, LOG_LIKELIHOOD), rows(claim.b, LOG_LIKELIHOOD))
    return Decided(claim, verdict, mean(a), mean(b), between, nats)
