"""The lines of the conformance report: registers the checks, runs them, and records what they measure."""

from __future__ import annotations

import contextlib
import math
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, SupportsFloat

import torch

if TYPE_CHECKING:
    from toolkit.conformance.bench import Bench

    CheckFunction = Callable[["Bench"], "Gauge"]


@dataclass(frozen=True)
class Line:
    """The result of one check of one part.

    check      the title of the check
    verdict    "pass", "fail" or "n/a"
    figure     the largest error that was measured, or another result
    tolerance  the largest error that is allowed
    tried      the shapes and settings that were tested
    why        if not "pass": what was measured, what it should be and what to look at in the part
    """

    check: str
    verdict: str
    figure: str = ""
    tolerance: str = ""
    tried: str = ""
    why: str = ""


class NotApplicable(Exception):
    """The check does not apply to this part. The message says why."""


class Broken(Exception):
    """The part breaks the rule that the check tests. The message says how, and what to change."""


@dataclass
class Gauge:
    """The largest error over all tested shapes and settings. An error above ``tolerance``, or nan, is a failure.

    ``what`` names the error. ``note`` is a text that the report shows in place of the error when the check passes."""

    tolerance: float = 0.0
    what: str = "largest error"
    tried: list[str] = field(default_factory=list)
    worst: float = 0.0
    worst_at: str = ""
    note: str = ""

    def record(self, error: SupportsFloat, tried: str) -> None:
        """Record an error and the shape or setting at which it was measured."""
        value = float(error)
        value = math.inf if math.isnan(value) else value
        self.tried.append(tried)
        if value > self.worst or not self.worst_at:
            self.worst, self.worst_at = value, tried

    def line(self, check: Check) -> Line:
        """The report's line for a check that ended with this gauge."""
        shapes = _summarize_settings(self.tried)
        limit = f"{self.tolerance:.0e}" if self.tolerance else "0"
        figure = self.note or f"{self.what}: {_number(self.worst)}"
        if self.worst <= self.tolerance:
            return Line(check.title, "pass", figure, "" if self.note and not self.tolerance else limit, shapes)
        allowed = f"must be at most {limit}" if self.tolerance else "must be 0"
        measured = f"{self.what}: {_number(self.worst)} at {self.worst_at}, {allowed}"
        if math.isinf(self.worst):
            measured = f"shapes differ or a value is not finite at {self.worst_at}; the {self.what} {allowed}"
        return Line(check.title, "fail", figure, limit, shapes, f"{measured}; look at {check.look_at}")


def _number(value: float) -> str:
    """A whole number without decimals, any other number with two significant digits."""
    return f"{value:.0f}" if value.is_integer() else f"{value:.2g}"


def _summarize_settings(tried: list[str]) -> str:
    """List each shape and setting once: ["T=2", "T=13", "T=13, bias"] gives "T=2, 13; bias"."""
    groups: dict[str, list[str]] = {}
    for factor in dict.fromkeys(factor for title in tried for factor in title.split(", ")):
        match = re.fullmatch(r"(\w+=)(\d+)", factor)
        groups.setdefault(match[1] if match else factor, []).append(match[2] if match else "")
    return "; ".join(prefix + ", ".join(numbers) for prefix, numbers in groups.items())


@dataclass(frozen=True)
class Check:
    """One check.

    title    what the part must do, at most WIDTH characters
    kinds    the kinds of parts that it tests
    look_at  what in the part is usually the cause when the error is above the tolerance
    slow     whether it takes seconds
    run      the check itself
    """

    title: str
    kinds: tuple[str, ...]
    look_at: str
    slow: bool
    run: Callable[[Bench], Gauge]


CHECKS: list[Check] = []
WIDTH = 38  # characters of a title, so that the report's columns line up


def check(title: str, *kinds: str, look_at: str = "", slow: bool = False) -> Callable[[CheckFunction], CheckFunction]:
    """Decorator that registers a function (bench) -> Gauge as a check for parts of these kinds. A check whose gauge can
    fail needs ``look_at``."""
    assert len(title) <= WIDTH, title

    def add(function: CheckFunction) -> CheckFunction:
        CHECKS.append(Check(title, kinds, look_at, slow, function))
        return function

    return add


def run_checks(bench: Bench, slow: bool = True, only: str | None = None) -> Iterator[Line]:
    """Run the checks for a part's kind, in order, and yield a Line for each. ``slow=False`` leaves out the slow checks,
    which compile. ``only`` is the title of the single check to run."""
    for each in CHECKS:
        if bench.entry.kind not in each.kinds or (each.slow and not slow) or only not in (None, each.title):
            continue
        yield _run(each, bench)


def _run(check: Check, bench: Bench) -> Line:
    """Run one check. An error in the part's own code becomes a line that fails."""
    try:
        with _isolated():
            return check.run(bench).line(check)
    except NotApplicable as reason:
        return Line(check.title, "n/a", why=str(reason))
    except Broken as fault:
        return Line(check.title, "fail", why=str(fault))
    except Exception as error:  # a part can fail in any way; the report continues
        return Line(check.title, "fail", why=f"it raised {_error_with_place(error)}")


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Run a check with seed 0, with gradients and without warnings; restore the caller's random generator and grad mode
    on exit."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def _error_with_place(error: Exception) -> str:
    """The first line of an error, with the place in the part's own code where it was raised, or that it names."""
    outer_frames = [f for f in traceback.extract_tb(error.__traceback__) if "/toolkit/conformance/" not in f.filename]
    part_frames = [f for f in outer_frames if "site-packages" not in f.filename and "/torch/" not in f.filename]
    places = [(frame.filename, frame.lineno) for frame in part_frames]
    places = places or re.findall(r'File "([^"]+)", line (\d+)', str(error))  # as in an error of torch.compile
    place = " ({}:{})".format(*places[-1]) if places else ""
    message = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {message[:300]}{place}"
