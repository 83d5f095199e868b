"""Feed-forward networks (ffn): x (B,T,C) -> (B,T,C), each position on its own.

The plain ones have two matrices, up (C -> hidden) and down (hidden -> C). The gated ones have a third one, gate (C ->
hidden), which is stored together with up as one matrix. By default hidden is 4C in the plain ones and 8C/3, rounded to
a multiple of 8, in the gated ones: then all have equally many parameters, to within a share of 1/C."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from toolkit.context import Context
from toolkit.linear import Linear, Merged
from toolkit.registry import register

Width = Annotated[int, Gt(0)] | None  # of the hidden layer; None: the default for that kind of network


@register("ffn")
class ReLU(nn.Module):
    """down(relu(up(x))), as in the first transformer (Vaswani et al. 2017, arXiv:1706.03762, eq. 2). ``hidden=None``
    means 4C."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.up, self.down = _plain(dim, hidden, bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        return self.down(F.relu(self.up(x)))


@register("ffn")
class GELU(nn.Module):
    """down(gelu(up(x))) with the exact GELU, gelu(x) = x * Phi(x) (Hendrycks & Gimpel 2016, arXiv:1606.08415). Phi is
    the distribution function of N(0, 1). ``hidden=None`` means 4C. ``tanh=True`` computes Phi approximately, with a
    tanh, as GPT-2 does."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False, tanh: bool = False):
        super().__init__()
        self.up, self.down = _plain(dim, hidden, bias)
        self.approximate = "tanh" if tanh else "none"

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


@register("ffn")
class SiLU(nn.Module):
    """down(silu(up(x))) with silu(x) = x * sigmoid(x) (Elfwing et al. 2017, arXiv:1702.03118; as Swish: Ramachandran et
    al. 2017, arXiv:1710.05941). ``hidden=None`` means 4C."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.up, self.down = _plain(dim, hidden, bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        return self.down(F.silu(self.up(x)))


@register("ffn")
class SquaredReLU(nn.Module):
    """down(relu(up(x))^2), as in Primer (So et al. 2021, arXiv:2109.08668). ``hidden=None`` means 4C."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.up, self.down = _plain(dim, hidden, bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        return self.down(F.relu(self.up(x)).square())


@register("ffn")
class GLU(nn.Module):
    """down(sigmoid(gate(x)) * up(x)) (Dauphin et al. 2016, arXiv:1612.08083; Shazeer 2020, arXiv:2002.05202).
    ``hidden=None`` means 8C/3, rounded to a multiple of 8, which gives as many parameters as the plain network with
    4C."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.gate_up, self.down = _gated(dim, hidden, bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        gate, up = self.gate_up.each(x)
        return self.down(gate.sigmoid() * up)


@register("ffn")
class Bilinear(nn.Module):
    """down(gate(x) * up(x)), a gated network without an activation function (Shazeer 2020, arXiv:2002.05202).
    ``hidden=None`` means 8C/3, rounded to a multiple of 8, which gives as many parameters as the plain network with
    4C."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.gate_up, self.down = _gated(dim, hidden, bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        gate, up = self.gate_up.each(x)
        return self.down(gate * up)


@register("ffn")
class ReGLU(nn.Module):
    """down(relu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202). ``hidden=None`` means
    8C/3, rounded to a multiple of 8, which gives as many parameters as the plain network with 4C."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.gate_up, self.down = _gated(dim, hidden, bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        gate, up = self.gate_up.each(x)
        return self.down(F.relu(gate) * up)


@register("ffn")
class GEGLU(nn.Module):
    """down(gelu(gate(x)) * up(x)) with the exact GELU (Shazeer 2020, arXiv:2002.05202). ``hidden=None`` means 8C/3,
    rounded to a multiple of 8, which gives as many parameters as the plain network with 4C. ``tanh=True`` is the
    approximate GELU with a tanh, as in Gemma."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False, tanh: bool = False):
        super().__init__()
        self.gate_up, self.down = _gated(dim, hidden, bias)
        self.approximate = "tanh" if tanh else "none"

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        gate, up = self.gate_up.each(x)
        return self.down(F.gelu(gate, approximate=self.approximate) * up)


@register("ffn")
class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) with silu(x) = x * sigmoid(x), as in Llama (Shazeer 2020, arXiv:2002.05202).
    ``hidden=None`` means 8C/3, rounded to a multiple of 8, which gives as many parameters as the plain network with 4C:
    2048 for C = 768."""

    def __init__(self, dim: int, hidden: Width = None, bias: bool = False):
        super().__init__()
        self.gate_up, self.down = _gated(dim, hidden, bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        gate, up = self.gate_up.each(x)
        return self.down(F.silu(gate) * up)


@register("ffn")
class MixtureOfExperts(nn.Module):
    """Several SwiGLU networks, of which each token uses the ``top_k`` that a router chooses for it (Shazeer et al.
    2017, arXiv:1701.06538; Jiang et al. 2024, arXiv:2401.04088). With p = softmax(W x), one probability per expert,

        y = sum_e (p_e / sum_j p_j) expert_e(x),    e and j over the top_k experts with the largest p.

    hidden     width of each expert; None: 8C / (3 top_k), rounded to a multiple of 8, so that the experts of one token
               have as many parameters as the plain network with 4C; all experts have experts / top_k times as many
    experts    E, the number of experts
    top_k      K, the number of experts per token
    balance    weight of the load-balancing loss E * sum_e f_e P_e, which is 1 if the load is even (Fedus et al. 2021,
               arXiv:2101.03961, eq. 4): f_e is the share of choices that expert e gets, P_e the mean of p_e over
               tokens. The losses of all layers are added up
    capacity   in training, each expert accepts at most this multiple of its even share of the choices, for example
               1.25; the choices beyond it are computed, but count as 0. Those of the latest positions are dropped
               first, so that no token can displace an earlier one of its sequence. Evaluation drops nothing. None:
               never drop

    The metrics moe/dropped_fraction and moe/max_load are those of the worst layer."""

    def __init__(
        self,
        dim: int,
        hidden: Width = None,
        experts: Annotated[int, Ge(2), Le(10_000)] = 8,
        top_k: Annotated[int, Gt(0)] = 2,
        balance: Annotated[float, Ge(0)] = 0.01,
        capacity: Annotated[float, Gt(0)] | None = None,
    ):
        super().__init__()
        if top_k > experts:
            raise ValueError(
                f"MixtureOfExperts.top_k = {top_k} is larger than MixtureOfExperts.experts = {experts}; lower it"
            )
        self.top_k, self.balance, self.capacity = top_k, balance, capacity
        self.router = nn.Linear(dim, experts, bias=False)
        hidden = hidden or _eight_thirds(dim / top_k)
        self.experts = nn.ModuleList(SwiGLU(dim, hidden) for _ in range(experts))
        self.idle_parameters = (experts - top_k) * 3 * dim * hidden  # parameters that a token does not use

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        tokens = x.transpose(0, 1).flatten(0, 1)  # (N,C), in order of position
        device = "cpu" if x.is_meta else x.device.type  # autocast does not accept "meta"
        with torch.autocast(device, enabled=False):  # the router works in float32
            probabilities = F.linear(tokens.float(), self.router.weight.float()).softmax(-1)  # (N,E)
        weights, chosen = probabilities.topk(self.top_k)  # (N,K)
        weights = weights / weights.sum(-1, keepdim=True)
        one_hot = (chosen.flatten()[:, None] == torch.arange(len(self.experts), device=x.device)).long()  # (NK,E)
        rank = (one_hot.cumsum(0) * one_hot).sum(1) - 1  # (NK,), how many earlier choices are for the same expert
        load = one_hot.sum(0) / one_hot.shape[0]  # (E,), the share of choices of each expert
        dropped = torch.zeros_like(rank, dtype=torch.bool)
        if self.capacity is not None and self.training:
            dropped = rank >= math.ceil(self.capacity * one_hot.shape[0] / one_hot.shape[1])
            weights = weights.masked_fill(dropped.view_as(weights), 0.0)
        out = _apply_experts(tokens, self.experts, chosen.flatten(), rank, one_hot.sum(0)).view(*weights.shape, -1)
        out = (weights.to(out.dtype)[..., None] * out).sum(1)  # (N,K,C) -> (N,C)
        loss = self.balance * one_hot.shape[1] * (load * probabilities.mean(0)).sum()
        context.losses["moe/balance"] = context.losses.get("moe/balance", 0.0) + loss
        for name, value in (("moe/dropped_fraction", dropped.float().mean()), ("moe/max_load", load.max())):
            context.metrics[name] = torch.maximum(value, context.metrics.get(name, value))
        return out.view(x.shape[1], x.shape[0], -1).transpose(0, 1)


def _plain(dim: int, hidden: int | None, bias: bool) -> tuple[Linear, Linear]:
    """Build up and down, 4C wide by default."""
    hidden = hidden or 4 * dim
    up, down = Linear(dim, hidden, bias=bias), Linear(hidden, dim, bias=bias)
    down.residual = True  # for the init: a projection back into the residual stream
    return up, down


def _gated(dim: int, hidden: int | None, bias: bool) -> tuple[Merged, Linear]:
    """Build gate and up, stored as one matrix, and down; 8C/3 wide by default."""
    hidden = hidden or _eight_thirds(dim)
    gate_up, down = Merged(dim, {"gate": hidden, "up": hidden}, bias), Linear(hidden, dim, bias=bias)
    down.residual = True
    return gate_up, down


def _eight_thirds(dim: float) -> int:
    """The multiple of 8 that is nearest to 8/3 of ``dim``: 3 matrices of this width are as large as 2 of 4 * dim."""
    return 8 * max(1, round(dim / 3))


def _apply_experts(tokens: Tensor, experts: nn.ModuleList, chosen: Tensor, rank: Tensor, counts: Tensor) -> Tensor:
    """tokens (N,C), and for each choice its expert and its rank within that expert (NK,) -> outputs (NK,C).

    ``counts`` (E,) is the number of choices of each expert. The choices are sorted into bins of ``size`` rows, and each
    bin belongs to one expert. So all shapes are fixed, no choice is lost, and one batched product computes all bins. An
    expert leaves at most one bin partly empty, so NK // size + E bins always suffice. With half an even share as
    ``size``, they have 1.5 times as many rows as there are choices."""
    choices, device = chosen.shape[0], chosen.device
    size = -(-choices // (2 * len(experts)))  # rounded up
    bins = min(choices, choices // size + len(experts))
    bins_per_expert = (counts + size - 1) // size  # (E,), rounded up
    end = bins_per_expert.cumsum(0)  # (E,), the bin after the last one of each expert
    row = (end - bins_per_expert).gather(0, chosen) * size + rank  # (NK,), a different row for each choice
    owner = (torch.arange(bins, device=device)[:, None] >= end).sum(1).clamp(max=len(experts) - 1)  # (bins,)
    repeated = tokens.repeat_interleave(choices // tokens.shape[0], dim=0)  # (NK,C)
    x = tokens.new_zeros(bins * size, tokens.shape[1]).index_copy(0, row, repeated).view(bins, size, -1)
    gate_up, down = (torch.stack([getattr(e, name).weight for e in experts])[owner] for name in ("gate_up", "down"))
    gate, up = (x @ gate_up.transpose(1, 2)).chunk(2, dim=-1)  # (bins,size,hidden)
    return ((F.silu(gate) * up) @ down.transpose(1, 2)).flatten(0, 1)[row]
