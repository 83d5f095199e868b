"""Checks of an init part, which draws the initial weights."""

from __future__ import annotations

import torch
from torch import nn

from toolkit.conformance.bench import VOCAB, Bench
from toolkit.conformance.lines import Broken, Gauge, check


@check("fills every weight from the generator", "init", look_at="random numbers that come from anywhere else")
def fills(bench: Bench) -> Gauge:
    """Weights and biases are overwritten with finite numbers, drawn only from the given generator."""
    gauge, init = Gauge(0.0, "difference between two draws from one seed"), bench.cls(2)
    cases = {
        "blocks.0.a.weight": (48, 32),
        "blocks.1.b.weight": (32, 48),
        "blocks.1.b.bias": (32,),
        "e.weight": (64, 32),
    }
    for name, shape in cases.items():
        drawn = []
        for _ in range(2):
            parameter = nn.Parameter(torch.full(shape, 9.0))
            vars(parameter).update(residual=name.startswith("blocks.1"), merged=None, tied=False)
            before = torch.get_rng_state()
            with torch.no_grad():
                init(name, parameter, torch.Generator().manual_seed(3))
            if not torch.equal(before, torch.get_rng_state()):
                raise Broken(
                    f"{name} was drawn from torch's global generator; it must be drawn from the generator that the "
                    "init gets: parameter.normal_(0, std, generator=generator)"
                )
            if (parameter == 9.0).any() or not parameter.isfinite().all():
                raise Broken(
                    f"{name} of shape {shape} still has old values, or values that are not finite; the init must fill "
                    "every weight and bias in place"
                )
            drawn.append(parameter.detach())
        gauge.record((drawn[0] - drawn[1]).abs().max(), f"{name.split('.')[-1]} {tuple(shape)}")
    return gauge


@check(
    "vocabulary padding changes no weights",
    "init",
    look_at="draws whose size or scale depends on the number of rows",
)
def padding(bench: Bench) -> Gauge:
    """The rows of real tokens get the same initial values, however many rows pad the table."""
    gauge = Gauge(0.0, "largest difference")
    for tied in (True, False):
        if tied and bench.untied:
            continue
        unpadded, padded = (bench.model(pad_vocab_to=to, tie_embeddings=tied).state_dict() for to in (1, 64))
        for name, value in unpadded.items():
            gauge.record((value - padded[name][: len(value)]).abs().max(), f"V={VOCAB}, {'tied' if tied else 'untied'}")
    return gauge
