"""What changed first: the earliest step at which what probes saw in an arm differs from the baseline beyond the noise
of seeds, and the modules and statistics that differ there.

A cell is one statistic of one module at one step; a family is one statistic at one step, over modules. Values carry
leading axes of independent repetitions, ``(..., steps, cells, seeds)``, so that a simulation tests the formulas that
the command runs. A seed without a value is nan.

Scale. Values are transformed by asinh(x / c), one c for each statistic: the logarithm for large values, so that sizes
are relative, and finite for zero, the value of a dead part.

Tests. Each cell has a t test over seeds: of the differences at equal seeds if paired, Welch's otherwise. Differences
below ROUNDING of a value are none, and no spread is smaller than ROUNDING of a value or than the distance of the
nearest two values of the statistic (a count that is one off in every seed is no proof).

Multiplicity. Bonferroni over thousands of cells would leave 3 to 5 seeds without power. So within a step each
statistic gets an equal share of alpha, and its modules get shares in proportion to the square of their total sums of
squares (around zero if paired, around the mean of all runs if not), and Holm's step-down method with these weights
follows. With the sums of squares given, a normal sample without a true difference points into every direction alike,
so its t keeps Student's distribution, however strongly cells are correlated (Kropf and Laeuter 2002, Biometrical
Journal 44; Westfall, Kropf and Finos 2004, IMS Lecture Notes 47). Two arms without any difference are therefore told
apart with a probability of at most alpha.

Time. Half of alpha tests the steps from the last one backwards, until a step has no significant cell: a difference
that stays is followed to its beginning without a price for the number of steps. The other half is shared by all steps,
for a difference that fades. Both keep the chance that a step without any difference is reported below alpha.

Origin. Paired runs begin with equal weights and read equal data, so there is no noise at all until something differs:
what comes before the change is equal to the last bit. ``origin`` finds where that ends, also if the change has another
sign in each seed, which no test of means can see."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[np.float64]
ROUNDING = 1e-5  # values that differ by less than this share of their size count as equal: float32 sums are no better
FLOOR = 1e-3  # of the usual value of a statistic: smaller values count as nearly zero
POWER = 2  # shares of alpha within a statistic are this power of the sums of squares
NEAR = 2.0  # of the cells of the first step, those whose sizes are within this factor of the largest: the first module


@dataclass(frozen=True)
class Cells:
    """The tests of all cells, as arrays ``(..., steps, cells)``.

    p          of the cell alone; nan where nothing can be tested (one seed, or equal values)
    p_adjusted for all cells of all steps
    size       mean difference, arm minus baseline, in standard deviations of the seeds, on the transformed scale
    equal      no seed differs by more than ROUNDING
    """

    p: Array
    p_adjusted: Array
    size: Array
    equal: NDArray[np.bool_]


def examine(arm: ArrayLike, base: ArrayLike, families: ArrayLike, paired: bool) -> Cells:
    """Test every cell of an arm against the baseline. ``arm`` and ``base`` are ``(..., steps, cells, seeds)``, with the
    seeds in the same order if ``paired``; ``families`` (cells,) holds the number of each cell's statistic, from 0."""
    families = np.asarray(families)
    arm, base = (np.where(np.isfinite(x), x, np.nan) for x in (np.asarray(arm, float), np.asarray(base, float)))
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # means of no values, which are masked below
        warnings.simplefilter("ignore", RuntimeWarning)
        return _examine(arm, base, families, paired)


def _examine(arm: Array, base: Array, families: NDArray[np.int_], paired: bool) -> Cells:
    scale, gap = _scale_and_gap(np.concatenate([arm, base], -1), families)  # (..., cells)
    scale, gap = scale[..., None, :, None], gap[..., None, :]
    y_arm, y_base = np.arcsinh(arm / scale), np.arcsinh(base / scale)
    typical = np.fmax(np.nanmax(np.abs(arm), -1), np.nanmax(np.abs(base), -1))  # (..., steps, cells)
    c = scale[..., 0]
    least = np.fmax(ROUNDING * typical, gap)  # the smallest step from a value that has a meaning
    floor = np.arcsinh(typical / c) - np.arcsinh((typical - least) / c)
    if paired:
        difference = y_arm - y_base
        difference = np.where(np.abs(arm - base) <= ROUNDING * typical[..., None], 0 * difference, difference)
        mean, n = np.nanmean(difference, -1), np.isfinite(difference).sum(-1)
        variance = np.fmax(np.nanvar(difference, -1, ddof=1), floor**2)
        total, error, df = np.nanmean(difference**2, -1), variance / n, n - 1.0
        is_equal = np.nanmax(np.abs(difference), -1) == 0
        testable = n > 1
    else:
        mean = np.nanmean(y_arm, -1) - np.nanmean(y_base, -1)
        n_arm, n_base = np.isfinite(y_arm).sum(-1), np.isfinite(y_base).sum(-1)
        a, b = (np.fmax(np.nanvar(y, -1, ddof=1), floor**2) / n for y, n in ((y_arm, n_arm), (y_base, n_base)))
        total = np.nanvar(np.concatenate([y_arm, y_base], -1), -1)
        error, df = a + b, (a + b) ** 2 / (a**2 / (n_arm - 1) + b**2 / (n_base - 1))
        is_equal = total == 0
        testable = (n_arm > 1) & (n_base > 1)
    p = np.where(testable & ~is_equal, 2 * stats.t.sf(np.abs(mean) / np.sqrt(error), df), np.nan)
    size = np.where(is_equal, 0.0, mean / _seed_sd(y_arm, y_base, families, floor))
    return Cells(p, _adjusted(p, _shares(total, p, families)), size, is_equal)


def _scale_and_gap(values: Array, families: NDArray[np.int_]) -> tuple[Array, Array]:
    """For each cell, the c of its statistic and the distance of the nearest two values of its statistic, both
    ``(..., cells)``. ``values`` are those of both arms, ``(..., steps, cells, runs)``."""
    shape = (*values.shape[:-3], values.shape[-2])
    scale, gap = np.ones(shape), np.zeros(shape)
    for family in np.unique(families):
        cells = np.flatnonzero(families == family)
        own = values[..., cells, :].reshape(*values.shape[:-3], -1)
        median = np.nanmedian(np.where(own == 0, np.nan, np.abs(own)), -1)
        is_positive = (np.nanmin(own, -1) >= 0) & (np.mean(own > 0, -1) >= 0.5 * np.mean(np.isfinite(own), -1))
        c = np.where(is_positive, FLOOR, 1.0) * median
        scale[..., cells] = np.where(c > 0, c, 1.0)[..., None]
        steps = np.diff(np.sort(own, -1), axis=-1)
        nearest = np.nanmin(np.where(steps > ROUNDING * median[..., None], steps, np.nan), -1)
        gap[..., cells] = np.nan_to_num(nearest)[..., None]
    return scale, gap


def _seed_sd(arm: Array, base: Array, families: NDArray[np.int_], floor: Array) -> Array:
    """The standard deviation over the seeds of an arm, pooled over both arms, ``(..., steps, cells)``. Few seeds
    estimate it badly, so its square is averaged with the median of the statistic over the modules of the step."""
    pooled = np.fmax(np.nanmean(np.stack([np.nanvar(arm, -1, ddof=1), np.nanvar(base, -1, ddof=1)]), 0), floor**2)
    usual = np.empty_like(pooled)
    for family in np.unique(families):
        cells = np.flatnonzero(families == family)
        usual[..., cells] = np.nanmedian(pooled[..., cells], -1, keepdims=True)
    return np.sqrt((pooled + usual) / 2)


def _shares(total: Array, p: Array, families: NDArray[np.int_]) -> Array:
    """The share of each cell in the alpha of its step, ``(..., steps, cells)``: 0 for cells without a test."""
    weights = np.where(np.isnan(p), 0.0, total)
    shares = np.zeros_like(weights)
    for family in np.unique(families):
        cells = np.flatnonzero(families == family)
        own = weights[..., cells]
        own = (own / np.fmax(own.max(-1, keepdims=True), 1e-300)) ** POWER
        shares[..., cells] = own / np.fmax(own.sum(-1, keepdims=True), 1e-300)
    return shares / np.fmax(shares.sum(-1, keepdims=True), 1e-300)


def _adjusted(p: Array, shares: Array) -> Array:
    """p adjusted for all cells and steps, ``(..., steps, cells)``: at alpha or below where the cell is significant."""
    within = weighted_holm(np.where(np.isnan(p), 1.0, p), shares)
    steps = p.shape[-2]
    smallest = within.min(-1, keepdims=True)  # (..., steps, 1)
    later = np.flip(np.maximum.accumulate(np.flip(smallest, -2), axis=-2), -2)  # the largest from this step on
    return np.where(np.isnan(p), np.nan, np.fmin(1.0, 2 * np.fmin(np.fmax(within, later), steps * within)))


def weighted_holm(p: ArrayLike, shares: ArrayLike) -> Array:
    """Holm's (1979) step-down method with weights: p adjusted along the last axis. ``shares`` of alpha sum to 1; a cell
    with the share 0 gets 1."""
    p, shares = np.asarray(p, float), np.asarray(shares, float)
    ratio = np.where(shares > 0, p / np.fmax(shares, 1e-300), 1e300)
    order = np.argsort(ratio, -1)
    sorted_ratio, sorted_shares = (np.take_along_axis(x, order, -1) for x in (ratio, shares))
    remaining = np.flip(np.cumsum(np.flip(sorted_shares, -1), -1), -1)
    raw = np.where(sorted_shares > 0, sorted_ratio * remaining, 1.0)
    adjusted = np.empty_like(raw)
    np.put_along_axis(adjusted, order, np.fmin(np.maximum.accumulate(raw, -1), 1.0), -1)
    return adjusted


def first(cells: Cells, depth: ArrayLike, alpha: float) -> list[tuple[int, int]]:
    """The significant cells of the earliest step that has any, as (index of the step, index of the cell), the location
    first; [] if nothing differs. For one repetition: arrays ``(steps, cells)``. ``depth`` (cells,) is the place of each
    cell's module in the model.

    A change spreads from its origin to the modules behind it, and through gradients to those before it, and shrinks on
    its way. So the location is one of the largest sizes: of those within a factor of NEAR, the first module."""
    significant = cells.p_adjusted <= alpha
    steps = np.flatnonzero(significant.any(-1))
    if not len(steps):
        return []
    step, depth = int(steps[0]), np.asarray(depth)
    size = np.abs(cells.size[step])
    largest = size[significant[step]].max()
    cells_of_step = np.flatnonzero(significant[step])
    is_near = size * NEAR >= largest
    order = sorted(cells_of_step, key=lambda cell: (not is_near[cell], depth[cell] * is_near[cell], -size[cell]))
    return [(step, int(cell)) for cell in order]


def origin(
    arm: ArrayLike, base: ArrayLike, families: ArrayLike, depth: ArrayLike, probes: ArrayLike | None = None
) -> tuple[int, int] | None:
    """Where paired runs begin to differ, as (index of the step, index of the cell). Arguments as of ``examine`` and
    ``first``, for one repetition: ``(steps, cells, seeds)``; ``probes`` (cells,) holds the number of each cell's probe,
    and without it each statistic is a probe of its own. None if no such place can be told.

    At the first step at which anything differs, a statistic tells the place if its values in earlier modules, some of
    them not 0, are equal to the last bit in every seed, and the next module differs by more than ROUNDING in every
    seed, and no other statistic of the same probe differs in an earlier module: the largest value may miss what changes
    the mean. Statistics of gradients usually differ everywhere and tell nothing. Of several places the first module
    counts, and there the statistic with the largest relative difference."""
    arm, base = np.asarray(arm, float), np.asarray(base, float)
    families, depth = np.asarray(families), np.asarray(depth)
    probes = families if probes is None else np.asarray(probes)
    is_known = np.isfinite(arm) & np.isfinite(base)
    differs = is_known & (arm != base)  # (steps, cells, seeds)
    steps = np.flatnonzero(differs.any((-1, -2)))
    if not len(steps):
        return None
    step = int(steps[0])
    relative = np.zeros(arm.shape[1:])  # (cells, seeds)
    largest = np.fmax(np.abs(arm[step]), np.abs(base[step]))
    np.divide(np.abs(arm[step] - base[step]), largest, out=relative, where=differs[step])
    places = []
    for family in np.unique(families):
        cells = np.flatnonzero((families == family) & is_known[step].any(-1))
        cells = cells[np.argsort(depth[cells], kind="stable")]
        changed = np.flatnonzero(differs[step, cells].any(-1))
        if not len(changed):
            continue
        place = int(cells[changed[0]])
        earlier = (probes == probes[place]) & (depth < depth[place])
        if differs[step, earlier].any():
            continue
        if (relative[place] > ROUNDING).all() and base[step, cells[: changed[0]]].any():
            places.append((depth[place], -float(relative[place].mean()), place))
    return (step, min(places)[2]) if places else None
