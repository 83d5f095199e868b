"""Learning-rate schedules: step -> factor for the peak learning rate, for 0 <= step < steps = Experiment.steps.

A linear warm-up means the factor (step + 1) / warmup_steps in the first ``warmup_steps`` steps. ``final_fraction`` is
the factor at the last step. The functions below count the progress p of a phase from 0 to 1."""

import math
from typing import Annotated

from annotated_types import Ge, Interval

from toolkit.registry import register

Steps = Annotated[int, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]
Share = Annotated[float, Interval(gt=0, le=1)]


@register("schedule")
class WarmupCosine:
    """Linear warm-up, then half a cosine down to ``final_fraction`` at the last step (Loshchilov & Hutter 2016,
    arXiv:1608.03983)."""

    def __init__(self, steps: int, warmup_steps: Steps = 2000, final_fraction: Fraction = 0.1):
        _check("WarmupCosine", steps, warmup_steps)
        self.steps, self.warmup_steps, self.final_fraction = steps, warmup_steps, final_fraction

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return _between(self.final_fraction, 1.0, _cosine(_progress(step, self.warmup_steps, self.steps - 1)))


@register("schedule")
class WarmupLinear:
    """Linear warm-up, then a straight line down to ``final_fraction`` at the last step (Devlin et al. 2018,
    arXiv:1810.04805)."""

    def __init__(self, steps: int, warmup_steps: Steps = 2000, final_fraction: Fraction = 0.0):
        _check("WarmupLinear", steps, warmup_steps)
        self.steps, self.warmup_steps, self.final_fraction = steps, warmup_steps, final_fraction

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return _between(self.final_fraction, 1.0, 1 - _progress(step, self.warmup_steps, self.steps - 1))


@register("schedule")
class WarmupStableDecay:
    """Linear warm-up, then the peak, then a straight line down to ``final_fraction`` (Hu et al. 2024,
    arXiv:2404.06395). The line covers the last ``decay_fraction`` of all steps."""

    def __init__(
        self,
        steps: int,
        warmup_steps: Steps = 2000,
        decay_fraction: Share = 0.2,
        final_fraction: Fraction = 0.0,
    ):
        self.decay_start = _decay_start("WarmupStableDecay", steps, warmup_steps, decay_fraction)
        self.steps, self.warmup_steps, self.final_fraction = steps, warmup_steps, final_fraction

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return _between(self.final_fraction, 1.0, 1 - _progress(step, self.decay_start, self.steps - 1))


@register("schedule")
class WarmupStableSqrt:
    """Linear warm-up, then the peak, then 1 - sqrt(p) down to ``final_fraction`` (Hägele et al. 2024,
    arXiv:2405.18392). p goes from 0 to 1 over the last ``decay_fraction`` of all steps: a steep descent at first, a
    flat one at the end."""

    def __init__(
        self,
        steps: int,
        warmup_steps: Steps = 2000,
        decay_fraction: Share = 0.2,
        final_fraction: Fraction = 0.0,
    ):
        self.decay_start = _decay_start("WarmupStableSqrt", steps, warmup_steps, decay_fraction)
        self.steps, self.warmup_steps, self.final_fraction = steps, warmup_steps, final_fraction

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return _between(self.final_fraction, 1.0, 1 - math.sqrt(_progress(step, self.decay_start, self.steps - 1)))


@register("schedule")
class WarmupStableCosine:
    """Linear warm-up, then the peak, then half a cosine down to ``final_fraction`` (Hu et al. 2024, arXiv:2404.06395,
    with another shape). The cosine covers the last ``decay_fraction`` of all steps."""

    def __init__(
        self,
        steps: int,
        warmup_steps: Steps = 2000,
        decay_fraction: Share = 0.2,
        final_fraction: Fraction = 0.0,
    ):
        self.decay_start = _decay_start("WarmupStableCosine", steps, warmup_steps, decay_fraction)
        self.steps, self.warmup_steps, self.final_fraction = steps, warmup_steps, final_fraction

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return _between(self.final_fraction, 1.0, _cosine(_progress(step, self.decay_start, self.steps - 1)))


@register("schedule")
class InverseSqrt:
    """Linear warm-up, then sqrt(warmup_steps / (step + 1)) (Vaswani et al. 2017, arXiv:1706.03762, section 5.3). It
    does not depend on Experiment.steps, so a run can be continued for longer."""

    def __init__(self, steps: int, warmup_steps: Steps = 2000):
        _check("InverseSqrt", steps, warmup_steps)
        self.warmup_steps = max(1, warmup_steps)

    def __call__(self, step: int) -> float:
        return min((step + 1) / self.warmup_steps, math.sqrt(self.warmup_steps / (step + 1)))


@register("schedule")
class OneCycle:
    """Half a cosine up from ``initial_fraction`` to the peak, then half a cosine down to ``final_fraction`` (Smith &
    Topin 2017, arXiv:1708.07120, with straight lines). The rise covers the first ``up_fraction`` of all steps. There is
    no other warm-up."""

    def __init__(
        self,
        steps: int,
        up_fraction: Fraction = 0.3,
        initial_fraction: Fraction = 0.04,
        final_fraction: Fraction = 0.0,
    ):
        self.peak = max(0, min(round(up_fraction * steps) - 1, steps - 2))  # the descent ends at the last step
        self.steps, self.initial_fraction, self.final_fraction = steps, initial_fraction, final_fraction

    def __call__(self, step: int) -> float:
        if step < self.peak:
            return _between(1.0, self.initial_fraction, _cosine(_progress(step, 0, self.peak)))
        return _between(self.final_fraction, 1.0, _cosine(_progress(step, self.peak, self.steps - 1)))


@register("schedule")
class Constant:
    """Linear warm-up, then the peak at every step."""

    def __init__(self, steps: int, warmup_steps: Steps = 0):
        _check("Constant", steps, warmup_steps)
        self.warmup_steps = warmup_steps

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / max(1, self.warmup_steps))


def _progress(step: int, start: int, end: int) -> float:
    """How much of the phase from step ``start`` to ``end`` is over, in [0, 1]. A run of one step stays at 0, the
    peak."""
    if step >= end > 0:
        return 1.0
    return max(0, step - start) / max(1, end - start)


def _cosine(progress: float) -> float:
    """Half a cosine: 1 at progress 0, 0 at progress 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def _between(low: float, high: float, share: float) -> float:
    """``low`` at share 0, ``high`` at share 1, and linear between them."""
    return low + (high - low) * share


def _check(name: str, steps: int, warmup_steps: int) -> None:
    if warmup_steps >= steps:
        raise ValueError(
            f"{name}.warmup_steps = {warmup_steps} leaves no step of Experiment.steps = {steps} at the peak learning "
            f"rate; set {name}.warmup_steps below {steps}"
        )


def _decay_start(name: str, steps: int, warmup_steps: int, decay_fraction: float) -> int:
    """The last step at the peak. Raises ValueError if the decay would start before the warm-up ends."""
    _check(name, steps, warmup_steps)
    decay_steps = min(max(1, round(decay_fraction * steps)), max(1, steps - 1))
    if warmup_steps + decay_steps > max(steps, 2):
        raise ValueError(
            f"{name}.warmup_steps = {warmup_steps} and {name}.decay_fraction = {decay_fraction:g} ({decay_steps} steps)"
            f" overlap in Experiment.steps = {steps}; set {name}.warmup_steps to {steps - decay_steps} or less, or "
            f"{name}.decay_fraction to {math.floor(1e6 * (steps - warmup_steps) / steps) / 1e6:g} or less"
        )
    return max(0, steps - 1 - decay_steps)
