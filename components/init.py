"""Initialisation: fills the weights and biases of every Linear and Embedding."""

from typing import Annotated

import torch
from annotated_types import Gt

from toolkit.registry import register


@register("init")
class GPT2Init:
    """N(0, std^2) for matrices, 0 for biases; projections back into the residual stream divided by sqrt(2 * n_layer),
    the number of such additions (Radford et al. 2019, section 2.3)."""

    def __init__(self, n_layer: int, std: Annotated[float, Gt(0)] = 0.02):
        self.std, self.residual_std = std, std / (2 * n_layer) ** 0.5

    def __call__(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        if parameter.ndim < 2:
            parameter.zero_()
        else:
            parameter.normal_(0.0, self.residual_std if parameter.residual else self.std, generator=generator)
