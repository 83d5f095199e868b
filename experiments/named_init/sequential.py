"""Initial weights as most code draws them: one generator, one parameter after the other. For comparison only."""

import torch

from toolkit.registry import register


@register("init")
class SequentialInit:
    """N(0, std^2) drawn in order from a single stream, residual projections divided by sqrt(2 * n_layer): GPT2Init
    without its names. A part of another shape shifts every draw after its own, so that two arms of a comparison share
    no initial value from there on."""

    def __init__(self, n_layer, std: float = 0.02):
        self.std, self.residual_std = std, std / (2 * n_layer) ** 0.5
        self.stream = torch.Generator().manual_seed(torch.initial_seed())

    def __call__(self, name, parameter, generator):  # the generator that belongs to the name is left aside
        if parameter.ndim < 2:
            parameter.zero_()
        else:
            parameter.normal_(0.0, self.residual_std if parameter.residual else self.std, generator=self.stream)
