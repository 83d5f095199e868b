"""Blocks: how mixer, ffn and norms are wired into the residual stream."""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import nn

from toolkit.registry import register


@register("block")
class PreNorm(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) (Xiong et al. 2020, arXiv:2002.04745; GPT-2)."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: tuple):
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        self.mixer_norm, self.ffn_norm = norm(dim), norm(dim)

    def forward(self, x, context):
        x = x + self.mixer(self.mixer_norm(x), context)
        return x + self.ffn(self.ffn_norm(x), context)


@register("block")
class PostNorm(nn.Module):
    """norm(x + mixer(x)), then norm(x + ffn(x)): the order of Vaswani et al. 2017."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: tuple):
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        self.mixer_norm, self.ffn_norm = norm(dim), norm(dim)

    def forward(self, x, context):
        x = self.mixer_norm(x + self.mixer(x, context))
        return self.ffn_norm(x + self.ffn(x, context))


@register("block")
class Parallel(nn.Module):
    """x + mixer(n) + ffn(n) with one n = norm(x) (Wang & Komatsuzaki 2021, GPT-J)."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: tuple):
        super().__init__()
        self.mixer, self.ffn, self.norm = mixer, ffn, norm(dim)

    def forward(self, x, context):
        normed = self.norm(x)
        return x + self.mixer(normed, context) + self.ffn(normed, context)


@register("block")
class Sandwich(nn.Module):
    """x + norm(mixer(norm(x))), then x + norm(ffn(norm(x))): a norm on both sides of each sublayer (Ding et al. 2021,
    arXiv:2105.13290; Gemma 2)."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: tuple):
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        self.mixer_norm, self.mixer_out_norm = norm(dim), norm(dim)
        self.ffn_norm, self.ffn_out_norm = norm(dim), norm(dim)

    def forward(self, x, context):
        x = x + self.mixer_out_norm(self.mixer(self.mixer_norm(x), context))
        return x + self.ffn_out_norm(self.ffn(self.ffn_norm(x), context))


@register("block")
class ReZero(nn.Module):
    """x + alpha * mixer(x), then x + alpha * ffn(x), with one learned number alpha a layer that starts at 0: the layer
    starts as the identity (Bachlechner et al. 2020, arXiv:2003.04887). There are no norms in the layer; the model's
    final norm is all that GPT.norm then stands for."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: tuple):
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x, context):
        x = x + self.alpha * self.mixer(x, context)
        return x + self.alpha * self.ffn(x, context)


@register("block")
class LayerScale(nn.Module):
    """x + gain * mixer(norm(x)), then x + gain * ffn(norm(x)), with learned gains (C,) (Touvron et al. 2021,
    arXiv:2103.17239). They start at ``initial``; the paper takes 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        ffn: nn.Module,
        norm: type,
        depth: tuple,
        initial: Annotated[float, Gt(0)] = 0.1,
    ):
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        self.mixer_norm, self.ffn_norm = norm(dim), norm(dim)
        self.mixer_gain = nn.Parameter(torch.full((dim,), initial))
        self.ffn_gain = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x, context):
        x = x + self.mixer_gain * self.mixer(self.mixer_norm(x), context)
        return x + self.ffn_gain * self.ffn(self.ffn_norm(x), context)


@register("block")
class DeepNorm(nn.Module):
    """norm(alpha * x + mixer(x)), then norm(alpha * x + ffn(x)), with alpha = (2 * n_layer)^(1/4) (Wang et al. 2022,
    arXiv:2203.00555, the constant for decoders). The method is this together with GPT.init = @DeepNormInit."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: tuple):
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        self.mixer_norm, self.ffn_norm = norm(dim), norm(dim)
        self.alpha = (2 * depth[1]) ** 0.25

    def forward(self, x, context):
        x = self.mixer_norm(self.alpha * x + self.mixer(x, context))
        return self.ffn_norm(self.alpha * x + self.ffn(x, context))


@register("block")
class HyperConnections(nn.Module):
    """n residual streams that each sublayer reads, mixes and writes by learned weights (Zhu et al. 2024,
    arXiv:2409.19606). With the streams h_i (C,) of a position,

        x = sum_i read_i h_i,    h_j <- sum_i mix_ij h_i + write_j sublayer(norm(x)).

    The first layer opens the streams as copies of x, the last one sums them. read starts as one stream, taken in turn
    from sublayer to sublayer, mix as the identity, write as ones: each stream starts as a pre-norm network, and the sum
    is n times that, which the final norm takes back. ``dynamic`` adds factor * tanh(norm(h_i) W) to row i of the
    weights, with W starting at 0 and the factors at 0.01. All layers have to be of this kind. Left out: the paper
    rescales the output projections by sqrt(n) at the start."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        ffn: nn.Module,
        norm: type,
        depth: tuple,
        streams: Annotated[int, Gt(0)] = 4,
        dynamic: bool = True,
    ):
        super().__init__()
        self.mixer, self.ffn, self.streams = mixer, ffn, streams
        self.mixer_norm, self.ffn_norm = norm(dim), norm(dim)
        self.layer, self.last = depth[0], depth[0] == depth[1] - 1
        self.mixer_streams = _Connection(dim, streams, 2 * self.layer, norm, dynamic)
        self.ffn_streams = _Connection(dim, streams, 2 * self.layer + 1, norm, dynamic)

    def forward(self, x, context):
        if self.layer == 0:
            x = x[:, :, None].expand(-1, -1, self.streams, -1)  # (B, T, n, C)
        elif context.shared.get("HyperConnections") != self.layer - 1:
            raise ValueError(
                f"HyperConnections in layer {self.layer} gets no streams from the layer before, which is of another "
                "kind; use it in every layer: GPT.block = @HyperConnections"
            )
        context.shared["HyperConnections"] = self.layer
        x = self.mixer_streams(x, lambda x: self.mixer(self.mixer_norm(x), context))
        x = self.ffn_streams(x, lambda x: self.ffn(self.ffn_norm(x), context))
        return x.sum(2) if self.last else x


class _Connection(nn.Module):
    """What one sublayer of HyperConnections learns of the streams: weights to read, mix and write them."""

    def __init__(self, dim, streams, sublayer, norm, dynamic):
        super().__init__()
        self.read = nn.Parameter(torch.eye(streams)[sublayer % streams].clone())
        self.mix = nn.Parameter(torch.eye(streams).flatten())  # flat, so that it does not decay, as in the paper
        self.write = nn.Parameter(torch.ones(streams))
        self.norm = norm(dim) if dynamic else None
        if dynamic:
            self.weight = nn.Parameter(torch.zeros(streams + 2, dim))  # no Linear: the init would fill it
            self.factor = nn.Parameter(torch.full((2,), 0.01))  # of read and mix, of write

    def forward(self, h, sublayer):
        n = h.shape[2]
        read, mix, write = self.read, self.mix.view(n, n), self.write
        if self.norm is not None:
            change = torch.tanh(F.linear(self.norm(h), self.weight))  # (B, T, n, n + 2)
            alpha, beta = self.factor[0] * change[..., :-1], self.factor[1] * change[..., -1]
            read, mix, write = read + alpha[..., 0], mix + alpha[..., 1:], write + beta
        # Sums of products, not matmuls: autocast would round the residual streams to bfloat16.
        mixed = sum(mix[..., i, :, None] * h[..., i, None, :] for i in range(n))  # (B, T, n, C)
        x = (read[..., None] * h).sum(-2)  # (B, T, C)
        return mixed + write[..., None] * sublayer(x)[..., None, :]
