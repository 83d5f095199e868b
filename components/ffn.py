"""Feed-forward networks: x (B,T,C) -> (B,T,C), each position on its own."""

from typing import Annotated

import torch.nn.functional as F
from annotated_types import Gt
from torch import nn

from toolkit.registry import register


@register("ffn")
class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202), gate and up in one matrix. ``hidden=None`` is 8/3
    of the width, the size at which three matrices hold as many parameters as the two of a plain 4C network, rounded
    up to a multiple of 256 (of C where C is smaller): 768 -> 2048."""

    def __init__(self, dim: int, hidden: Annotated[int, Gt(0)] | None = None, bias: bool = False):
        super().__init__()
        multiple = min(256, dim)
        hidden = hidden or -(-8 * dim // (3 * multiple)) * multiple
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.down.residual = True

    def forward(self, x, context):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


@register("ffn")
class GELU(nn.Module):
    """down(gelu(up(x))) with the exact GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415); ``hidden=None`` is 4C."""

    def __init__(self, dim: int, hidden: Annotated[int, Gt(0)] | None = None, bias: bool = False):
        super().__init__()
        hidden = hidden or 4 * dim
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.down.residual = True

    def forward(self, x, context):
        return self.down(F.gelu(self.up(x)))
