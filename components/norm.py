"""Norms: (..., C) -> (..., C)."""

from typing import Annotated

import torch
import torch.nn.functional as F
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


@register("norm")
class ScaleNorm(nn.Module):
    """g * x / max(||x||, eps) over the last axis, with one learned g, sqrt(C) at the start (Nguyen & Salazar 2019,
    arXiv:1910.05895). The length is taken in float32."""

    def __init__(self, dim: int, eps: Annotated[float, Gt(0)] = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((1,), dim**0.5))

    def forward(self, x):
        return (self.weight * F.normalize(x.float(), dim=-1, eps=self.eps)).to(x.dtype)


@register("norm")
class DynamicTanh(nn.Module):
    """gain * tanh(alpha * x) + bias, which bounds instead of normalising (Zhu et al. 2025, arXiv:2503.10622). One alpha
    is learned, from ``alpha``; gain and bias per channel, from 1 and 0."""

    def __init__(self, dim: int, alpha: Annotated[float, Gt(0)] = 0.5):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return self.weight * torch.tanh(self.alpha * x) + self.bias


@register("norm")
class NoNorm(nn.Module):
    """x as it is: for seeing what a norm is worth."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x):
        return x
