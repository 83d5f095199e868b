"""The conformance checks: rules for the parts of each kind, tested on a part and reported with one line for each check.

``lines(bench)`` runs all checks for the part's kind. A check is a function that takes a Bench and returns a Gauge. It
raises NotApplicable, with the reason, if it does not apply to the part. Any other exception makes its line a failure,
so a broken part never stops the report."""

from toolkit.conformance import decoding, inits, kernels, layers, loggers, losses, optimizers, schedules, texts
from toolkit.conformance.bench import Bench, bench_of
from toolkit.conformance.lines import CHECKS, Line, lines

__all__ = ["CHECKS", "Bench", "Line", "bench_of", "lines"]
ORDER = [m.__name__ for m in (layers, decoding, kernels, inits, losses, optimizers, schedules, texts, loggers)]
CHECKS.sort(key=lambda each: ORDER.index(each.run.__module__))
