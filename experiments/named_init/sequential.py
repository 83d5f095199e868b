"""Initial weights as most code draws them: one generator for all parameters in turn. For comparison only."""

import torch
from torch import Generator

from components.init import Weight
from toolkit.registry import register


@register("init")
class SequentialInit:
    """GPT2Init, but with all parameters drawn in order from one generator. A part of another shape shifts every draw
    after its own, so two arms of a comparison share no initial values from there on."""

    def __init__(self, n_layer: int, std: float = 0.02):
        self.std, self.residual_std = std, std / (2 * n_layer) ** 0.5
        self.stream = torch.Generator().manual_seed(torch.initial_seed())

    def __call__(self, name: str, parameter: Weight, generator: Generator) -> None:  # does not use ``generator``
        if parameter.ndim < 2:
            parameter.zero_()
        else:
            parameter.normal_(0.0, self.residual_std if parameter.residual else self.std, generator=self.stream)
