"""The conformance checks: rules for the parts of each kind, tested on a part and reported with one line for each check.

``run_checks(bench)`` runs all checks for the part's kind. A check is a function that takes a Bench and returns a Gauge.
It raises NotApplicable, with the reason, if it does not apply to the part. Any other exception makes its line a
failure, so a broken part never stops the report."""

from toolkit.conformance import (
    alone,
    decoding,
    evaluators,
    inits,
    kernels,
    layers,
    loggers,
    losses,
    mixers,
    optimizers,
    positions,
    probes,
    schedules,
    texts,
    training,
)
from toolkit.conformance.bench import Bench, bench_of
from toolkit.conformance.lines import CHECKS, Line, run_checks

__all__ = ["CHECKS", "Bench", "Line", "bench_of", "run_checks"]
_LAYERS = (layers, alone, training, positions, mixers, decoding, kernels)
_ORDER = [
    file.__name__ for file in (*_LAYERS, inits, losses, optimizers, schedules, texts, loggers, evaluators, probes)
]
CHECKS.sort(key=lambda check: _ORDER.index(check.run.__module__))  # the order of the report
