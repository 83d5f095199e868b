"""Losses: hidden (N,C), head, targets (N,) with -100 ignored -> (objective, nats, count), summed over the targets."""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from toolkit.cpu import products
from toolkit.cpu.operation import operation
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
    ``rows=None``: as many as keep a chunk's logits within 1 GiB on a GPU, 64 MiB on a CPU, but at least 320; chunks
    are then of one size, a multiple of 16, but for the last. ``z_loss`` and ``label_smoothing`` as in CrossEntropy."""

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
        if not hidden.is_meta and torch.is_autocast_enabled(device):  # autocast does not know meta
            hidden = hidden.to(torch.get_autocast_dtype(device))
        rows = self.rows or _even(len(hidden), max(320, (2**30 if hidden.is_cuda else 2**26) // (4 * len(weight))))
        fixed = (targets, head.vocab_size, head.softcap, rows, self.z_loss, self.label_smoothing)
        # Chosen out here: inside a Function gradients are always off, and compile has to see which way it goes.
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            objective, nats = _LinearCrossEntropy.apply(hidden, weight, *fixed)
        else:
            objective, nats = _sums(hidden, weight, *fixed)
        return objective, nats.detach(), count


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, *fixed):
        # A compiler would spread the chunks over memory of their own, which a CPU waits for: there they stay one call.
        compiling = torch.compiler.is_compiling() and hidden.device.type == "cpu"
        take = _operation if compiling else _gradients
        objective, nats, grad_hidden, grad_weight = take(hidden, weight, *fixed)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype, ctx.fixed = weight.dtype, len(fixed)
        ctx.mark_non_differentiable(nats)
        return objective, nats

    @staticmethod
    def backward(ctx, grad, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place: another table is another 100 MB. A second backward pass is refused by autograd, which notices.
        grad_hidden, grad_weight = grad_hidden.mul_(grad), grad_weight.mul_(grad)
        return grad_hidden, grad_weight.to(ctx.weight_dtype), *[None] * ctx.fixed


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float | None,
    rows: int,
    z_loss: float,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The summed objective and nats, and the objective's gradients: hidden's in its dtype, the table's in float32."""
    objective = torch.zeros((), dtype=torch.float32, device=hidden.device)
    nats = torch.zeros_like(objective)
    table, grad_hidden = weight.to(hidden.dtype), torch.empty_like(hidden)
    # The table's before any logits: what is freed first then lies at the end of a CPU's heap, and leaves no hole.
    grad_weight, parts = torch.empty_like(weight, dtype=torch.float32), grad_hidden.split(rows)
    buffer, fixed = _buffer(hidden, table, rows), (vocab_size, softcap, z_loss, smoothing)
    for i, (h, t) in enumerate(zip(hidden.split(rows), targets.split(rows), strict=True)):
        loss, plain, d_logits, real = _chunk(h, t, table, buffer, *fixed, gradients=True)
        objective, nats = objective + loss, nats + plain
        products.mm(d_logits, table, out=parts[i]).mul_(real)
        h = h * real  # rather than the larger d_logits
        if len(parts) == 1 and products.fits(h.T, d_logits.T):
            grad_weight.copy_(products.product(h.T, d_logits.T).T)  # faster than d_logits.T @ h, the copy included
        elif d_logits.dtype != grad_weight.dtype:
            share = d_logits.T @ h
            grad_weight.add_(share) if i else grad_weight.copy_(share)
        elif i:
            grad_weight.addmm_(d_logits.T, h)  # no second table in memory
        else:
            torch.mm(d_logits.T, h, out=grad_weight)
        del d_logits  # the next chunk's logits take its place
    return objective, nats, grad_hidden, grad_weight


def _fake(hidden, weight, *fixed):
    scalars = (hidden.new_empty((), dtype=torch.float32) for _ in range(2))
    return *scalars, torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)


_operation = operation("linear_cross_entropy", _gradients, _fake)


def _sums(hidden, weight, targets, vocab_size, softcap, rows, z_loss, smoothing):
    """The summed objective and nats alone."""
    table = weight.to(hidden.dtype)
    chunks, buffer = zip(hidden.split(rows), targets.split(rows), strict=True), _buffer(hidden, table, rows)
    fixed = (vocab_size, softcap, z_loss, smoothing)
    sums = [_chunk(h, t, table, buffer, *fixed, gradients=False)[:2] for h, t in chunks]
    return (sum(column) for column in zip(*sums, strict=True))


def _buffer(hidden, table, rows):
    """Where the logits of one chunk after another lie, (rows, V) and on a CPU some columns more; None where the library
    that multiplies makes its own."""
    if products.fits(hidden[:rows], table):
        return None
    return hidden.new_empty(min(rows, len(hidden)), len(table) + (64 if _tiled(hidden) else 0))


def _tiled(hidden):
    """Whether MKL is to multiply: fastest into results 512 columns wide, in rows that do not begin a power of two
    apart."""
    return hidden.device.type == "cpu" and not torch.compiler.is_compiling()


def _chunk(h, t, table, buffer, vocab_size, softcap, z_loss, smoothing, gradients):
    """A chunk, rows h (rows, C) with their targets t: the summed objective and nats, d objective / d (uncapped logits)
    in h's dtype or None, still without regard to which targets count, and 1 for each that counts (rows, 1). One
    (rows, V) tensor is logits, probabilities and gradient in turn: memory is what a CPU waits for."""
    if buffer is None:
        logits = products.product(h, table)
    else:
        tile, logits = 512 if _tiled(h) else len(table), buffer[: len(h)]
        for columns, out in zip(table.T.split(tile, 1), logits[:, : len(table)].split(tile, 1), strict=True):
            torch.mm(h, columns, out=out)
    logits = logits.float()  # (rows, V)
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = 1 - logits * logits if gradients else None
        logits.mul_(softcap)
    logits[:, vocab_size:] = -torch.inf  # rows that only pad the table
    real = (t != -100)[:, None].float()
    target = t.clamp_min(0)[:, None]
    largest, chosen = logits.amax(-1, keepdim=True), logits.gather(1, target)
    mean = logits[:, :vocab_size].mean(-1, keepdim=True) if smoothing else None
    grad = torch.softmax(logits, -1, out=logits)
    log_z = largest - grad.amax(-1, keepdim=True).log()  # the largest logit's probability is 1 / sum(exp)
    objective = nats = log_z - chosen  # (rows, 1)
    if smoothing:
        objective = objective + smoothing * (chosen - mean)
    if z_loss:
        objective = objective + z_loss * log_z.square()
    sums = (objective * real).sum(), (nats * real).sum()
    if not gradients:
        return *sums, None, real
    if z_loss:
        grad.mul_(1 + 2 * z_loss * log_z)
    grad.scatter_add_(1, target, torch.full_like(log_z, smoothing - 1))
    if smoothing:
        grad[:, :vocab_size] -= smoothing / vocab_size
    if softcap is not None:
        grad.mul_(slope)
    return *sums, grad[:, : len(table)].to(h.dtype), real.to(h.dtype)


def _even(positions, most):
    """Rows of a chunk: no more chunks than ``most`` rows each would make, and no smaller last one than need be. Matrix
    products like multiples of 16."""
    chunks = -(-positions // most)
    return -(-positions // max(1, chunks) // 16) * 16 or 16
