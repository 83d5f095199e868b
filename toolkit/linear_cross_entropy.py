"""The cross-entropy of a linear output layer, in chunks of positions, so that not all logits are in memory at once.

Shapes: N positions, R positions of a chunk, C model dim, V vocabulary. The table is the weight of the output layer, in
the dtype of the hidden states; its rows from ``vocab_size`` on are padding."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.cpu import products, tiles
from toolkit.cpu.operation import helps, operation


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float | None,
    rows: int,
    z_loss: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """hidden (N,C), weight (V plus padding, C), targets (N,) -> the objective and the nats, each summed over the
    targets that are not -100. ``softcap`` bounds the logits, if it is given; ``rows`` is R.

    The gradients are computed in the forward pass, while the logits of a chunk are in memory; the backward pass only
    multiplies them by its incoming gradient. The formulas are those of CrossEntropy in components/loss.py."""
    device = hidden.device.type
    if not hidden.is_meta and torch.is_autocast_enabled(device):  # autocast does not know the meta device
        hidden = hidden.to(torch.get_autocast_dtype(device))
    arguments = (hidden, weight, targets, vocab_size, softcap, rows, z_loss, label_smoothing)
    # Decided here: inside a Function gradients are always off, and the compiler must see which branch is taken.
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(*arguments)
    return _sums(*arguments)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        # The compiler would give each chunk memory of its own, which slows a CPU down. There, this is one operation.
        function = _operation if helps(hidden) else _gradients
        objective, nats, grad_hidden, grad_weight = function(hidden, weight, *settings)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype, ctx.setting_count = weight.dtype, len(settings)
        ctx.mark_non_differentiable(nats)
        return objective, nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place, since another table can be another 100 MB. Autograd notices and refuses a second backward pass.
        grad_hidden, grad_weight = grad_hidden.mul_(grad), grad_weight.mul_(grad)
        return grad_hidden, grad_weight.to(ctx.weight_dtype), *[None] * ctx.setting_count


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float | None,
    rows: int,
    z_loss: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the summed objective and nats, and the gradients of the objective: that of the hidden states in their
    dtype, that of the weight in float32."""
    objective = torch.zeros((), dtype=torch.float32, device=hidden.device)
    nats = torch.zeros_like(objective)
    table, grad_hidden = weight.to(hidden.dtype), torch.empty_like(hidden)
    # Allocated before any logits: the logits, freed first, are then at the end of a CPU's heap and leave no gap.
    grad_weight, grad_chunks = torch.empty_like(weight, dtype=torch.float32), grad_hidden.split(rows)
    buffer = tiles.buffer(hidden, table, rows)
    for i, (h, t) in enumerate(zip(hidden.split(rows), targets.split(rows), strict=True)):
        chunk = _chunk(h, t, table, buffer, vocab_size, softcap, z_loss, label_smoothing, gradients=True)
        objective, nats, counts = objective + chunk.objective, nats + chunk.nats, chunk.counts.to(h.dtype)
        grad_logits = _logit_gradient(chunk, vocab_size, z_loss, label_smoothing)[:, : len(table)].to(h.dtype)
        del chunk  # it holds a tensor of the size of the logits
        products.mm(grad_logits, table, out=grad_chunks[i]).mul_(counts)
        h = h * counts  # rather than the larger grad_logits
        if len(grad_chunks) == 1 and products.fits(h.T, grad_logits.T):
            grad_weight.copy_(products.product(h.T, grad_logits.T).T)  # faster than grad_logits.T @ h, with the copy
        elif grad_logits.dtype != grad_weight.dtype:
            chunk_grad = grad_logits.T @ h
            grad_weight.add_(chunk_grad) if i else grad_weight.copy_(chunk_grad)
        elif i:
            grad_weight.addmm_(grad_logits.T, h)  # without a second table in memory
        else:
            torch.mm(grad_logits.T, h, out=grad_weight)
        del grad_logits  # so that the next chunk can use its memory
    return objective, nats, grad_hidden, grad_weight


def _empty_gradients(hidden: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    objective, nats = (hidden.new_empty((), dtype=torch.float32) for _ in range(2))
    return objective, nats, torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)


_operation = operation("linear_cross_entropy", _gradients, _empty_gradients)


def _sums(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float | None,
    rows: int,
    z_loss: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Return the summed objective and nats."""
    objective = nats = torch.zeros((), dtype=torch.float32, device=hidden.device)
    table = weight.to(hidden.dtype)
    buffer = tiles.buffer(hidden, table, rows)
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        chunk = _chunk(h, t, table, buffer, vocab_size, softcap, z_loss, label_smoothing, gradients=False)
        objective, nats = objective + chunk.objective, nats + chunk.nats
    return objective, nats


class _Chunk(NamedTuple):
    """One chunk of R positions: its two sums, and what the gradient of its logits is computed from."""

    objective: Tensor
    nats: Tensor
    counts: Tensor  # (R,1), 1 for a target that counts and 0 for -100
    target: Tensor  # (R,1), the target, 0 for -100
    probabilities: Tensor  # (R,V)
    log_z: Tensor  # (R,1), the logarithm of the sum of exp(logits)
    slope: Tensor | None  # (R,V), the derivative of the soft cap, if there is one


def _chunk(
    hidden: Tensor,
    targets: Tensor,
    table: Tensor,
    buffer: Tensor | None,
    vocab_size: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    gradients: bool,
) -> _Chunk:
    """Compute one chunk: hidden (R,C), targets (R,). One (R,V) tensor holds the logits, then the probabilities, and at
    last their gradient, because access to memory takes most of the time on a CPU."""
    slope = mean_logit = None
    logits = tiles.logits(hidden, table, buffer).float()  # (R,V)
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = 1 - logits * logits if gradients else None
        logits.mul_(softcap)
    logits[:, vocab_size:] = -torch.inf  # the rows that pad the table
    counts = (targets != -100)[:, None].float()
    target = targets.clamp_min(0)[:, None]
    largest, target_logit = logits.amax(-1, keepdim=True), logits.gather(1, target)
    if label_smoothing:
        mean_logit = logits[:, :vocab_size].mean(-1, keepdim=True)
    probabilities = torch.softmax(logits, -1, out=logits)
    log_z = largest - probabilities.amax(-1, keepdim=True).log()  # the largest probability is exp(largest - log_z)
    objective = nats = log_z - target_logit  # (R,1)
    if mean_logit is not None:
        objective = objective + label_smoothing * (target_logit - mean_logit)
    if z_loss:
        objective = objective + z_loss * log_z.square()
    return _Chunk((objective * counts).sum(), (nats * counts).sum(), counts, target, probabilities, log_z, slope)


def _logit_gradient(chunk: _Chunk, vocab_size: int, z_loss: float, label_smoothing: float) -> Tensor:
    """d objective / d (logits before the cap), (R,V), computed in place of the probabilities. It is as if every target
    counted."""
    grad = chunk.probabilities
    if z_loss:
        grad.mul_(1 + 2 * z_loss * chunk.log_z)
    grad.scatter_add_(1, chunk.target, torch.full_like(chunk.log_z, label_smoothing - 1))
    if label_smoothing:
        grad[:, :vocab_size] -= label_smoothing / vocab_size
    if chunk.slope is not None:
        grad.mul_(chunk.slope)
    return grad
