"""Blocks: one layer of the model. A block adds the outputs of its mixer and its ffn to the residual stream x (B,T,C).

"Sublayer" means the mixer or the ffn. Both come built. ``norm`` is a class, which a block builds itself."""

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor, nn

from toolkit.context import Context
from toolkit.registry import register

Depth = tuple[int, int]  # (index of the layer, number of layers)


@register("block")
class PreNorm(nn.Module):
    """x = x + mixer(norm(x)), then x = x + ffn(norm(x)), as in GPT-2 (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: Depth):
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        self.mixer_norm, self.ffn_norm = norm(dim), norm(dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        x = x + self.mixer(self.mixer_norm(x), context)
        return x + self.ffn(self.ffn_norm(x), context)


@register("block")
class MixerOnly(nn.Module):
    """x + mixer(norm(x)), without GPT.ffn, to study mixers by themselves (Arora et al. 2023, arXiv:2312.04927)."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: Depth):
        super().__init__()
        self.mixer, self.norm = mixer, norm(dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        return x + self.mixer(self.norm(x), context)


@register("block")
class PostNorm(nn.Module):
    """x = norm(x + mixer(x)), then x = norm(x + ffn(x)), as in the first transformer (Vaswani et al. 2017,
    arXiv:1706.03762)."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: Depth):
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        self.mixer_norm, self.ffn_norm = norm(dim), norm(dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        x = self.mixer_norm(x + self.mixer(x, context))
        return self.ffn_norm(x + self.ffn(x, context))


@register("block")
class Parallel(nn.Module):
    """x + mixer(norm(x)) + ffn(norm(x)), with one norm for both (GPT-J: Wang & Komatsuzaki 2021; PaLM: Chowdhery et al.
    2022, arXiv:2204.02311). ``two_norms=True`` gives the ffn a norm of its own, as in GPT-NeoX and Pythia."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: Depth, two_norms: bool = False):
        super().__init__()
        self.mixer, self.ffn, self.norm = mixer, ffn, norm(dim)
        self.ffn_norm = norm(dim) if two_norms else None

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        normed = self.norm(x)
        ffn_input = normed if self.ffn_norm is None else self.ffn_norm(x)
        return x + self.mixer(normed, context) + self.ffn(ffn_input, context)


@register("block")
class Sandwich(nn.Module):
    """x = x + norm(mixer(norm(x))), then x = x + norm(ffn(norm(x))), with a norm before and after each sublayer (Ding
    et al. 2021, arXiv:2105.13290; Gemma 2)."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: Depth):
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        self.mixer_norm, self.mixer_out_norm = norm(dim), norm(dim)
        self.ffn_norm, self.ffn_out_norm = norm(dim), norm(dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        x = x + self.mixer_out_norm(self.mixer(self.mixer_norm(x), context))
        return x + self.ffn_out_norm(self.ffn(self.ffn_norm(x), context))


@register("block")
class ReZero(nn.Module):
    """x = x + alpha * mixer(x), then x = x + alpha * ffn(x), with one learned number alpha per layer (Bachlechner et
    al. 2020, arXiv:2003.04887). alpha starts at 0, so each layer starts as the identity. The layer has no norms:
    GPT.norm then sets only the model's final norm."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: Depth):
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        x = x + self.alpha * self.mixer(x, context)
        return x + self.alpha * self.ffn(x, context)


@register("block")
class LayerScale(nn.Module):
    """x = x + gain * mixer(norm(x)), then x = x + gain * ffn(norm(x)), with a learned gain (C,) for each sublayer
    (Touvron et al. 2021, arXiv:2103.17239). ``initial`` is the start of every gain. The paper uses 0.1 up to 18 layers,
    1e-5 up to 24, and 1e-6 beyond."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        ffn: nn.Module,
        norm: type,
        depth: Depth,
        initial: Annotated[float, Gt(0)] = 0.1,
    ):
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        self.mixer_norm, self.ffn_norm = norm(dim), norm(dim)
        self.mixer_gain = nn.Parameter(torch.full((dim,), initial))
        self.ffn_gain = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        x = x + self.mixer_gain * self.mixer(self.mixer_norm(x), context)
        return x + self.ffn_gain * self.ffn(self.ffn_norm(x), context)


@register("block")
class DeepNorm(nn.Module):
    """x = norm(alpha * x + mixer(x)), then x = norm(alpha * x + ffn(x)), with the constant alpha = (2 * n_layer)^(1/4)
    (Wang et al. 2022, arXiv:2203.00555, the constant for decoders). The method also needs its own initial weights:
    bind GPT.init = @DeepNormInit."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: Depth):
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        self.mixer_norm, self.ffn_norm = norm(dim), norm(dim)
        self.alpha = (2 * depth[1]) ** 0.25

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        x = self.mixer_norm(self.alpha * x + self.mixer(x, context))
        return self.ffn_norm(self.alpha * x + self.ffn(x, context))


@register("block")
class HyperConnections(nn.Module):
    """n residual streams, which each sublayer reads, mixes and writes with learned weights (Zhu et al. 2024,
    arXiv:2409.19606). With h_i (C,) the n streams at one position, a sublayer computes

        x = sum_i read_i h_i,    h_j <- sum_i mix_ij h_i + write_j sublayer(norm(x)).

    The first layer copies x into the n streams, and the last layer adds them up. At the start, sublayer number s reads
    stream s mod n alone, mix is the identity, and write is all ones. The streams are then equal, and each is a pre-norm
    network. Their sum is n times as large, which the final norm removes. Every layer must use this block. The paper
    also rescales the initial output projections by sqrt(n); this part does not.

    streams   n
    dynamic   let the weights of stream i depend on its content: add factor * tanh(norm(h_i) W) to them, where W starts
              at 0, and one factor for read and mix and one for write start at 0.01
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        ffn: nn.Module,
        norm: type,
        depth: Depth,
        streams: Annotated[int, Gt(0), Le(1024)] = 4,
        dynamic: bool = True,
    ):
        super().__init__()
        self.mixer, self.ffn, self.streams = mixer, ffn, streams
        self.mixer_norm, self.ffn_norm = norm(dim), norm(dim)
        self.layer, self.last = depth[0], depth[0] == depth[1] - 1
        self.mixer_streams = _Connection(dim, streams, 2 * self.layer, norm, dynamic)
        self.ffn_streams = _Connection(dim, streams, 2 * self.layer + 1, norm, dynamic)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,n,C); first in and last out: (B,T,C)
        if self.layer == 0:
            x = x[:, :, None].expand(-1, -1, self.streams, -1)  # (B,T,n,C)
        elif context.shared.get("HyperConnections") != self.layer - 1:
            raise ValueError(
                f"HyperConnections in layer {self.layer} needs the streams of layer {self.layer - 1}, which is another "
                "kind of block; use it in every layer: GPT.block = @HyperConnections"
            )
        context.shared["HyperConnections"] = self.layer
        x = self.mixer_streams(x, lambda x: self.mixer(self.mixer_norm(x), context))
        x = self.ffn_streams(x, lambda x: self.ffn(self.ffn_norm(x), context))
        return x.sum(2) if self.last else x


class _Connection(nn.Module):
    """The weights with which one sublayer of HyperConnections reads, mixes and writes the streams."""

    def __init__(self, dim: int, streams: int, sublayer: int, norm: type, dynamic: bool):
        super().__init__()
        self.read = nn.Parameter(torch.eye(streams)[sublayer % streams].clone())
        self.mix = nn.Parameter(torch.eye(streams).flatten())  # flat, so that it has no weight decay, as in the paper
        self.write = nn.Parameter(torch.ones(streams))
        self.norm = norm(dim) if dynamic else None
        if dynamic:
            self.weight = nn.Parameter(torch.zeros(streams + 2, dim))  # not a Linear, which the init would fill
            self.factor = nn.Parameter(torch.full((2,), 0.01))  # for read and mix, for write

    def forward(self, h: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:  # (B,T,n,C) -> (B,T,n,C)
        n = h.shape[2]
        read: Tensor = self.read  # (n,)
        write: Tensor = self.write  # (n,)
        mix = self.mix.view(n, n)
        if self.norm is not None:
            change = torch.tanh(F.linear(self.norm(h), self.weight))  # (B,T,n,n+2)
            alpha, beta = self.factor[0] * change[..., :-1], self.factor[1] * change[..., -1]
            read, mix, write = read + alpha[..., 0], mix + alpha[..., 1:], write + beta  # one of each per token
        # Sums of products instead of matmuls: autocast would round the residual streams to bfloat16 in a matmul.
        mixed = sum(mix[..., i, :, None] * h[..., i, None, :] for i in range(n))  # (B,T,n,C)
        x = (read[..., None] * h).sum(-2)  # (B,T,C)
        return mixed + write[..., None] * sublayer(x)[..., None, :]
