"""Checks of a learning-rate schedule."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from toolkit.conformance.bench import Bench
from toolkit.conformance.lines import Broken, Gauge, NotApplicable, check

HORIZONS = (1, 2, 3, 10, 100, 777)


@check("factor is finite, from 0 to 1", "schedule", look_at="the first and the last step, and runs of few steps")
def bounded(bench: Bench) -> Gauge:
    """The factor is finite and between 0 and 1 at every step, for short and long runs, and for fractions of 0, 0.37 and
    1. In runs of 100 steps or more it reaches 1."""
    gauge = Gauge(1e-9, "distance to the range from 0 to 1")
    for steps in HORIZONS:
        for title, schedule in _schedules(bench, steps):
            values = [schedule(step) for step in range(steps)]
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
                raise Broken(
                    f"a factor is not a finite number in a run of {steps} steps{title}, and must be; look for "
                    "divisions by the number of steps that remain"
                )
            gauge.record(max(0.0, -min(values), max(values) - 1), f"{steps} steps")
            if steps >= 100 and max(values) < 0.99:
                raise Broken(
                    f"the largest factor is {max(values):.3f} in a run of {steps} steps{title}, and must be 1; the "
                    "factor multiplies the peak learning rate"
                )
    return gauge


@check("depends on the step only", "schedule", look_at="attributes that __call__ changes, and random numbers")
def pure(bench: Bench) -> Gauge:
    """The factor depends only on the step: asked in reverse order, or from another instance, it is the same. So there
    is no state to save."""
    gauge = Gauge(0.0, "largest difference")
    for (_, schedule), (_, other) in zip(_schedules(bench, 100), _schedules(bench, 100), strict=True):
        forward = [schedule(step) for step in range(100)]
        backward = [schedule(step) for step in reversed(range(100))][::-1]
        fresh = [other(step) for step in (99, 50, 0)]
        gauge.record(max(abs(a - b) for a, b in zip(forward, backward, strict=True)), "100 steps, backwards")
        gauge.record(max(abs(a - forward[s]) for a, s in zip(fresh, (99, 50, 0), strict=True)), "another instance")
    return gauge


@check("refuses a warm-up that is too long", "schedule")
def refused(bench: Bench) -> Gauge:
    """A warm-up that leaves no step at the peak is a ValueError that names the knob."""
    if "warmup_steps" not in bench.entry.knobs:
        raise NotApplicable("it has no knob warmup_steps")
    try:
        bench.cls(100, warmup_steps=100)
    except ValueError as error:
        if "warmup_steps" not in str(error):
            raise Broken(f"the error must name warmup_steps, so that the user finds it, but says: {error}") from error
        gauge = Gauge(note="refused, and the error names the knob")
        gauge.record(0, "100 of 100 steps")
        return gauge
    raise Broken(
        "it accepts warmup_steps = 100 in a run of 100 steps, which leaves no step at the peak; it must raise a "
        "ValueError that names warmup_steps"
    )


def _schedules(bench: Bench, steps: int) -> list[tuple[str, Callable[[int], float]]]:
    """(title, schedule) for several warm-ups and fractions. Settings that the schedule refuses with ValueError are left
    out. Raises Broken if it refuses all of them."""
    warmups: list[dict[str, object]] = [{}]
    if "warmup_steps" in bench.entry.knobs:
        warmups = [{"warmup_steps": w} for w in sorted({0, 1, steps // 10, steps // 2}) if w < steps]
    settings: list[dict[str, object]] = [{}]
    for knob in bench.entry.knobs:
        if knob.endswith("_fraction"):
            settings += [{knob: value} for value in (0.0, 0.37, 1.0)]
    schedules = []
    for warmup in warmups:
        for setting in settings:
            knobs = bench.knobs | warmup | setting
            try:
                schedules.append((f", {knobs}" if knobs else "", functools.partial(bench.entry.cls, **knobs)(steps)))
            except ValueError:
                continue
    if not schedules and steps >= 10:
        raise Broken(
            f"it refuses every setting that was tried for a run of {steps} steps, and must accept one; look at the "
            "ValueErrors in its constructor"
        )
    return schedules
