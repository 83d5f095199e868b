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
    targets that are not -100. ``softcap`` bounds the logits unless it is None. ``rows`` is R.

    The forward pass also computes the gradients, while the logits of a chunk are in memory. The backward pass only
    multiplies them by its incoming gradient. The formulas are those of CrossEntropy in components/loss.py."""
    device = hidden.device.type
    if not hidden.is_meta and torch.is_autocast_enabled(device):  # autocast does not know the meta device
        hidden = hidden.to(torch.get_autocast_dtype(device))
    arguments = (hidden, weight, targets, vocab_size, softcap, rows, z_loss, label_smoothing)
    # This can't be decided inside the Function: gradients are always off there, and the compiler must see the branch.
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(*arguments)
    return _sums(*arguments)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        # On a CPU, the compiler calls this as one operation. Its own code would allocate memory for each chunk: slow.
        function = _operation if helps(hidden) else _gradients
        objective, nats, grad_hidden, grad_weight = function(hidden, weight, *settings)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype, ctx.setting_count = weight.dtype, len(settings)
        ctx.mark_non_differentiable(nats)
        return objective, nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # In place, since a copy of the weight's gradient can take 100 MB. Autograd then refuses a second backward pass.
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
    """Return the summed objective and nats, and the gradients of the objective: for the hidden states in their dtype,
    for the weight in float32."""
    objective = torch.zeros((), dtype=torch.float32, device=hidden.device)
    nats = torch.zeros_like(objective)
    table, grad_hidden = weight.to(hidden.dtype), torch.empty_like(hidden)
    # Allocated before the logits. These are freed first; at the end of a CPU's heap, they then leave no gap.
    grad_weight, grad_chunks = torch.empty_like(weight, dtype=torch.float32), grad_hidden.split(rows)
    buffer = tiles.buffer(hidden, table, rows)
    for i, (h, t) in enumerate(zip(hidden.split(rows), targets.split(rows), strict=True)):
        chunk = _chunk(h, t, table, buffer, vocab_size, softcap, z_loss, label_smoothing, gradients=True)
        objective, nats, counts = objective + chunk.objective, nats + chunk.nats, chunk.counts.to(h.dtype)
        grad_logits = _logit_gradient(chunk, vocab_size, z_loss, label_smoothing)[:, : len(table)].to(h.dtype)
        del chunk  # it holds a tensor of the size of the logits
        products.mm(grad_logits, table, out=grad_chunks[i]).mul_(counts)
        h = h * counts  # multiplied instead of grad_logits, which is larger
        if len(grad_chunks) == 1 and products.fits(h.T, grad_logits.T):
            grad_weight.copy_(products.product(h.T, grad_logits.T).T)  # even so faster than grad_logits.T @ h
        elif grad_logits.dtype != grad_weight.dtype:
            chunk_grad = grad_logits.T @ h
            grad_weight.add_(chunk_grad) if i else grad_weight.copy_(chunk_grad)
        elif i:
            grad_weight.addmm_(grad_logits.T, h)  # needs no second tensor of this size
        else:
            torch.mm(grad_logits.T, h, out=grad_weight)
        del grad_logits  # so that the next chunk can use its memory
    return objective, nats, grad_hidden, grad_weight


def _empty_gradients(hidden: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty outputs with the shapes and dtypes of those of ``_gradients``."""
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
    """One chunk of R positions: its two sums, and the tensors from which the gradient of its logits is computed."""

    objective: Tensor
    nats: Tensor
    counts: Tensor  # (R,1), 0 for a target of -100, else 1
    target: Tensor  # (R,1), with 0 in place of -100
    probabilities: Tensor  # (R,V)
    log_z: Tensor  # (R,1), the logarithm of the sum of exp(logits)
    slope: Tensor | None  # (R,V), the derivative of the soft cap, or None without a cap


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
    """Compute one chunk: hidden (R,C), targets (R,). One (R,V) tensor holds first the logits, then the probabilities,
    and finally the gradient, because access to memory takes most of the time on a CPU."""
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
    """The gradient of the objective for the logits before the soft cap, (R,V). It overwrites the probabilities. It
    includes targets of -100: the caller multiplies by ``counts``."""
    grad = chunk.probabilities
    if z_loss:
        grad.mul_(1 + 2 * z_loss * chunk.log_z)
    grad.scatter_add_(1, chunk.target, torch.full_like(chunk.log_z, label_smoothing - 1))
    if label_smoothing:
        grad[:, :vocab_size] -= label_smoothing / vocab_size
    if chunk.slope is not None:
        grad.mul_(chunk.slope)
    return grad
