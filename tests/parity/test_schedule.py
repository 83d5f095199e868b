"""Learning-rate schedules against references that are not ours."""

import torch
from torch import nn
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from components.schedule import Constant, WarmupCosine, WarmupStableDecay
from parity.reference import relative_error


def rates(make, count):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, out = make(optimizer), []
    for _ in range(count):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


def test_warmup_cosine_equals_transformers():
    """Ours takes its first step at 1/warmup, not 0, and ends at the last step, not after it: both shown here."""
    theirs = rates(lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, 20, 99, min_lr_rate=0.1), 100)
    ours = [WarmupCosine(100, warmup_steps=20, final_fraction=0.1)(step) for step in range(100)]
    assert relative_error(ours[:19], theirs[1:20]) < 1e-12 and ours[19] == 1.0
    assert relative_error(ours[20:], theirs[20:]) < 1e-12


def test_warmup_stable_decay_equals_transformers():
    """After the warm-up: theirs ramps up from the minimum, ours from zero."""
    linear = dict(warmup_type="linear", decay_type="linear", num_training_steps=100, min_lr_ratio=0.2)
    theirs = rates(lambda o: get_wsd_schedule(o, num_warmup_steps=20, num_decay_steps=30, **linear), 100)
    schedule = WarmupStableDecay(100, warmup_steps=20, decay_fraction=0.3, final_fraction=0.2)
    ours = [schedule(step) for step in range(100)]
    assert relative_error(ours[:20], [(step + 1) / 20 for step in range(20)]) < 1e-12
    assert relative_error(ours[20:], theirs[20:]) < 1e-12


def test_constant_is_a_ramp_and_then_one():
    assert [Constant(6, warmup_steps=4)(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
