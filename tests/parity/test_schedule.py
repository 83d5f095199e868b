"""Learning-rate schedules against references that are not ours."""

import math

import pytest
import torch
from torch import nn
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from components.schedule import (
    Constant,
    InverseSqrt,
    OneCycle,
    WarmupCosine,
    WarmupLinear,
    WarmupStableCosine,
    WarmupStableDecay,
    WarmupStableSqrt,
)


def rates(make, count):
    """What a torch scheduler sets the rate to, step by step, at a peak of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, out = make(optimizer), []
    for _ in range(count):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


def ours(schedule, count=100):
    return [schedule(step) for step in range(count)]


def test_warmup_cosine_equals_transformers(parity):
    """Ours takes its first step at 1/warmup, not 0, and ends at the last step, not after it: both shown here."""
    theirs = rates(lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, 20, 99, min_lr_rate=0.1), 100)
    values = ours(WarmupCosine(100, warmup_steps=20, final_fraction=0.1))
    parity("WarmupCosine", "transformers, the warm-up", values[:19], theirs[1:20], 1e-12)
    parity("WarmupCosine", "transformers, from the peak on", values[20:], theirs[20:], 1e-12)
    assert values[19] == 1.0


def test_warmup_linear_equals_transformers(parity):
    theirs = rates(lambda o: get_linear_schedule_with_warmup(o, 20, 99), 100)
    values = ours(WarmupLinear(100, warmup_steps=20))
    parity("WarmupLinear", "transformers, the warm-up", values[:19], theirs[1:20], 1e-12)
    parity("WarmupLinear", "transformers, from the peak on", values[20:], theirs[20:], 1e-12)
    values = ours(WarmupLinear(100, warmup_steps=20, final_fraction=0.3))
    line = [1 - 0.7 * (step - 20) / 79 for step in range(20, 100)]
    parity("WarmupLinear", "the line to final_fraction", values[20:], line, 1e-12)


SHAPES = [
    (WarmupStableDecay, "linear", lambda progress: 1 - progress),
    (WarmupStableSqrt, "1-sqrt", lambda progress: 1 - math.sqrt(progress)),
    (WarmupStableCosine, "cosine", lambda progress: (1 + math.cos(math.pi * progress)) / 2),
]


@pytest.mark.parametrize("cls, shape, formula", SHAPES)
def test_warmup_stable_and_a_decay_equal_transformers_and_the_formula(cls, shape, formula, parity):
    """After the warm-up: theirs ramps up from the minimum, ours from zero. Theirs ends after the last of 99 steps."""
    kind = dict(warmup_type="linear", decay_type=shape, num_training_steps=99, min_lr_ratio=0.2)
    theirs = rates(lambda o: get_wsd_schedule(o, num_warmup_steps=20, num_decay_steps=30, **kind), 100)
    values = ours(cls(100, warmup_steps=20, decay_fraction=0.3, final_fraction=0.2))
    parity(cls.__name__, "a ramp", values[:20], [(step + 1) / 20 for step in range(20)], 1e-12)
    parity(cls.__name__, "transformers, from the peak on", values[20:], theirs[20:], 1e-12)
    written = [1.0] * 49 + [0.2 + 0.8 * formula(n / 30) for n in range(31)]
    parity(cls.__name__, "the formula", values[20:], written, 1e-12)


def test_inverse_sqrt_equals_transformers_and_vaswani(parity):
    theirs = rates(lambda o: get_inverse_sqrt_schedule(o, 20), 101)
    values = ours(InverseSqrt(100, warmup_steps=20))
    parity("InverseSqrt", "transformers, a step earlier", values, theirs[1:], 1e-12)
    noam = [min(step**-0.5, step * 20**-1.5) for step in range(1, 101)]
    parity("InverseSqrt", "Vaswani et al., scaled to a peak of 1", values, [x / max(noam) for x in noam], 1e-12)


def test_one_cycle_equals_torch(parity):
    cycle = dict(max_lr=1.0, total_steps=100, pct_start=0.3, div_factor=10, final_div_factor=5, cycle_momentum=False)
    theirs = rates(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, **cycle), 99)
    values = ours(OneCycle(100, up_fraction=0.3, initial_fraction=0.1, final_fraction=0.02))
    parity("OneCycle", "torch.optim.lr_scheduler.OneCycleLR", values[:99], theirs, 1e-12)
    assert values[29] == 1.0 and values[99] == 0.02


def test_constant_equals_transformers(parity):
    theirs = rates(lambda o: get_constant_schedule_with_warmup(o, 20), 101)
    parity("Constant", "transformers, a step earlier", ours(Constant(100, warmup_steps=20)), theirs[1:], 1e-12)
    assert [Constant(6, warmup_steps=4)(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
