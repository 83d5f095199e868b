"""Losses: hidden (N,C), head, targets (N,) with -100 ignored -> (objective, nats, count), summed over the targets."""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import nn

from toolkit.registry import register

ZLoss = Annotated[float, Ge(0)]
Smoothing = Annotated[float, Interval(ge=0, lt=1)]


@register("loss")
class CrossEntropy(nn.Module):
    """-log softmax(logits)[target], all N*V logits at once in float32: 12 bytes a logit at the peak. To the objective,
    never to the reported nats, ``z_loss`` adds z_loss * logsumexp(logits)^2 a target, which keeps the logits from
    drifting (de Brebisson & Vincent 2015, arXiv:1604.08859; Chowdhery et al. 2022, arXiv:2204.02311, use 1e-4), and
    ``label_smoothing`` moves that share of each target evenly onto the vocabulary (Szegedy et al. 2015,
    arXiv:1512.00567)."""

    def __init__(self, z_loss: ZLoss = 0.0, label_smoothing: Smoothing = 0.0):
        super().__init__()
        self.z_loss, self.label_smoothing = z_loss, label_smoothing

    def forward(self, hidden, head, targets):
        logits, real = head.logits(hidden).float(), targets != -100
        objective = nats = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        if self.label_smoothing:  # the mean of -log p over the vocabulary takes the place of a share of the nats
            spread = ((logits.logsumexp(-1) - logits.mean(-1)) * real).sum()
            objective = objective + self.label_smoothing * (spread - nats)
        if self.z_loss:
            objective = objective + self.z_loss * (logits.logsumexp(-1).square() * real).sum()
        return objective, nats.detach(), real.sum()


@register("loss")
class ChunkedCrossEntropy(nn.Module):
    """The same value and gradients with the logits of ``rows`` positions in memory at a time: head and loss are one
    function, and each chunk's gradient is taken while its logits are there. Worth it where the vocabulary is large.
    ``rows=None``: as many as keep a chunk's logits within 1 GiB on a GPU, 16 MiB on a CPU, but at least 256.
    ``z_loss`` and ``label_smoothing`` as in CrossEntropy."""

    def __init__(
        self,
        rows: Annotated[int, Gt(0)] | None = None,
        z_loss: ZLoss = 0.0,
        label_smoothing: Smoothing = 0.0,
    ):
        super().__init__()
        self.rows, self.z_loss, self.label_smoothing = rows, z_loss, label_smoothing

    def forward(self, hidden, head, targets):
        weight, count = head.weight, (targets != -100).sum()
        device = hidden.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        rows = self.rows or max(256, (2**30 if hidden.is_cuda else 2**24) // (4 * weight.shape[0]))
        fixed = (targets, head.vocab_size, head.softcap, rows, self.z_loss, self.label_smoothing)
        # Chosen out here: inside a Function gradients are always off, and compile has to see which way it goes.
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            objective, nats = _LinearCrossEntropy.apply(hidden, weight, *fixed)
        else:
            sums = [chunk[:2] for chunk in _chunks(hidden, weight, *fixed, gradients=False)]
            objective, nats = (sum(column) for column in zip(*sums, strict=True))
        return objective, nats.detach(), count


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, *fixed):
        objective = torch.zeros((), dtype=torch.float32, device=hidden.device)
        nats = torch.zeros_like(objective)
        table, grad_hidden = weight.to(hidden.dtype), []
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for loss, plain, d_logits, rows_of_hidden in _chunks(hidden, table, *fixed, gradients=True):
            objective, nats = objective + loss, nats + plain
            grad_hidden.append(d_logits @ table)
            if d_logits.dtype == grad_weight.dtype:
                grad_weight.addmm_(d_logits.T, rows_of_hidden)  # no second table in memory
            else:
                grad_weight += d_logits.T @ rows_of_hidden
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight)
        ctx.weight_dtype, ctx.fixed = weight.dtype, len(fixed)
        ctx.mark_non_differentiable(nats)
        return objective, nats

    @staticmethod
    def backward(ctx, grad, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return (grad_hidden * grad).to(grad_hidden.dtype), grad_weight, *[None] * ctx.fixed


def _chunks(hidden, weight, targets, vocab_size, softcap, rows, z_loss, smoothing, gradients):
    """Per chunk of rows: the summed objective and nats, d objective / d (uncapped logits) in hidden's dtype or None,
    and the rows. One (rows, V) tensor is logits, exponentials and gradient in turn: memory is what a CPU waits for."""
    table = weight.to(hidden.dtype).T
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = (h @ table).float()  # (rows, V)
        if softcap is not None:
            logits.div_(softcap).tanh_()
            slope = 1 - logits * logits if gradients else None
            logits.mul_(softcap)
        logits[:, vocab_size:] = -torch.inf  # rows that only pad the table
        real = (t != -100)[:, None].float()
        target = t.clamp_min(0)[:, None]
        largest, chosen = logits.amax(-1, keepdim=True), logits.gather(1, target)
        mean = logits[:, :vocab_size].mean(-1, keepdim=True) if smoothing else None
        total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
        log_z = largest + total.log()
        objective = nats = log_z - chosen  # (rows, 1)
        if smoothing:
            objective = objective + smoothing * (chosen - mean)
        if z_loss:
            objective = objective + z_loss * log_z.square()
        sums = (objective * real).sum(), (nats * real).sum()
        if not gradients:
            yield *sums, None, h
            continue
        grad = logits.mul_((1 + 2 * z_loss * log_z) / total * real)
        grad.scatter_add_(1, target, (smoothing - 1) * real)
        if smoothing:
            grad[:, :vocab_size] -= smoothing / vocab_size * real
        if softcap is not None:
            grad.mul_(slope)
        yield *sums, grad.to(h.dtype), h
