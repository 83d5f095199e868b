"""The conformance check: what a part of each kind has to keep, tried on the part and reported a line each.

``lines(bench)`` runs every check that is there for the part's kind. A check is a function that takes a Bench and
returns a Gauge; it raises NotApplicable with the reason where it does not apply. What else it raises counts as a
failure of its line, so a broken part can fail but never stop the report."""

from toolkit.conformance import decoding, inits, kernels, layers, loggers, losses, optimizers, schedules, texts
from toolkit.conformance.bench import Bench, bench_of
from toolkit.conformance.report import CHECKS, Line, lines

__all__ = ["CHECKS", "Bench", "Line", "bench_of", "lines"]
ORDER = [m.__name__ for m in (layers, decoding, kernels, inits, losses, optimizers, schedules, texts, loggers)]
CHECKS.sort(key=lambda each: ORDER.index(each.run.__module__))
