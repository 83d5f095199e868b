"""Blocks: how mixer, ffn and norms are wired into the residual stream."""

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
