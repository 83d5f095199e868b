"""Measuring on a machine that others use too: contestants take turns, a probe says whether a round can be trusted."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from toolkit.rundir.facts import environment

TOLERANCE = 0.1  # how far the probe may move within a round


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def show(self, digits: int = 2) -> str:
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


@dataclass
class Rounds:
    """Per contestant one value a round, the larger the better; per round the probe's seconds before and after."""

    values: dict[str, list[float]]
    probes: list[tuple[float, float]] = field(default_factory=list)
    repeated: int = 0  # rounds thrown away since the probe had moved
    restless: int = 0  # rounds kept although it had: there was no repeat left

    def spread(self, name: str) -> Spread:
        return Spread.of(self.values[name])

    def ratio(self, name: str, other: str) -> Spread:
        """Round by round, so that what slows a whole round cancels."""
        return Spread.of(a / b for a, b in zip(self.values[name], self.values[other], strict=True))

    def best(self, names: Iterable[str]) -> str:
        """The contestant with the largest median."""
        return max(names, key=lambda name: self.spread(name).median)

    def probe(self) -> Spread:
        """Seconds, each round's mean."""
        return Spread.of(sum(pair) / 2 for pair in self.probes)

    def of_bound(self, name: str, work: float) -> Spread:
        """The rate over what ``work`` per probe would be, round by round."""
        pairs = zip(self.values[name], self.probes, strict=True)
        return Spread.of(value / (work / (sum(probe) / 2)) for value, probe in pairs)

    def summary(self) -> str:
        """How the rounds went, in words."""
        text = f"{len(self.probes)} rounds kept, {self.repeated} repeated since the probe moved by more than 10 %"
        return text + (f"; {self.restless} kept all the same: no repeats left" if self.restless else "")


def interleave(
    turns: dict[str, Callable[[], float]], rounds: int, probe: Callable[[], float], repeats: int | None = None
) -> Rounds:
    """A B C, A B C ...: each turn returns a rate. ``probe`` returns seconds and runs between rounds; a round before and
    after which it differs by more than 10 % is thrown away and run again, ``repeats`` times in all (as many as there
    are rounds), after which restless rounds are kept and counted. Each round starts with another contestant."""
    kept = Rounds({name: [] for name in turns})
    left, names, before = rounds if repeats is None else repeats, list(turns), probe()
    while len(kept.probes) < rounds:
        first = len(kept.probes) % len(names)
        values = {name: turns[name]() for name in names[first:] + names[:first]}
        after = probe()
        moved = abs(after - before) / min(after, before) > TOLERANCE
        if moved and left:
            note(f"round {len(kept.probes) + 1} is repeated: the probe went from {before:.3f} to {after:.3f} s")
            left, kept.repeated, before = left - 1, kept.repeated + 1, after
            continue
        kept.restless += moved
        kept.probes.append((before, after))
        for name, value in values.items():
            kept.values[name].append(value)
        note(f"round {len(kept.probes)} of {rounds}: " + ", ".join(f"{n} {v:,.4g}" for n, v in values.items()))
        before = after
    return kept


def seconds(
    work: Callable[[], object], device: torch.device, times: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of ``times`` calls by ``clock``, with what they started on a GPU."""
    started = clock()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def note(text: str) -> None:
    """Progress, on stderr: stdout is for the table."""
    print(text, file=sys.stderr, flush=True)


def table(title: str, columns: list[str], rows: list[list[str]], caption: str = "") -> None:
    """A table for people: the first column to the left, figures to the right."""
    shown = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        shown.add_row(*row)
    width = None if sys.stdout.isatty() else max(150, int(os.environ.get("COLUMNS", 0)))
    Console(width=width).print(shown)


def report(as_json: bool, result: dict[str, object], show: Callable[[], None]) -> None:
    """One JSON object, or the tables. What the machine is belongs to either."""
    where = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    where |= {"cores": os.cpu_count(), "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    if as_json:
        print(json.dumps({"machine": where} | result, indent=1, default=vars))
        return
    show()
    text = f"{where['device_name']}, {where['threads']} threads of {where['cores']} cores, load {where['load']:.1f}"
    print(f"{text}; Python {where['python']}, torch {torch.__version__}")
