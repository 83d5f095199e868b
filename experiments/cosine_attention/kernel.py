"""Causal cosine attention, an example of an attention kernel in a file of your own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.context import Mask
from toolkit.registry import register


@register("attention")
class CosineAttention(nn.Module):
    """softmax(scale * cos(q, k)) v, with one learned scale per head (Henry et al. 2020, arXiv:2010.04245; Liu et al.
    2022, arXiv:2111.09883). The lengths of q and k have no influence. ``scale`` is the start of every scale."""

    def __init__(self, n_head: int, head_dim: int, scale: float = 10.0):  # scale is a knob; the toolkit passes the rest
        super().__init__()
        self.scale = nn.Parameter(torch.full((n_head,), scale))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:  # (B,T,H,D)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = self.scale[:, None, None] * torch.einsum("bthd,bshd->bhts", q, k)
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, v)
