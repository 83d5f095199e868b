"""Faults for ``compare --probes`` to locate: parts as somebody may write them in a file of his own, each wrong in one
place. test_probe_faults.py has the bindings that plant them."""

import torch
import torch.nn.functional as F
from torch import nn

from components.attention import MathAttention
from components.block import PreNorm
from components.ffn import GELU
from components.init import GPT2Init
from toolkit import register


@register("block")
class DeadBlock(PreNorm):
    """Both branches are switched off, so the block only passes x on."""

    def forward(self, x, context):
        branch = self.mixer(self.mixer_norm(x), context)
        return x + 0.0 * branch + 0.0 * self.ffn(self.ffn_norm(x), context)


@register("init")
class UnscaledResidual(GPT2Init):
    """The second ffn's last matrix is not made smaller for the depth."""

    def __call__(self, name, parameter, generator):
        super().__call__(name, parameter, generator)
        if name == "blocks.1.ffn.down.weight":
            parameter.mul_(self.std / self.residual_std)


@register("norm")
class NormOff(nn.LayerNorm):
    """Does not normalise; its gain and bias are there."""

    def __init__(self, dim):
        super().__init__(dim)

    def forward(self, x):
        return x * self.weight + self.bias


@register("ffn")
class FrozenFFN(GELU):
    """The first matrix is never trained."""

    def __init__(self, dim):
        super().__init__(dim)
        self.up.weight.requires_grad_(False)


@register("ffn")
class DyingFFN(GELU):
    """Half of the units get no input that could activate them."""

    def forward(self, x, context):
        hidden = self.up(x)
        half = hidden.shape[-1] // 2
        return self.down(F.gelu(torch.cat([hidden[..., :half], hidden[..., half:] - 20.0], -1)))


@register("attention")
class UnscaledAttention(MathAttention):
    """The scores are not divided by sqrt(D)."""

    def forward(self, q, k, v, mask=None):
        return super().forward(q * q.shape[-1] ** 0.5, k, v, mask)


@register("position")
class Nowhere(nn.Module):
    """No positions."""

    def __init__(self, dim, n_head, head_dim, max_len):
        super().__init__()

    def rotate(self, q, k, positions):
        return q, k


@register("init")
class LargeInit(GPT2Init):
    """One matrix is drawn five times too large."""

    def __call__(self, name, parameter, generator):
        super().__call__(name, parameter, generator)
        if name == "blocks.2.mixer.qkv.weight":
            parameter.mul_(5.0)


@register("block")
class CutGradient(PreNorm):
    """No gradient reaches the ffn."""

    def forward(self, x, context):
        x = x + self.mixer(self.mixer_norm(x), context)
        return x + self.ffn(self.ffn_norm(x), context).detach()


@register("init")
class FastBlock(GPT2Init):
    """One block learns at ten times the rate."""

    def __call__(self, name, parameter, generator):
        super().__call__(name, parameter, generator)
        if name.startswith("blocks.1."):
            parameter.lr_scale = 10.0


@register("init")
class HotHead(GPT2Init):
    """The output matrix is drawn five times too large, and so are all logits."""

    def __call__(self, name, parameter, generator):
        super().__call__(name, parameter, generator)
        if name == "unembed.weight":
            parameter.mul_(5.0)
