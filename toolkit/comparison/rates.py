"""Learning rates: each arm's best rate is chosen on the selection seeds; the arms are judged on other seeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from toolkit.comparison.banner import Banner
from toolkit.comparison.guards import knob_of
from toolkit.comparison.runs import PlanRecord, Run
from toolkit.config import keys


@dataclass(frozen=True)
class Point:
    """One learning rate of an arm. ``mean`` is over the runs that finished; None if none did."""

    lr: float
    mean: float | None
    values: tuple[float, ...]
    runs: int


@dataclass(frozen=True)
class TunedRate:
    """An arm's learning-rate grid (lowest rate first), the best rate on it, and the rates of the arm's judged runs."""

    points: tuple[Point, ...]
    best: float | None
    judged_at: tuple[float, ...]
    higher_is_better: bool = False

    @property
    def sensitivity(self) -> float | None:
        """Distance from the mean of the metric over the grid to its best value on it: 0 for an arm whose metric does
        not depend on the rate."""
        means = [point.mean for point in self.points if point.mean is not None]
        best = max if self.higher_is_better else min
        return abs(float(np.mean(means) - best(means))) if means else None


def tune(plan: PlanRecord, arm: str, judged: list[Run], selection: list[Run], metric: str) -> TunedRate | None:
    """Choose an arm's best rate: of the rates with the fewest unfinished runs, the one with the best mean. None without
    a grid."""
    sign = -1 if plan.higher_is_better else 1
    tried: dict[float, list[Run]] = {}
    for run in selection:
        if run.arm == arm and run.lr is not None:
            tried.setdefault(run.lr, []).append(run)
    if not tried:
        return None
    points = []
    for lr in sorted(tried):
        runs = tried[lr]
        finished = tuple(value for run in runs if (value := run.value(metric)) is not None)
        points.append(Point(lr, float(np.mean(finished)) if finished else None, finished, len(runs)))
    ranks = [
        (point.runs - len(point.values), sign * point.mean, point.lr) for point in points if point.mean is not None
    ]
    best = min(ranks)[2] if ranks else None
    knob = knob_of(plan.lr, arm)
    used = {_learning_rate(run, knob) for run in judged if run.arm == arm and run.facts}
    return TunedRate(tuple(points), best, tuple(sorted(lr for lr in used if lr is not None)), plan.higher_is_better)


def _learning_rate(run: Run, knob: str | None) -> float | None:
    if run.lr is not None or knob is None:
        return run.lr
    value = next((value for key, value in run.config.items() if keys.matches(key, [knob])), None)
    return value if isinstance(value, int | float) else None


def check(tuned: dict[str, TunedRate]) -> Iterable[Banner]:
    """Guards: a best rate at the edge of its grid, an arm judged at another rate than its best, unequal grids."""
    for arm, search in tuned.items():
        rates = [point.lr for point in search.points]
        if len(rates) > 1 and search.best in (rates[0], rates[-1]):
            beyond = f"below {rates[0]:g}" if search.best == rates[0] else f"above {rates[-1]:g}"
            yield Banner(
                "LR grid edge",
                f"{arm}: the best learning rate, {search.best:g}, is at the edge of its grid "
                f"({', '.join(f'{lr:g}' for lr in rates)}); a better one may lie {beyond}",
            )
        if any(lr != search.best for lr in search.judged_at):
            best = "unknown, since no run finished" if search.best is None else f"{search.best:g}"
            judged_rates = ", ".join(f"{lr:g}" for lr in search.judged_at)
            yield Banner(
                "learning rate", f"{arm} is judged at {judged_rates}; the best on its selection seeds is {best}"
            )
    sizes = {arm: sum(point.runs for point in search.points) for arm, search in tuned.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{arm} {size}" for arm, size in sizes.items())
        yield Banner("unequal tuning", f"the numbers of runs that tuned the learning rate differ: {listed}")
