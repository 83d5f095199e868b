"""Norms: x (..., C) -> (..., C), each vector of C channels on its own. ``dim`` is C."""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn

from toolkit.registry import register


@register("norm")
class LayerNorm(nn.LayerNorm):
    """gain * (x - mean(x)) / sqrt(var(x) + eps) + bias (Ba et al. 2016, arXiv:1607.06450). Mean and variance are over
    the C channels. ``bias=False`` leaves out the learned bias."""

    def __init__(self, dim: int, eps: Annotated[float, Gt(0)] = 1e-5, bias: bool = True):
        super().__init__(dim, eps=eps, bias=bias)


@register("norm")
class RMSNorm(nn.RMSNorm):
    """gain * x / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019, arXiv:1910.07467). The mean is over the C channels.
    ``gain=False`` leaves out the learned gain. ``gain_minus_one=True`` learns gain - 1 instead, as in Gemma, so that
    weight decay pulls the gain to 1."""

    def __init__(self, dim: int, eps: Annotated[float, Gt(0)] = 1e-6, gain: bool = True, gain_minus_one: bool = False):
        super().__init__(dim, eps=eps, elementwise_affine=gain)
        if gain_minus_one and not gain:
            raise ValueError("RMSNorm.gain_minus_one = True needs RMSNorm.gain = True")
        self.gain_minus_one = gain_minus_one
        if gain_minus_one:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        if self.gain_minus_one:
            return F.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)
        return super().forward(x)


@register("norm")
class ScaleNorm(nn.Module):
    """g * x / max(||x||, eps), with one learned number g that starts at sqrt(C) (Nguyen & Salazar 2019,
    arXiv:1910.05895). ||x|| is the length of the vector of C channels, computed in float32."""

    def __init__(self, dim: int, eps: Annotated[float, Gt(0)] = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((1,), dim**0.5))

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        return (self.weight * F.normalize(x.float(), dim=-1, eps=self.eps)).to(x.dtype)


@register("norm")
class DynamicTanh(nn.Module):
    """gain * tanh(alpha * x) + bias: bounds each channel instead of normalising the vector (Zhu et al. 2025,
    arXiv:2503.10622). All three are learned: one number alpha, which starts at the knob ``alpha``, and a gain and a
    bias per channel, which start at 1 and 0."""

    def __init__(self, dim: int, alpha: Annotated[float, Gt(0)] = 0.5):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        return self.weight * torch.tanh(self.alpha * x) + self.bias


@register("norm")
class NoNorm(nn.Module):
    """Returns x unchanged, to measure what a norm contributes."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        return x
