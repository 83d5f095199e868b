"""What diverged runs say: a verdict on the runs that finished may come only from the loss of the bad ones.

If an arm equals the baseline in truth, and its worse runs diverge, the runs that finished look better than the arm is.
So where runs of the favoured arm diverged, a verdict of better or worse stands only if a test of ranks gives the same
answer, with these runs as the last of all. A verdict of equivalent has no such test, and does not stand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from toolkit.comparison.results import ArmResult
from toolkit.comparison.statistics import Verdict

EXACT = 50  # runs of an arm: with more, the normal approximation is used

Array = NDArray[np.float64]


def reconsider(
    verdict: Verdict, arm: ArmResult, baseline: ArmResult, alpha: float, higher_is_better: bool = False
) -> Verdict:
    """The verdict on the runs that finished, or an inconclusive one if it may come from the loss of diverged runs.

    ``alpha`` is the level of the test of ranks: that of a plan, divided by its arms."""
    favoured = {"better": arm, "worse": baseline, "equivalent": arm if arm.diverged else baseline}.get(verdict.word)
    if favoured is None or not favoured.diverged:
        return verdict
    low, high = favoured.diverged_interval
    lost = f"{favoured.diverged} of {len(favoured.runs)} runs of {favoured.name} diverged"
    rate = f"exact 95 % interval {low:.0%} to {high:.0%}"
    doubt = f"{lost} ({rate})."
    if verdict.word != "equivalent":
        other = baseline if favoured is arm else arm
        p = float(ranks_p(_values(favoured, higher_is_better), _values(other, higher_is_better)))
        if p < alpha:
            return replace(verdict, why=f"{verdict.why} {lost}; ranked as the last of all, they leave p = {p:.2g}.")
        doubt = f"{lost} ({rate}). Ranked as the last of all, they leave p = {p:.2g}."
    return Verdict(
        "inconclusive",
        f"{doubt} The runs that finished may be its better ones, so they alone decide nothing; judged on them, "
        f"{arm.name} would be {verdict.word}.",
    )


def divergence_p(arm: ArmResult, baseline: ArmResult) -> float | None:
    """The two-sided p of Fisher's exact test that an arm diverges as often as the baseline, over the runs that ended.
    None if no run of either diverged."""
    if not (arm.diverged or baseline.diverged):
        return None
    table = [[each.diverged, len(each.values)] for each in (arm, baseline)]
    return float(stats.fisher_exact(table)[1])


def ranks_p(favoured: ArrayLike, other: ArrayLike) -> Array:
    """The two-sided p of Mann and Whitney's exact test on the values of two arms, ``(..., runs)`` each, where lower is
    better and nan is a diverged run.

    Diverged runs of the favoured arm rank behind all others, so also behind those of the other arm. p is 1 if the
    favoured arm does not have the better ranks. Runs are compared as independent ones. If they are paired by seed and
    positively correlated, the test only loses power. Source: Mann and Whitney 1947."""
    favoured, other = np.asarray(favoured, dtype=float), np.asarray(other, dtype=float)
    worst = np.nanmax(np.concatenate([favoured, other], axis=-1), axis=-1, keepdims=True)
    favoured = np.where(np.isnan(favoured), worst + 2, favoured)
    other = np.where(np.isnan(other), worst + 1, other)
    method = "exact" if max(favoured.shape[-1], other.shape[-1]) <= EXACT else "asymptotic"
    test = stats.mannwhitneyu(favoured, other, alternative="less", method=method, axis=-1)
    return np.minimum(2 * np.asarray(test.pvalue), 1.0)


def _values(arm: ArmResult, higher_is_better: bool) -> list[float]:
    """The values of an arm's runs, turned so that lower is better, with nan for each diverged run."""
    return [-value if higher_is_better else value for _, value in arm.values] + [math.nan] * arm.diverged
