"""The lines of the conformance report: registers the checks, runs them, and records what they measure."""

from __future__ import annotations

import contextlib
import math
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from toolkit.conformance.bench import Bench


@dataclass(frozen=True)
class Line:
    """The result of one check of one part. ``verdict`` is "pass", "fail" or "n/a"; ``why`` is the reason if not
    "pass"."""

    check: str
    verdict: str
    figure: str = ""
    tolerance: str = ""
    tried: str = ""
    why: str = ""


class NotApplicable(Exception):
    """The check does not apply to this part; the message says why."""


class Broken(Exception):
    """The part breaks the rule that the check tests; the message says how."""


@dataclass
class Gauge:
    """The worst error over all tested shapes and settings. An error above ``tolerance``, or nan, is a failure."""

    tolerance: float = 0.0
    what: str = "largest error"
    tried: list[str] = field(default_factory=list)
    worst: float = 0.0
    worst_at: str = ""
    note: str = ""

    def record(self, error: float, tried: str) -> None:
        """Record an error and the shape or setting at which it was measured."""
        error = float(error)
        error = math.inf if math.isnan(error) else error
        self.tried.append(tried)
        if error > self.worst or not self.worst_at:
            self.worst, self.worst_at = error, tried

    def line(self, check: str) -> Line:
        shapes = _summarize_settings(self.tried)
        figure = self.note or f"{self.what} {self.worst:.1e}".replace("0.0e+00", "0")
        tolerance = "" if self.note and not self.tolerance else f"{self.tolerance:.0e}" if self.tolerance else "0"
        if self.worst <= self.tolerance:
            return Line(check, "pass", figure, tolerance, shapes)
        return Line(check, "fail", figure, tolerance, shapes, f"{self.what} {self.worst:.2e} at {self.worst_at}")


def _summarize_settings(tried: list[str]) -> str:
    """List each shape and setting once: ["T=2", "T=13", "T=13, bias"] gives "T=2, 13; bias"."""
    groups: dict[str, list[str]] = {}
    for factor in dict.fromkeys(factor for title in tried for factor in title.split(", ")):
        match = re.fullmatch(r"(\w+=)(\d+)", factor)
        groups.setdefault(match[1] if match else factor, []).append(match[2] if match else "")
    return "; ".join(prefix + ", ".join(numbers) for prefix, numbers in groups.items())


@dataclass(frozen=True)
class Check:
    """One check: its title, the kinds of parts it is for, whether it takes seconds, and its function."""

    title: str
    kinds: tuple[str, ...]
    slow: bool
    run: Callable


CHECKS: list[Check] = []


def check(title: str, *kinds: str, slow: bool = False) -> Callable[[Callable], Callable]:
    """Register a function (bench) -> Gauge as a check for parts of these kinds. Used as a decorator."""

    def add(function: Callable) -> Callable:
        CHECKS.append(Check(title, kinds, slow, function))
        return function

    return add


def lines(bench: Bench, slow: bool = True, only: str | None = None) -> Iterator[Line]:
    """Run the checks for a part's kind, in order, and yield a Line for each. ``slow=False`` leaves out the slow checks,
    which compile. ``only`` is the title of the single check to run."""
    for each in CHECKS:
        if bench.entry.kind not in each.kinds or (each.slow and not slow) or only not in (None, each.title):
            continue
        try:
            with _isolated():
                yield each.run(bench).line(each.title)
        except NotApplicable as reason:
            yield Line(each.title, "n/a", why=str(reason))
        except Broken as fault:
            yield Line(each.title, "fail", why=str(fault))
        except Exception as error:  # a part can fail in any way; the report continues
            yield Line(each.title, "fail", why=_error_with_place(error))


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Run a check with seed 0 and without warnings; restore the caller's random generator on exit."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def _error_with_place(error: Exception) -> str:
    """The first line of an error, with the place in the part's own code where it was raised."""
    outer_frames = [f for f in traceback.extract_tb(error.__traceback__) if "/toolkit/conformance/" not in f.filename]
    part_frames = [f for f in outer_frames if "site-packages" not in f.filename and "/torch/" not in f.filename]
    place = f" ({part_frames[-1].filename}:{part_frames[-1].lineno})" if part_frames else ""
    message = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {message[:300]}{place}"
