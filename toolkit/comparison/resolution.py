"""What each metric can resolve at the plan's size: the smallest difference that its seeds find, and whether it tells
any two arms apart.

Whether any two arms differ is decided by the t tests of all pairs of arms, adjusted by Holm's method: the chance that
equal arms are told apart is at most alpha, also where one arm is noisier than the others. (An analysis of variance is
more powerful for arms of equal noise, but if one arm of ten has three times the noise, it errs in 11 % of
cases.)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from toolkit.comparison import statistics
from toolkit.comparison.statistics import Array, measure


@dataclass(frozen=True)
class Separation:
    """``p`` is the smallest p of all pairs of arms, adjusted by Holm's method, nan if no pair can be tested; ``sd`` is
    that of the paired differences, or pooled over both arms if unpaired, pooled over all pairs. Arrays over the
    repetitions."""

    p: Array
    sd: Array


@dataclass(frozen=True)
class Resolution:
    """One metric over all arms of a plan. ``seeds`` is the number of seeds of each arm, ``noise`` the sd over seeds
    pooled over arms, ``detectable`` the true difference from the baseline that these seeds find with 80 % power.
    ``largest`` is the largest difference of two arms' means, the first of ``between`` minus the second (None if no
    two differ). ``p`` is that of the test whether any two arms differ, and ``tells_apart`` its answer; None if there is
    nothing to test."""

    metric: str
    arms: int
    seeds: int
    noise: float | None
    detectable: float | None
    largest: float | None
    between: tuple[str, str] | None
    p: float | None
    tells_apart: bool | None


def separation(values: ArrayLike, paired: bool) -> Separation:
    """Test whether any two arms differ. ``values`` are ``(..., arms, seeds)``, with the same seeds in the same order if
    paired. ValueError: fewer than 2 arms, and as in ``statistics.difference``."""
    values = np.asarray(values, dtype=float)
    if values.ndim < 2 or values.shape[-2] < 2:
        raise ValueError(f"values of the shape {values.shape}: give two or more arms, as (..., arms, seeds)")
    one, other = np.triu_indices(values.shape[-2], 1)
    pairs = measure(values[..., one, :], values[..., other, :], paired)
    smallest = np.where(np.isnan(pairs.p), 1.0, pairs.p).min(-1)
    adjusted = np.minimum(1.0, len(one) * smallest)  # the first step of Holm's method
    return Separation(
        np.where(np.isnan(pairs.p).all(-1), np.nan, adjusted), np.sqrt((np.nan_to_num(pairs.sd) ** 2).mean(-1))
    )


def resolve(metric: str, arms: Mapping[str, Mapping[int, float]], paired: bool, alpha: float) -> Resolution:
    """The resolution of a metric. ``arms`` are {arm: {seed: value}}. Arms without values are left out. Paired arms are
    compared over the seeds that all of them have; unpaired ones over as many seeds as each of them has."""
    measured = {name: by_seed for name, by_seed in arms.items() if by_seed}
    noise, df = statistics.noise_floor(list(by_seed.values()) for by_seed in measured.values())
    values = _table(measured, paired)
    seeds = min((len(each) for each in values.values()), default=0)
    means = {name: float(np.mean(each)) for name, each in values.items()} if seeds else {}
    largest = between = p = detectable = None
    if len(means) > 1:
        between = (max(means, key=means.__getitem__), min(means, key=means.__getitem__))
        largest = means[between[0]] - means[between[1]]
        between = between if largest else None
    if len(means) > 1 and seeds > 1:
        separated = separation([each[:seeds] for each in values.values()], paired)
        p = float(separated.p) if np.isfinite(separated.p) else None
        sd = float(separated.sd)
        detectable = statistics.detectable(sd, seeds, paired, alpha / (len(means) - 1)) if sd else None
    same = bool(means) and all(value == next(iter(means.values())) for value in means.values())
    tells_apart = p < alpha if p is not None else False if seeds > 1 and len(means) > 1 and same else None
    return Resolution(metric, len(measured), seeds, noise if df else None, detectable, largest, between, p, tells_apart)


def _table(arms: Mapping[str, Mapping[int, float]], paired: bool) -> dict[str, list[float]]:
    """{arm: values by seed}."""
    seeds = set.intersection(*(set(by_seed) for by_seed in arms.values())) if paired and arms else None
    return {
        name: [value for seed, value in sorted(by_seed.items()) if seeds is None or seed in seeds]
        for name, by_seed in arms.items()
    }
