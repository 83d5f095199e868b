"""Measuring on a shared machine: contestants have their turns in rounds, and a probe shows whether a round is
steady."""

from __future__ import annotations

import argparse
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

TOLERANCE = 0.1  # the largest relative change of the probe within a round


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
    """One value per contestant and round, larger is better; and the seconds of the probe before and after each
    round."""

    values: dict[str, list[float]]
    probes: list[tuple[float, float]] = field(default_factory=list)
    repeated: int = 0  # rounds that were discarded, since the probe changed
    restless: int = 0  # rounds that were kept although the probe changed, since no repeats were left

    def spread(self, name: str) -> Spread:
        return Spread.of(self.values[name])

    def ratio(self, name: str, other: str) -> Spread:
        """The ratio of two contestants within each round, so that what slows down a whole round cancels out."""
        return Spread.of(a / b for a, b in zip(self.values[name], self.values[other], strict=True))

    def best(self, names: Iterable[str]) -> str:
        """The contestant with the largest median."""
        return max(names, key=lambda name: self.spread(name).median)

    def probe(self) -> Spread:
        """The seconds of the probe, as the mean of each round."""
        return Spread.of(sum(pair) / 2 for pair in self.probes)

    def of_bound(self, name: str, work: float) -> Spread:
        """The rate of a contestant divided by ``work`` per second of the probe, within each round."""
        pairs = zip(self.values[name], self.probes, strict=True)
        return Spread.of(value / (work / (sum(probe) / 2)) for value, probe in pairs)

    def summary(self) -> str:
        """How many rounds were kept and repeated, in words."""
        text = f"{len(self.probes)} rounds kept, {self.repeated} repeated because the probe changed by more than 10 %"
        return text + (
            f"; {self.restless} of those kept also changed, but no repeats were left" if self.restless else ""
        )


def interleave(
    turns: dict[str, Callable[[], float]], rounds: int, probe: Callable[[], float], repeats: int | None = None
) -> Rounds:
    """Run the contestants in turn, A B C, A B C, ..., and return their rates. Each round starts with another
    contestant.

    Each turn returns a rate. ``probe`` runs between rounds and returns seconds. If it differs by more than 10 % before
    and after a round, the round is discarded and run again, ``repeats`` times in all (None: as often as there are
    rounds). When no repeats are left, such rounds are kept and counted."""
    kept = Rounds({name: [] for name in turns})
    left, names, before = rounds if repeats is None else repeats, list(turns), probe()
    while len(kept.probes) < rounds:
        first = len(kept.probes) % len(names)
        values = {name: turns[name]() for name in names[first:] + names[:first]}
        after = probe()
        moved = abs(after - before) / min(after, before) > TOLERANCE
        if moved and left:
            note(f"round {len(kept.probes) + 1} is repeated: the probe changed from {before:.3f} to {after:.3f} s")
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
    """Seconds of ``times`` calls by ``clock``, including the work that they started on a GPU."""
    started = clock()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def add_cpu_time_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag --cpu-time, which sets ``clock`` to the clock that measures processor time."""
    parser.add_argument(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help="measure processor time, for a machine with other busy processes; use it with --threads 1",
    )


def note(text: str) -> None:
    """Print progress on stderr; stdout is for the table."""
    print(text, file=sys.stderr, flush=True)


def table(title: str, columns: list[str], rows: list[list[str]], caption: str = "") -> None:
    """Print a table, with the first column to the left and figures to the right."""
    shown = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        shown.add_row(*row)
    width = None if sys.stdout.isatty() else max(150, int(os.environ.get("COLUMNS", 0)))
    Console(width=width).print(shown)


def report(as_json: bool, result: dict[str, object], show: Callable[[], None]) -> None:
    """Print one JSON object or the tables, with a description of the machine in both."""
    where = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    where |= {"cores": os.cpu_count(), "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    if as_json:
        print(json.dumps({"machine": where} | result, indent=1, default=vars))
        return
    show()
    text = f"{where['device_name']}, {where['threads']} threads of {where['cores']} cores, load {where['load']:.1f}"
    print(f"{text}; Python {where['python']}, torch {torch.__version__}")
