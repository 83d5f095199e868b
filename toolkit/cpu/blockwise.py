"""Causal attention as products over blocks of queries: what trains fastest on a CPU at short contexts."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.cpu.operation import operation

QUERIES = 64  # of a block: more would compute more of the scores that the causal mask throws away
KEPT = 2**25  # bytes of probabilities that a layer may keep for its backward pass


def fits(device: str, dtype: torch.dtype, batch: int, length: int, heads: int) -> bool:
    """Whether it pays: on a CPU, in float32 and nothing but that, where the probabilities of a layer stay small."""
    single = dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return device == "cpu" and single and 4 * batch * heads * sum(_pairs(length)) <= KEPT


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v under the causal mask: q (B,T,H,D), k (B,T,G,D), v (B,T,G,Dv) -> (B,T,H,Dv).

    A block of queries meets the keys up to its own last one, in one batched product for all heads. The probabilities
    are kept, so that the backward pass takes four products a block, where PyTorch's kernel computes them again."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) if x.shape[2] < q.shape[2] else x for x in (k, v))
    return _Blockwise.apply(q, k, v)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        take = _operation if torch.compiler.is_compiling() else _forward
        out, *kept = take(q, k, v)
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        take = _operation_backward if torch.compiler.is_compiling() else _backward
        return take(grad, *ctx.saved_tensors)


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The mix, and what the backward pass needs: queries, keys and values (B*H,T,D), the queries scaled, and the
    probabilities, block after block in one row."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    later = q.new_full((QUERIES, QUERIES), -torch.inf).triu_(1)
    queries, keys, values = _heads_first(q) * q.shape[-1] ** -0.5, _heads_first(k), _heads_first(v)
    kept = q.new_empty(_places(q))
    for start, end, weights in _blocks(queries, kept):
        torch.bmm(queries[:, start:end], keys[:, :end].mT, out=weights)
        weights[:, :, start:] += later[: end - start, : end - start]
        torch.softmax(weights, -1, out=weights)
        out[:, start:end] = _heads_last(torch.bmm(weights, values[:, :end]), q)
    return out, queries, keys, values, kept


def _backward(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v (B,T,H,D)."""
    dq, dk, dv = (torch.zeros_like(x) for x in (queries, keys, values))
    grads = _heads_first(grad)
    for start, end, weights in _blocks(queries, kept):
        block = grads[:, start:end]
        dv[:, :end] += torch.bmm(weights.mT, block)
        slope = torch.bmm(block, values[:, :end].mT)  # of the weights, then of the scores
        torch.ops.aten._softmax_backward_data(slope, weights, -1, slope.dtype, grad_input=slope)
        dk[:, :end] += torch.bmm(slope.mT, queries[:, start:end])
        dq[:, start:end] = torch.bmm(slope, keys[:, :end]).mul_(keys.shape[-1] ** -0.5)
    return tuple(_heads_last(x, grad) for x in (dq, dk, dv))


def _blocks(queries, kept):
    """Per block its first query, the one after its last, and its probabilities (B*H, size, keys) out of ``kept``."""
    heads, length, _ = queries.shape
    sizes = [heads * pairs for pairs in _pairs(length)]
    for start, weights in zip(range(0, length, QUERIES), kept.split(sizes), strict=True):
        end = min(start + QUERIES, length)
        yield start, end, weights.view(heads, end - start, end)


def _pairs(length):
    """How many pairs of a query and a key each block has."""
    ends = [min(start + QUERIES, length) for start in range(0, length, QUERIES)]
    return [(end - start) * end for start, end in zip(range(0, length, QUERIES), ends, strict=True)]


def _places(q):
    return q.shape[0] * q.shape[2] * sum(_pairs(q.shape[1]))


def _heads_first(x):
    """(B,T,H,D) -> (B*H,T,D), a copy."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _heads_last(x, like):
    """(B*H,T,D) -> (B,T,H,D), a view."""
    return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def _fake(q, k, v):
    first = (torch.empty_like(_heads_first(x)).contiguous() for x in (q, k, v))
    return torch.empty_like(v, memory_format=torch.contiguous_format), *first, q.new_empty(_places(q))


def _fake_backward(grad, queries, keys, values, kept):
    return tuple(_heads_last(torch.empty_like(x), grad) for x in (queries, keys, values))


# A compiler would keep each block's scores beside its probabilities, and hand back memory between them.
_operation = operation("blockwise", _forward, _fake)
_operation_backward = operation("blockwise_backward", _backward, _fake_backward)
