"""Reads the rows of probes: the metrics ``probe/NAME/STATISTIC/MODULE`` of a run, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PREFIX = "probe/"
LARGEST = 1e100  # larger values are not measurements; their squares would overflow a float


class Key(NamedTuple):
    """What a value is of: the probe, its statistic, and a module or parameter; "" is the whole model."""

    probe: str
    statistic: str
    module: str = ""

    def __str__(self) -> str:
        return f"{self.probe}/{self.statistic}" + (f"/{self.module}" if self.module else "")


class Place(NamedTuple):
    """A module's role in its layer, with * for the number of the layer (``blocks.*.ffn``), and that number. A module
    outside of the layers is its own role, and its layer is None."""

    role: str
    layer: int | None


@dataclass(frozen=True)
class ProbeTable:
    """The values of a run: ``values`` is (steps, keys), nan where a row or a finite value is missing. ``keys`` are in
    the order of the rows. ``not_finite`` counts the values of each key that are written, but are not finite."""

    keys: tuple[Key, ...]
    steps: tuple[int, ...]
    values: NDArray[np.float64] = field(repr=False)
    not_finite: Mapping[Key, int] = field(default_factory=dict)


def parse(metric: str) -> Key | None:
    """The key of a metric's name; None for a metric that no probe wrote."""
    parts = metric.removeprefix(PREFIX).split("/", 2)
    return Key(*parts) if metric.startswith(PREFIX) and len(parts) > 1 else None


def read(rows: Iterable[Mapping[str, Any]]) -> ProbeTable:
    """The table of a run's rows. If a step has several rows, the later value counts."""
    values: dict[tuple[int, Key], float] = {}
    keys: dict[str, Key | None] = {}
    for row in rows:
        for metric, value in row.items():
            if metric.startswith(PREFIX):
                key = keys.setdefault(metric, parse(metric))
                if key is not None and (number := _number(value)) is not None:
                    values[row["step"], key] = number
    used = tuple(dict.fromkeys(key for _, key in values))
    steps = tuple(sorted({step for step, _ in values}))
    array = np.full((len(steps), len(used)), np.nan)
    row_of, column_of = ({item: i for i, item in enumerate(items)} for items in (steps, used))
    for (step, key), value in values.items():
        array[row_of[step], column_of[key]] = value
    not_finite = Counter(key for (_, key), value in values.items() if not np.isfinite(value))
    return ProbeTable(used, steps, array, not_finite)


def _number(value: object) -> float | None:
    """A value as a float, nan if it is too large; None for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if abs(float(value)) < LARGEST else float("nan")
    except OverflowError:  # an integer too large for a float
        return float("nan")


def model_order(modules: Iterable[str]) -> dict[str, int]:
    """The place of each module in the order of the model, from 0: numbered layers by number, other names as they come
    first, the parts of a module before the module itself, whose output follows theirs, and the whole model ("") last.
    """
    names = list(dict.fromkeys(modules))
    first_seen: dict[tuple[str, ...], int] = {}
    for name in names:
        parts = tuple(name.split("."))
        for depth in range(1, len(parts) + 1):
            first_seen.setdefault(parts[:depth], len(first_seen))

    def rank(name: str) -> list[tuple[int, int]]:
        parts = tuple(name.split(".")) if name else ()
        ranks = [
            (0, int(part)) if _is_index(part) else (1, first_seen[parts[: depth + 1]])
            for depth, part in enumerate(parts)
        ]
        return [*ranks, (2, 0)]

    return {name: place for place, name in enumerate(sorted(names, key=rank))}


def place(module: str) -> Place:
    """The role of a module and the number of its layer."""
    parts = module.split(".")
    for i, part in enumerate(parts):
        if _is_index(part):
            return Place(".".join([*parts[:i], "*", *parts[i + 1 :]]), int(part))
    return Place(module, None)


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) < 10


def statistics(keys: Sequence[Key]) -> list[tuple[str, str]]:
    """The statistics (probe, statistic) of keys, without repetitions."""
    return list(dict.fromkeys((key.probe, key.statistic) for key in keys))
