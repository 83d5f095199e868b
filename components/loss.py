"""Losses: hidden (N,C), head, targets (N,) with -100 ignored -> (objective, nats, count), summed over the targets."""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import nn

from toolkit.registry import register


@register("loss")
class CrossEntropy(nn.Module):
    """-log softmax(logits)[target], all N*V logits at once in float32: 12 bytes a logit at the peak."""

    def __init__(self):
        super().__init__()

    def forward(self, hidden, head, targets):
        nats = F.cross_entropy(head.logits(hidden).float(), targets, ignore_index=-100, reduction="sum")
        return nats, nats.detach(), (targets != -100).sum()


@register("loss")
class ChunkedCrossEntropy(nn.Module):
    """The same value and gradients with the logits of ``rows`` positions in memory at a time: head and loss are one
    function, and each chunk's gradient is taken while its logits are there. Worth it where the vocabulary is large.
    ``rows=None``: as many as keep a chunk's logits within 1 GiB on a GPU, 16 MiB on a CPU, but at least 256."""

    def __init__(self, rows: Annotated[int, Gt(0)] | None = None):
        super().__init__()
        self.rows = rows

    def forward(self, hidden, head, targets):
        weight, count = head.weight, (targets != -100).sum()
        device = hidden.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        rows = self.rows or max(256, (2**30 if hidden.is_cuda else 2**24) // (4 * weight.shape[0]))
        fixed = (targets, head.vocab_size, head.softcap, rows)
        # Chosen out here: inside a Function gradients are always off, and compile has to see which way it goes.
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            nats = _LinearCrossEntropy.apply(hidden, weight, *fixed)
        else:
            nats = sum(chunk[0] for chunk in _chunks(hidden, weight, *fixed, gradients=False))
        return nats, nats.detach(), count


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, softcap, rows):
        nats = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden, grad_weight = [], torch.zeros_like(weight, dtype=torch.float32)
        for loss, d_logits, rows_of_hidden in _chunks(hidden, weight, targets, vocab_size, softcap, rows, True):
            nats = nats + loss
            grad_hidden.append(d_logits @ weight.to(d_logits.dtype))
            grad_weight += d_logits.T @ rows_of_hidden
        ctx.save_for_backward(torch.cat(grad_hidden), grad_weight)
        ctx.weight_dtype = weight.dtype
        return nats

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return (grad_hidden * grad).to(grad_hidden.dtype), grad_weight, None, None, None, None


def _chunks(hidden, weight, targets, vocab_size, softcap, rows, gradients):
    """Per chunk of rows: the summed nats, d nats / d (uncapped logits) in hidden's dtype or None, and the rows."""
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = (h @ weight.to(h.dtype).T).float()  # (rows, V)
        if softcap is not None:
            bounded = torch.tanh(logits / softcap)
            logits = bounded * softcap
        logits[:, vocab_size:] = -torch.inf  # rows that only pad the table
        log_z = logits.logsumexp(-1, keepdim=True)
        real = (t != -100)[:, None]
        target = t.clamp_min(0)[:, None]
        nats = ((log_z - logits.gather(1, target)) * real).sum()
        if not gradients:
            yield nats, None, h
            continue
        grad = (logits - log_z).exp_()
        grad.scatter_add_(1, target, torch.full_like(log_z, -1.0))
        if softcap is not None:
            grad = grad * (1 - bounded * bounded)
        yield nats, (grad * real).to(h.dtype), h
