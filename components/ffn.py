"""Feed-forward networks: x (B,T,C) -> (B,T,C), each position on its own."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import nn

from toolkit.linear import Linear, Merged
from toolkit.registry import register

Width = Annotated[int, Gt(0)] | None


@register("ffn")
class ReLU(nn.Module):
    """down(relu(up(x))), the network of the first transformer (Vaswani et al. 2017, arXiv:1706.03762, eq. 2);
    ``hidden=None`` is 4C."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.up, self.down = _plain(dim, hidden, bias)

    def forward(self, x, context):
        return self.down(F.relu(self.up(x)))


@register("ffn")
class GELU(nn.Module):
    """down(gelu(up(x))) with the exact GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415); ``hidden=None`` is 4C."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.up, self.down = _plain(dim, hidden, bias)

    def forward(self, x, context):
        return self.down(F.gelu(self.up(x)))


@register("ffn")
class SiLU(nn.Module):
    """down(silu(up(x))), silu(x) = x sigmoid(x) (Elfwing et al. 2017, arXiv:1702.03118; Swish: Ramachandran et al.
    2017, arXiv:1710.05941); ``hidden=None`` is 4C."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.up, self.down = _plain(dim, hidden, bias)

    def forward(self, x, context):
        return self.down(F.silu(self.up(x)))


@register("ffn")
class SquaredReLU(nn.Module):
    """down(relu(up(x))^2), as in Primer (So et al. 2021, arXiv:2109.08668); ``hidden=None`` is 4C."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.up, self.down = _plain(dim, hidden, bias)

    def forward(self, x, context):
        return self.down(F.relu(self.up(x)).square())


@register("ffn")
class GLU(nn.Module):
    """down(sigmoid(gate(x)) * up(x)) (Dauphin et al. 2016, arXiv:1612.08083; Shazeer 2020, arXiv:2002.05202), gate and
    up in one matrix. ``hidden=None`` is the multiple of 8 nearest to 8C/3: as many parameters as the plain 4C network,
    to within 1/C of them."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.gate_up, self.down = _gated(dim, hidden, bias)

    def forward(self, x, context):
        gate, up = self.gate_up.each(x)
        return self.down(gate.sigmoid() * up)


@register("ffn")
class Bilinear(nn.Module):
    """down(gate(x) * up(x)), no other nonlinearity (Shazeer 2020, arXiv:2002.05202), gate and up in one matrix.
    ``hidden=None`` is the multiple of 8 nearest to 8C/3: as many parameters as the plain 4C network, to within 1/C."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.gate_up, self.down = _gated(dim, hidden, bias)

    def forward(self, x, context):
        gate, up = self.gate_up.each(x)
        return self.down(gate * up)


@register("ffn")
class ReGLU(nn.Module):
    """down(relu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202), gate and up in one matrix. ``hidden=None`` is the
    multiple of 8 nearest to 8C/3: as many parameters as the plain 4C network, to within 1/C of them."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.gate_up, self.down = _gated(dim, hidden, bias)

    def forward(self, x, context):
        gate, up = self.gate_up.each(x)
        return self.down(F.relu(gate) * up)


@register("ffn")
class GEGLU(nn.Module):
    """down(gelu(gate(x)) * up(x)) with the exact GELU (Shazeer 2020, arXiv:2002.05202), gate and up in one matrix.
    ``hidden=None`` is the multiple of 8 nearest to 8C/3: as many parameters as the plain 4C network, to within 1/C."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.gate_up, self.down = _gated(dim, hidden, bias)

    def forward(self, x, context):
        gate, up = self.gate_up.each(x)
        return self.down(F.gelu(gate) * up)


@register("ffn")
class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202), gate and up in one matrix. ``hidden=None`` is the
    multiple of 8 nearest to 8C/3, where three matrices hold as many parameters as the two of a plain 4C network, to
    within 1/C of them: 768 -> 2048."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.gate_up, self.down = _gated(dim, hidden, bias)

    def forward(self, x, context):
        gate, up = self.gate_up.each(x)
        return self.down(F.silu(gate) * up)


@register("ffn")
class MixtureOfExperts(nn.Module):
    """Each token goes through the ``top_k`` of several SwiGLU networks that a softmax router rates highest, weighted by
    its probabilities, which are renormalised (Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024,
    arXiv:2401.04088). ``hidden=None``: the experts that a token goes through hold as many parameters as the plain 4C
    network (8C / 3 top_k, the nearest multiple of 8); all of them hold experts / top_k times that.

    balance    weight of the loss experts * sum_e f_e P_e (Fedus et al. 2021, arXiv:2101.03961, eq. 4): f_e the share of
               the choices that fall on expert e, P_e its mean probability; 1 when even. Layers add up
    capacity   1.25: in training an expert takes 1.25 times its even share of the choices, and the rest count as zero,
               the latest positions first, so that no token can push out an earlier one of its sequence; all the same
               they are computed. None drops nothing, nor does evaluation, ever

    Choices are computed in bins of one expert each, 1.5 times as many rows as there are choices: shapes are fixed, no
    choice is lost, and the FLOPs are counted as they are spent. Metrics are those of the worst layer."""

    def __init__(
        self,
        dim: int,
        hidden: Width = None,
        experts: Annotated[int, Ge(2)] = 8,
        top_k: Annotated[int, Gt(0)] = 2,
        balance: Annotated[float, Ge(0)] = 0.01,
        capacity: Annotated[float, Gt(0)] | None = None,
    ):
        super().__init__()
        if top_k > experts:
            raise ValueError(
                f"MixtureOfExperts.top_k = {top_k} is more than MixtureOfExperts.experts = {experts}; lower it"
            )
        self.top_k, self.balance, self.capacity = top_k, balance, capacity
        self.router = nn.Linear(dim, experts, bias=False)
        hidden = hidden or _eights(dim / top_k)
        self.experts = nn.ModuleList(SwiGLU(dim, hidden) for _ in range(experts))
        self.idle_parameters = (experts - top_k) * 3 * dim * hidden  # what one token does not go through

    def forward(self, x, context):
        tokens = x.transpose(0, 1).flatten(0, 1)  # (N, C), in order of position
        device = "cpu" if x.is_meta else x.device.type  # autocast does not know meta
        with torch.autocast(device, enabled=False):  # who is chosen is decided in float32
            probabilities = F.linear(tokens.float(), self.router.weight.float()).softmax(-1)  # (N, E)
        weights, chosen = probabilities.topk(self.top_k)  # (N, K)
        weights = weights / weights.sum(-1, keepdim=True)
        hits = (chosen.flatten()[:, None] == torch.arange(len(self.experts), device=x.device)).long()  # (NK, E)
        rank = (hits.cumsum(0) * hits).sum(1) - 1  # (NK,), the place among the choices of the same expert
        share = hits.sum(0) / hits.shape[0]
        dropped = torch.zeros_like(rank, dtype=torch.bool)
        if self.capacity is not None and self.training:
            dropped = rank >= math.ceil(self.capacity * hits.shape[0] / hits.shape[1])
            weights = weights.masked_fill(dropped.view_as(weights), 0.0)
        out = _binned(tokens, self.experts, chosen.flatten(), rank, hits.sum(0)).view(*weights.shape, -1)  # (N, K, C)
        out = (weights.to(out.dtype)[..., None] * out).sum(1)
        loss = self.balance * hits.shape[1] * (share * probabilities.mean(0)).sum()
        context.losses["moe/balance"] = context.losses.get("moe/balance", 0.0) + loss
        for name, value in (("moe/dropped_fraction", dropped.float().mean()), ("moe/max_load", share.max())):
            context.metrics[name] = torch.maximum(value, context.metrics.get(name, value))
        return out.view(x.shape[1], x.shape[0], -1).transpose(0, 1)


def _plain(dim, hidden, bias):
    """up and down; 4C wide unless told otherwise."""
    hidden = hidden or 4 * dim
    up, down = Linear(dim, hidden, bias=bias), Linear(hidden, dim, bias=bias)
    down.residual = True
    return up, down


def _gated(dim, hidden, bias):
    """gate and up in one matrix, and down."""
    hidden = hidden or _eights(dim)
    gate_up, down = Merged(dim, {"gate": hidden, "up": hidden}, bias), Linear(hidden, dim, bias=bias)
    down.residual = True
    return gate_up, down


def _eights(dim):
    """The multiple of 8 nearest to 8/3 of ``dim``: three matrices of it weigh as much as two of 4 times ``dim``."""
    return 8 * max(1, round(dim / 3))


def _binned(tokens, experts, chosen, rank, counts):
    """tokens (N, C), and for each choice its expert and its rank there (NK,) -> what the experts say (NK, C).

    A bin holds up to ``size`` choices of one expert. An expert leaves at most one bin partly empty, so that
    NK // size + E bins hold any choice there can be; with half an even share as the size that is 1.5 times the rows."""
    choices, device = chosen.shape[0], chosen.device
    size = -(-choices // (2 * len(experts)))
    bins = min(choices, choices // size + len(experts))
    ends = ((counts + size - 1) // size).cumsum(0)  # (E,), the first bin after those of an expert
    first = (ends - (counts + size - 1) // size).gather(0, chosen)
    row = first * size + rank  # (NK,), no two alike
    owner = (torch.arange(bins, device=device)[:, None] >= ends).sum(1).clamp(max=len(experts) - 1)  # (bins,)
    spread = tokens.repeat_interleave(choices // tokens.shape[0], dim=0)  # (NK, C)
    x = tokens.new_zeros(bins * size, tokens.shape[1]).index_copy(0, row, spread).view(bins, size, -1)
    gate_up, down = (torch.stack([getattr(e, name).weight for e in experts])[owner] for name in ("gate_up", "down"))
    gate, up = (x @ gate_up.transpose(1, 2)).chunk(2, dim=-1)  # (bins, size, hidden)
    return ((F.silu(gate) * up) @ down.transpose(1, 2)).flatten(0, 1)[row]
