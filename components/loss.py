"""Losses: hidden (N,C), head, targets (N,) with -100 ignored -> (objective, nats, count), summed over the targets."""

from typing import Annotated

import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from toolkit.linear_cross_entropy import linear_cross_entropy
from toolkit.model import Head
from toolkit.registry import register

ZLoss = Annotated[float, Ge(0)]
Smoothing = Annotated[float, Interval(ge=0, lt=1)]


@register("loss")
class CrossEntropy(nn.Module):
    """-log softmax(logits)[target], with all N*V logits in memory at once, in float32: 12 bytes per logit at the peak.

    Two knobs change the objective, but never the reported nats. ``z_loss`` adds z_loss * logsumexp(logits)^2 for each
    target, which keeps the logits from drifting (de Brebisson & Vincent 2015, arXiv:1604.08859; Chowdhery et al. 2022,
    arXiv:2204.02311, use 1e-4). ``label_smoothing`` takes this fraction of each target's probability and spreads it
    evenly over the vocabulary (Szegedy et al. 2015, arXiv:1512.00567)."""

    def __init__(self, z_loss: ZLoss = 0.0, label_smoothing: Smoothing = 0.0):
        super().__init__()
        self.z_loss, self.label_smoothing = z_loss, label_smoothing

    def forward(self, hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, counts = head.logits(hidden).float(), targets != -100  # (N,V), (N,)
        objective = nats = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        if self.label_smoothing:  # a fraction of the nats is replaced by the mean of -log p over the vocabulary
            spread = ((logits.logsumexp(-1) - logits.mean(-1)) * counts).sum()
            objective = objective + self.label_smoothing * (spread - nats)
        if self.z_loss:
            objective = objective + self.z_loss * (logits.logsumexp(-1).square() * counts).sum()
        return objective, nats.detach(), counts.sum()


@register("loss")
class ChunkedCrossEntropy(nn.Module):
    """CrossEntropy with the logits of only ``rows`` positions in memory at a time: the same value and gradients. Head
    and loss are one function, which computes the gradient of each chunk as soon as it has its logits.

    It saves time and memory with a large vocabulary. ``rows=None`` takes as many positions as keep a chunk's logits
    below 1 GiB on a GPU or 64 MiB on a CPU, but at least 320. All chunks except the last then have the same size, a
    multiple of 16. ``z_loss`` and ``label_smoothing`` are those of CrossEntropy."""

    def __init__(
        self,
        rows: Annotated[int, Gt(0)] | None = None,
        z_loss: ZLoss = 0.0,
        label_smoothing: Smoothing = 0.0,
    ):
        super().__init__()
        self.rows, self.z_loss, self.label_smoothing = rows, z_loss, label_smoothing

    def forward(self, hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # hidden (N,C), targets (N,)
        largest = max(320, (2**30 if hidden.is_cuda else 2**26) // (4 * len(head.weight)))
        rows = self.rows or _equal_rows(len(hidden), largest)
        objective, nats = linear_cross_entropy(
            hidden, head.weight, targets, head.vocab_size, head.softcap, rows, self.z_loss, self.label_smoothing
        )
        return objective, nats.detach(), (targets != -100).sum()


def _equal_rows(positions: int, largest: int) -> int:
    """Positions per chunk: as few chunks as ``largest`` allows, all of the same size except the last. A multiple of 16,
    which suits matrix products."""
    chunks = max(1, -(-positions // largest))
    return -(-positions // chunks // 16) * 16 or 16
