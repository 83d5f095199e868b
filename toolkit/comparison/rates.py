"""Learning rates: each arm's best is chosen on seeds of their own, and the arms are judged on fresh ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from toolkit.comparison.guards import Banner, knob_of
from toolkit.comparison.runs import Plan, Run


@dataclass(frozen=True)
class Point:
    """One rate of an arm: the mean over the runs that finished, None where none did."""

    lr: float
    mean: float | None
    values: tuple[float, ...]
    runs: int


@dataclass(frozen=True)
class Tuned:
    """An arm's grid, lowest rate first; the rate chosen on it, and the rates of the runs that are judged."""

    points: tuple[Point, ...]
    best: float | None
    judged_at: tuple[float, ...]

    @property
    def sensitivity(self) -> float | None:
        """The mean loss over the grid above that at the best rate: 0 for an arm that does not mind."""
        means = [point.mean for point in self.points if point.mean is not None]
        return float(np.mean(means) - min(means)) if means else None


def tune(plan: Plan, arm: str, judged: list[Run], selection: list[Run], metric: str) -> Tuned | None:
    """The best rate is the lowest mean among those at which the most runs finished. None without a grid."""
    tried = [run for run in selection if run.arm == arm and run.lr is not None]
    if not tried:
        return None
    points = []
    for lr in sorted({run.lr for run in tried}):
        values = [run.value(metric) for run in tried if run.lr == lr]
        finished = tuple(value for value in values if value is not None)
        points.append(Point(lr, float(np.mean(finished)) if finished else None, finished, len(values)))
    whole = [point for point in points if point.mean is not None]
    best = min(whole, key=lambda point: (point.runs - len(point.values), point.mean)).lr if whole else None
    knob = knob_of(plan.lr, arm)
    used = {_rate(run, knob) for run in judged if run.arm == arm and run.facts}
    return Tuned(tuple(points), best, tuple(sorted(lr for lr in used if lr is not None)))


def _rate(run: Run, knob: str | None) -> float | None:
    if run.lr is not None or knob is None:
        return run.lr
    return next((value for key, value in run.config.items() if fnmatchcase(key, knob)), None)


def check(tuned: dict[str, Tuned]) -> Iterable[Banner]:
    """A best rate at the grid's edge, arms with unequal grids, an arm that is judged at another rate than its best."""
    for arm, found in tuned.items():
        rates = [point.lr for point in found.points]
        if len(rates) > 1 and found.best in (rates[0], rates[-1]):
            beyond = f"below {rates[0]:g}" if found.best == rates[0] else f"above {rates[-1]:g}"
            yield Banner(
                "LR grid edge",
                f"{arm}: the best learning rate, {found.best:g}, is at the edge of its grid "
                f"({', '.join(f'{lr:g}' for lr in rates)}); a better one may lie {beyond}",
            )
        if any(lr != found.best for lr in found.judged_at):
            best = "not known: none finished" if found.best is None else f"{found.best:g}"
            at = ", ".join(f"{lr:g}" for lr in found.judged_at)
            yield Banner("learning rate", f"{arm} is judged at {at}; the best on its selection seeds is {best}")
    sizes = {arm: sum(point.runs for point in found.points) for arm, found in tuned.items()}
    if len(set(sizes.values())) > 1:
        yield Banner("unequal tuning", ", ".join(f"{arm} {size} runs" for arm, size in sizes.items()))
