"""Faults for ``compare --probes`` to locate: parts as somebody may write them in a file of his own, each wrong in one
place. ``FAULTS`` says for each what makes it, and which modules and statistics belong to it; this was written down
before any of them was run."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Fault:
    """A binding that plants the fault, its layer (None: the head), and the probes and statistics that belong to it. The
    module is anywhere in the layer."""

    binding: str
    layer: int | None
    statistics: tuple[str, ...]


def at(layer, part, usual, layers=4):
    """A slot's list with ``part`` in one layer."""
    return f"[{', '.join('@' + (part if i == layer else usual) for i in range(layers))}]"


ACTIVATIONS = ("Activations/rms", "Activations/largest", "Activations/kurtosis")
UPDATES = ("Updates/gradient_norm", "Updates/update_ratio")
RANK = ("EffectiveRank/rank",)
FAULTS = {
    "dead block": Fault(f"GPT.block = {at(2, 'DeadBlock', 'PreNorm')}", 2, (*ACTIVATIONS, *UPDATES, *RANK)),
    "unscaled residual": Fault("GPT.init = @UnscaledResidual", 1, (*ACTIVATIONS, *UPDATES, *RANK)),
    "norm off": Fault(f"GPT.norm = {at(2, 'NormOff', 'LayerNorm')}", 2, (*ACTIVATIONS, *UPDATES, *RANK)),
    "frozen matrix": Fault(f"GPT.ffn = {at(1, 'FrozenFFN', 'GELU')}", 1, ("Updates/update_ratio",)),
    "dying units": Fault(f"GPT.ffn = {at(2, 'DyingFFN', 'GELU')}", 2, ("DeadUnits/dead_share", *ACTIVATIONS)),
    "unscaled attention": Fault(
        f"GPT.attention = {at(1, 'UnscaledAttention', 'MathAttention')}",
        1,
        ("AttentionEntropy/entropy_nats", *ACTIVATIONS, "Updates/gradient_norm"),
    ),
    "no positions": Fault(
        f"GPT.position = {at(2, 'Nowhere', 'RoPE')}",
        2,
        ("AttentionEntropy/entropy_nats", *ACTIVATIONS, "Updates/gradient_norm"),
    ),
    "large init": Fault("GPT.init = @LargeInit", 2, (*ACTIVATIONS, *UPDATES, "AttentionEntropy/entropy_nats", *RANK)),
    "cut gradient": Fault(f"GPT.block = {at(2, 'CutGradient', 'PreNorm')}", 2, UPDATES),
    "fast block": Fault("GPT.init = @FastBlock", 1, ("Updates/update_ratio",)),
    "hot head": Fault(
        "GPT.init = @HotHead", None, ("LogitScale/rms", "LogitScale/largest", "LogitScale/log_z_nats", *UPDATES)
    ),
}
