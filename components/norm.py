"""Norms: (..., C) -> (..., C)."""

from typing import Annotated

from annotated_types import Gt
from torch import nn

from toolkit.registry import register


@register("norm")
class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * gain + bias over the last axis (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, dim: int, eps: Annotated[float, Gt(0)] = 1e-5, bias: bool = True):
        super().__init__(dim, eps=eps, bias=bias)


@register("norm")
class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * gain over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467). ``gain=False``
    leaves out the learned gain."""

    def __init__(self, dim: int, eps: Annotated[float, Gt(0)] = 1e-6, gain: bool = True):
        super().__init__(dim, eps=eps, elementwise_affine=gain)
