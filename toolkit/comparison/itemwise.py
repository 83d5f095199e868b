"""Two arms that saw the same items, compared seed by seed and item by item: intervals for these items, and for others
like them.

The difference of seed s and item i is modelled as d_si = mu + a_s + b_i + e_si, with independent random effects of
seeds, items and the rest: two-way random effects without replication. With S seeds, I items and mean squares MS of the
analysis of variance, the mean difference has the variance

    seeds/S + items/I + rest/(S I) = (E MS_seeds + E MS_items - E MS_rest) / (S I)

These items: seeds alone are random. The interval is the paired Student-t interval over the seeds' means.

Items like these: seeds and items are random (Judd, Westfall & Kenny 2012, doi:10.1037/a0028347; Barr et al. 2013,
doi:10.1016/j.jml.2012.11.001). The half-width of the interval is the root of

    t(S - 1)^2 MS_seeds / (S I)  +  t(I - 1)^2 max(MS_items - MS_rest, 0) / (S I)

that is, each part of the variance keeps the t of its own degrees of freedom (Banerjee 1960, Sankhya 22, 357-358). The
interval is never narrower than that for these items. The usual rule has one t, with Satterthwaite's degrees of freedom
(1946, doi:10.2307/3002019). Its coverage does not hold with few seeds: with three seeds,
200 items and ten times the variance of seeds in items it is 92 % instead of 95 % (``python -m tests.planted_truth``).

Values may carry leading axes of independent repetitions, ``(..., seeds, items)``, so a simulation tests the formulas
that ``compare`` runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from toolkit.comparison.statistics import Array, Measured, measure


@dataclass(frozen=True)
class MeanSquares:
    """The mean squares of differences, as arrays over the repetitions, and the number of seeds and items."""

    seeds: Array
    items: Array
    rest: Array
    n_seeds: int
    n_items: int


@dataclass(frozen=True)
class Itemwise:
    """Arm minus baseline over seeds and items, as arrays over the repetitions; nan where there is no interval.

    ``low`` and ``high`` are the ends of the interval for these items, ``low_like`` and ``high_like`` of that for items
    like these. ``share_seeds``, ``share_items`` and ``share_rest`` are the shares of the variance of the mean
    difference; they add up to 1. A part that is estimated below 0 counts as 0. Without an interval they are nan."""

    mean: Array
    low: Array
    high: Array
    low_like: Array
    high_like: Array
    share_seeds: Array
    share_items: Array
    share_rest: Array


def itemwise(arm: ArrayLike, base: ArrayLike, alpha: float = 0.05) -> Itemwise:
    """Arm minus baseline, with both intervals at level 1 - alpha. ``arm`` and ``base`` are ``(..., seeds, items)`` with
    the same seeds and items in the same order. There are no intervals with one seed, or if the means of all seeds
    differ from the baseline's by the same amount; with one item, there is none for items like these.
    ValueError: other shapes, no values, values that aren't finite, alpha outside (0, 1)."""
    arm, base = np.asarray(arm, dtype=float), np.asarray(base, dtype=float)
    if arm.shape != base.shape or arm.ndim < 2 or 0 in arm.shape:
        raise ValueError(
            f"arm and baseline need the same seeds and items, but their shapes are {arm.shape} and {base.shape}"
        )
    seeds = measure(arm.mean(-1), base.mean(-1), paired=True, alpha=alpha)
    return intervals(seeds, mean_squares(arm - base), alpha)


def mean_squares(differences: Array) -> MeanSquares:
    """The mean squares of ``(..., seeds, items)``; those without degrees of freedom are nan."""
    n_seeds, n_items = differences.shape[-2:]
    deviation = differences - differences.mean((-2, -1), keepdims=True)
    of_seeds, of_items = deviation.mean(-1), deviation.mean(-2)
    seeds, items = n_items * (of_seeds**2).sum(-1), n_seeds * (of_items**2).sum(-1)
    rest = np.einsum("...si,...si->...", deviation, deviation) - seeds - items
    squares = (seeds, items, np.maximum(rest, 0))
    freedom = (n_seeds - 1, n_items - 1, (n_seeds - 1) * (n_items - 1))
    seeds, items, rest = (
        each / df if df else np.full_like(each, np.nan) for each, df in zip(squares, freedom, strict=True)
    )
    return MeanSquares(seeds, items, rest, n_seeds, n_items)


def intervals(seeds: Measured, squares: MeanSquares, alpha: float) -> Itemwise:
    """Both intervals. ``seeds`` is the paired measurement of the seeds' means: its interval is that for these items."""
    count = squares.n_seeds * squares.n_items
    items = np.maximum(squares.items - squares.rest, 0) / count  # items/I
    rest = squares.rest / count
    critical = stats.t.isf(alpha / 2, squares.n_items - 1) if squares.n_items > 1 else np.nan
    half = np.hypot((seeds.high - seeds.low) / 2, critical * np.sqrt(items))
    parts = np.stack([np.maximum(squares.seeds / count - rest, 0), items, rest])
    total = np.where(np.isnan(half), 0, parts.sum(0))
    shares = np.divide(parts, total, out=np.full_like(parts, np.nan), where=total > 0)
    return Itemwise(seeds.mean, seeds.low, seeds.high, seeds.mean - half, seeds.mean + half, *shares)
