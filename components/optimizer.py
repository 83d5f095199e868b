"""Optimizers: torch.optim classes over the toolkit's parameter groups."""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Interval
from torch import nn

from toolkit.groups import parameter_groups
from toolkit.registry import register

Beta = Annotated[float, Interval(ge=0, lt=1)]


@register("optimizer")
class AdamW(torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017, arXiv:1711.05101), fused where PyTorch has it.
    ``no_decay`` are glob patterns of parameter names that do not decay, beyond gains and biases."""

    def __init__(
        self,
        model: nn.Module,
        lr: Annotated[float, Gt(0)] = 3e-4,
        betas: tuple[Beta, Beta] = (0.9, 0.95),
        eps: Annotated[float, Gt(0)] = 1e-8,
        weight_decay: Annotated[float, Ge(0)] = 0.1,
        no_decay: Sequence[str] = (),
    ):
        groups = parameter_groups(model, lr, weight_decay, no_decay)
        devices = {p.device.type for g in groups for p in g["params"]}
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=devices <= {"cuda", "cpu"})


@register("optimizer")
class SGD(torch.optim.SGD):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013); weight decay is coupled, as in torch."""

    def __init__(
        self,
        model: nn.Module,
        lr: Annotated[float, Gt(0)] = 0.1,
        momentum: Beta = 0.9,
        nesterov: bool = False,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        no_decay: Sequence[str] = (),
    ):
        groups = parameter_groups(model, lr, weight_decay, no_decay)
        super().__init__(groups, lr=lr, momentum=momentum, nesterov=nesterov)
