"""Checks of a learning-rate schedule."""

from __future__ import annotations

import functools
import math

from toolkit.conformance.bench import Bench
from toolkit.conformance.report import Broken, Gauge, NotApplicable, check

HORIZONS = (1, 2, 3, 10, 100, 777)


@check("finite, from 0 to the peak", "schedule")
def bounded(bench: Bench) -> Gauge:
    """A multiple between 0 and 1 at every step of every horizon, with its fractions at both ends and in between; what
    can't be is refused with the knob's name. The peak is reached."""
    gauge = Gauge(1e-9, "distance outside 0 ... 1,")
    for steps in HORIZONS:
        for title, schedule in _built(bench, steps):
            values = [schedule(step) for step in range(steps)]
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
                raise Broken(f"not a finite number somewhere in {steps} steps{title}")
            gauge.see(max(0.0, -min(values), max(values) - 1), f"{steps} steps")
            if steps >= 100 and max(values) < 0.99:
                raise Broken(f"the peak is {max(values):.3f} in {steps} steps{title}, not 1")
    return gauge


@check("a pure function of the step", "schedule")
def pure(bench: Bench) -> Gauge:
    """Asked backwards, or by another instance, it gives the same: there is nothing to save, and nothing to resume."""
    gauge = Gauge(0.0, "largest difference")
    for (_, schedule), (_, other) in zip(_built(bench, 100), _built(bench, 100), strict=True):
        forward = [schedule(step) for step in range(100)]
        backward = [schedule(step) for step in reversed(range(100))][::-1]
        fresh = [other(step) for step in (99, 50, 0)]
        gauge.see(max(abs(a - b) for a, b in zip(forward, backward, strict=True)), "100 steps, backwards")
        gauge.see(max(abs(a - forward[s]) for a, s in zip(fresh, (99, 50, 0), strict=True)), "another instance")
    return gauge


@check("an impossible warm-up is refused", "schedule")
def refused(bench: Bench) -> Gauge:
    """A warm-up that leaves no step at the peak is a ValueError that names the knob."""
    if "warmup_steps" not in bench.entry.knobs:
        raise NotApplicable("it has no knob warmup_steps")
    try:
        bench.cls(100, warmup_steps=100)
    except ValueError as error:
        if "warmup_steps" not in str(error):
            raise Broken(f"refused, but the message does not name warmup_steps: {error}") from error
        gauge = Gauge(note="refused with the knob's name")
        gauge.see(0, "100 steps of 100")
        return gauge
    raise Broken("warmup_steps = 100 of 100 steps was accepted")


def _built(bench, steps):
    """(title, schedule) for several warm-ups and fractions; settings that it refuses by ValueError are left out."""
    warmups = [w for w in sorted({0, 1, steps // 10, steps // 2}) if w < steps]
    warmups = [{"warmup_steps": w} for w in warmups] if "warmup_steps" in bench.entry.knobs else [{}]
    fractions = [knob for knob in bench.entry.knobs if knob.endswith("_fraction")]
    settings = [{}] + [{knob: value} for knob in fractions for value in (0.0, 0.37, 1.0)]
    built = []
    for warmup in warmups:
        for setting in settings:
            knobs = bench.knobs | warmup | setting
            try:
                built.append((f", {knobs}" if knobs else "", functools.partial(bench.entry.cls, **knobs)(steps)))
            except ValueError:
                continue
    if not built and steps >= 10:
        raise Broken(f"it refuses every setting tried for {steps} steps")
    return built
