"""A line of the report: what a check measured, against which tolerance, and on which shapes."""

from __future__ import annotations

import contextlib
import math
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Line:
    """One check of one part. ``verdict`` is "pass", "fail" or "n/a"; ``why`` is the reason of the latter two."""

    check: str
    verdict: str
    figure: str = ""
    tolerance: str = ""
    tried: str = ""
    why: str = ""


class NotApplicable(Exception):
    """The check does not apply to this part; the message says why."""


class Broken(Exception):
    """The part breaks what the check is about; the message says how."""


@dataclass
class Gauge:
    """The worst error seen over the shapes tried. Every error above ``tolerance`` (or not a number) is a failure."""

    tolerance: float = 0.0
    what: str = "largest error"
    tried: list[str] = field(default_factory=list)
    worst: float = 0.0
    at: str = ""
    note: str = ""

    def see(self, error: float, tried: str) -> None:
        """Note an error and the shape or setting that it was measured at."""
        error = float(error)
        error = math.inf if math.isnan(error) else error
        self.tried.append(tried)
        if error > self.worst or not self.at:
            self.worst, self.at = error, tried

    def line(self, check: str) -> Line:
        shapes = _short(self.tried)
        figure = self.note or f"{self.what} {self.worst:.1e}".replace("0.0e+00", "0")
        tolerance = "" if self.note and not self.tolerance else f"{self.tolerance:.0e}" if self.tolerance else "0"
        if self.worst <= self.tolerance:
            return Line(check, "pass", figure, tolerance, shapes)
        return Line(check, "fail", figure, tolerance, shapes, f"{self.what} {self.worst:.2e} at {self.at}")


def _short(tried: list[str]) -> str:
    """Each shape and setting once: T=2; T=13; T=13, bias as T=2, 13; bias."""
    groups: dict[str, list[str]] = {}
    for factor in dict.fromkeys(factor for title in tried for factor in title.split(", ")):
        found = re.fullmatch(r"(\w+=)(\d+)", factor)
        groups.setdefault(found[1] if found else factor, []).append(found[2] if found else "")
    return "; ".join(before + ", ".join(numbers) for before, numbers in groups.items())


@dataclass(frozen=True)
class Check:
    """One line of the report: its title, the kinds it is for, whether it takes seconds, and the function."""

    title: str
    kinds: tuple[str, ...]
    slow: bool
    run: Callable


CHECKS: list[Check] = []


def check(title: str, *kinds: str, slow: bool = False):
    """Put a function (bench) -> Gauge into the report of these kinds."""

    def add(function):
        CHECKS.append(Check(title, kinds, slow, function))
        return function

    return add


def lines(bench, slow: bool = True, only: str | None = None) -> Iterator[Line]:
    """The report on one part, a Line per check of its kind, in order; ``slow=False`` leaves out what compiles, and
    ``only`` all but the check of that title."""
    for each in CHECKS:
        if bench.entry.kind not in each.kinds or (each.slow and not slow) or only not in (None, each.title):
            continue
        try:
            with _quiet():
                yield each.run(bench).line(each.title)
        except NotApplicable as reason:
            yield Line(each.title, "n/a", why=str(reason))
        except Broken as fault:
            yield Line(each.title, "fail", why=str(fault))
        except Exception as error:  # a part can fail in any way; its report goes on
            yield Line(each.title, "fail", why=_told(error))


@contextlib.contextmanager
def _quiet():
    """A check's own surroundings: seeded, the caller's generator as found, warnings kept out of the report."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def _told(error: Exception) -> str:
    """An error with the place in the part's own code where it arose."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/toolkit/conformance/" not in f.filename]
    ours = [f for f in frames if "site-packages" not in f.filename and "/torch/" not in f.filename]
    place = f" ({ours[-1].filename}:{ours[-1].lineno})" if ours else ""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:300]}{place}"
