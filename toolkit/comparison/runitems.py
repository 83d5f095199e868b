"""Reads the values of a metric item by item from the files of runs, and pairs them for ``itemwise``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.comparison.itemwise import itemwise
from toolkit.comparison.runs import Run
from toolkit.evaluation import itemfile
from toolkit.store import journal

TOLERANCE = 1e-6  # of the largest item: the mean of the items may differ from the metric by so much


@dataclass(frozen=True)
class ItemEvidence:
    """An arm's difference from the baseline for items like these: the ends of its interval, None if there is none, and
    the shares of the variance of the mean difference. ``items`` and ``seeds`` are their numbers."""

    items: int
    seeds: int
    low: float | None
    high: float | None
    share_seeds: float | None
    share_items: float | None
    share_rest: float | None


class ItemReader:
    """The values of one metric, item by item, of runs; each run's file is read once."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        _, self.evaluator, self.key = (*metric.split("/", 2), "", "")[:3]
        self._items: dict[Path, dict[str, float]] = {}

    def compare(self, pairs: Sequence[tuple[Run, Run]], alpha: float) -> ItemEvidence:
        """Compare runs of an arm with runs of the baseline, pair by pair and item by item. Raises ValueError with the
        reason why they can't be compared."""
        if len({run.facts.get("evaluators", {}).get(self.evaluator) for pair in pairs for run in pair}) > 1:
            raise ValueError(f"{self.evaluator} has other items or knobs than in the baseline's runs")
        values = [[self.items(run) for run in reversed(pair)] for pair in pairs]  # the baseline first
        names = sorted(values[0][0])
        for pair, both in zip(pairs, values, strict=True):
            for run, items in zip(reversed(pair), both, strict=True):
                if differing := sorted(items.keys() ^ set(names)):
                    raise ValueError(
                        f"{run.name} has other items than {pairs[0][1].name}: they differ in {len(differing)}, such as "
                        f"{differing[0]}"
                    )
        base, arm = (np.array([[both[side][item] for item in names] for both in values]) for side in (0, 1))
        result = itemwise(arm, base, alpha)
        numbers = (result.low_like, result.high_like, result.share_seeds, result.share_items, result.share_rest)
        return ItemEvidence(len(names), len(pairs), *(float(x) if np.isfinite(x) else None for x in numbers))

    def items(self, run: Run) -> dict[str, float]:
        """{item: value} at the end of a run's budget. Raises ValueError, naming the run or the file, if the file is
        missing or damaged, or if the mean of the items is not the metric in metrics.jsonl."""
        if run.path not in self._items:
            self._items[run.path] = self._read(run)
        return self._items[run.path]

    def _read(self, run: Run) -> dict[str, float]:
        file = itemfile.path(run.path / itemfile.FOLDER, self.evaluator, run.steps)
        if self.evaluator in ("", ".", "..") or not file.is_file():
            raise ValueError(f"{run.name} has no items of {self.evaluator or self.metric} at step {run.steps:,}")
        items = {item: values[self.key] for item, values in _rows(run, file).items() if self.key in values}
        if not items:
            raise ValueError(f"{self.metric} is not measured item by item")
        value, mean, largest = (
            run.value(self.metric),
            math.fsum(items.values()) / len(items),
            max(map(abs, items.values())),
        )
        if not math.isfinite(mean):
            raise ValueError(f"{file}: {self.key} is not a finite number for every item")
        if value is None or abs(mean - value) > TOLERANCE * largest:
            raise ValueError(
                f"{self.metric} of {run.name} is {value} in metrics.jsonl, but the mean of its items is {mean:.6g}: "
                "the metric is no mean over items, or the file is damaged"
            )
        return items


def counts(run: Run) -> dict[str, int]:
    """{metric: number of its items} of a run's last evaluation; files that are damaged are left out."""
    numbers: dict[str, int] = {}
    for name in itemfile.names(run.path, run.steps):
        file = run.path / name
        with contextlib.suppress(ValueError):
            for values in _rows(run, file).values():
                for key in values:
                    metric = f"eval/{file.parent.name}/{key}"
                    numbers[metric] = numbers.get(metric, 0) + 1
    return numbers


def _rows(run: Run, file: Path) -> dict[str, dict[str, float]]:
    """A file of items. Raises ValueError if it is not what the run wrote, or can't be read."""
    name = file.relative_to(run.path).as_posix()
    if damage := journal.damage(run.path, {name: run.extents[name]} if name in run.extents else {}, whole=True):
        raise ValueError(damage)
    try:
        return itemfile.read(file)
    except OSError as error:
        raise ValueError(f"{file} can't be read: {error.strerror}") from error
