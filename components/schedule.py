"""Learning-rate schedules: step -> multiple of the peak learning rate."""

import math
from typing import Annotated

from annotated_types import Ge, Interval

from toolkit.registry import register

Fraction = Annotated[float, Interval(ge=0, le=1)]


@register("schedule")
class WarmupCosine:
    """Linear from 0 over ``warmup_steps``, then half a cosine down to ``final_fraction`` of the peak at the last step
    (Loshchilov & Hutter 2016, arXiv:1608.03983)."""

    def __init__(self, steps: int, warmup_steps: Annotated[int, Ge(0)] = 2000, final_fraction: Fraction = 0.1):
        _check("WarmupCosine", steps, warmup_steps)
        self.steps, self.warmup_steps, self.final_fraction = steps, warmup_steps, final_fraction

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@register("schedule")
class WarmupStableDecay:
    """Linear warm-up, the peak, then linear decay to ``final_fraction`` over the last ``decay_fraction`` of all steps
    (Hu et al. 2024, arXiv:2404.06395)."""

    def __init__(
        self,
        steps: int,
        warmup_steps: Annotated[int, Ge(0)] = 2000,
        decay_fraction: Fraction = 0.2,
        final_fraction: Fraction = 0.0,
    ):
        _check("WarmupStableDecay", steps, warmup_steps)
        self.warmup_steps, self.final_fraction = warmup_steps, final_fraction
        self.steps, self.decay_steps = steps, max(1, round(decay_fraction * steps))

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        left = min(1.0, (self.steps - step) / self.decay_steps)
        return self.final_fraction + (1 - self.final_fraction) * left


@register("schedule")
class Constant:
    """The peak at every step, after a linear warm-up."""

    def __init__(self, steps: int, warmup_steps: Annotated[int, Ge(0)] = 0):
        _check("Constant", steps, warmup_steps)
        self.warmup_steps = warmup_steps

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / max(1, self.warmup_steps))


def _check(name, steps, warmup_steps):
    if warmup_steps >= steps:
        raise ValueError(
            f"{name}.warmup_steps = {warmup_steps} leaves no step of Experiment.steps = {steps} at the peak learning "
            f"rate; set {name}.warmup_steps below {steps}"
        )
