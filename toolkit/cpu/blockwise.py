"""Causal attention in blocks of queries: the fastest way to train on a CPU with short contexts.

Shapes: B batch, T tokens, H heads, G key/value heads, D head dim."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.cpu import switch
from toolkit.cpu.operation import operation

QUERIES = 64  # queries in a block; larger blocks compute more scores that the causal mask removes
KEPT = 2**25  # maximum size in bytes of the probabilities that a layer keeps for its backward pass


def fits(device: str, dtype: torch.dtype, batch: int, length: int, heads: int) -> bool:
    """Whether to use ``attention``: on a CPU, in float32 without autocast, with at most KEPT bytes of probabilities."""
    is_float32 = dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return switch.FAST and device == "cpu" and is_float32 and 4 * batch * heads * sum(_pairs(length)) <= KEPT


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v under the causal mask: q (B,T,H,D), k (B,T,G,D), v (B,T,G,Dv) -> (B,T,H,Dv).

    A block of queries is multiplied with all keys up to its last query's position, in one batched product for all
    heads. The probabilities are kept, so that the backward pass needs only four products per block; PyTorch's kernel
    computes the probabilities again."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) if x.shape[2] < q.shape[2] else x for x in (k, v))
    return _Blockwise.apply(q, k, v)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function = _operation if torch.compiler.is_compiling() else _forward
        out, *kept = function(q, k, v)
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        function = _operation_backward if torch.compiler.is_compiling() else _backward
        return function(grad, *ctx.saved_tensors)


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output (B,T,H,Dv) and what the backward pass needs: scaled queries, keys and values, all (B*H,T,D),
    and the probabilities of all blocks, one after the other in a flat tensor."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    causal_mask = q.new_full((QUERIES, QUERIES), -torch.inf).triu_(1)
    queries, keys, values = _heads_first(q) * q.shape[-1] ** -0.5, _heads_first(k), _heads_first(v)
    kept = q.new_empty(_probability_count(q))
    for start, end, weights in _blocks(queries, kept):
        torch.bmm(queries[:, start:end], keys[:, :end].mT, out=weights)
        weights[:, :, start:] += causal_mask[: end - start, : end - start]
        torch.softmax(weights, -1, out=weights)
        out[:, start:end] = _heads_last(torch.bmm(weights, values[:, :end]), q)
    return out, queries, keys, values, kept


def _backward(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each (B,T,H,D)."""
    dq, dk, dv = (torch.zeros_like(x) for x in (queries, keys, values))
    dout = _heads_first(grad)
    for start, end, weights in _blocks(queries, kept):
        dout_block = dout[:, start:end]
        dv[:, :end] += torch.bmm(weights.mT, dout_block)
        dweights = torch.bmm(dout_block, values[:, :end].mT)  # gradient of the weights; below, of the scores
        torch.ops.aten._softmax_backward_data(dweights, weights, -1, dweights.dtype, grad_input=dweights)
        dk[:, :end] += torch.bmm(dweights.mT, queries[:, start:end])
        dq[:, start:end] = torch.bmm(dweights, keys[:, :end]).mul_(keys.shape[-1] ** -0.5)
    return _heads_last(dq, grad), _heads_last(dk, grad), _heads_last(dv, grad)


def _blocks(queries: Tensor, kept: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, end, weights) for each block: it has the queries from start to end - 1, and its weights are a view
    (B*H, end - start, end) of ``kept``."""
    heads, length, _ = queries.shape
    sizes = [heads * pairs for pairs in _pairs(length)]
    for start, weights in zip(range(0, length, QUERIES), kept.split(sizes), strict=True):
        end = min(start + QUERIES, length)
        yield start, end, weights.view(heads, end - start, end)


def _pairs(length: int) -> list[int]:
    """The number of (query, key) pairs in each block."""
    ends = [min(start + QUERIES, length) for start in range(0, length, QUERIES)]
    return [(end - start) * end for start, end in zip(range(0, length, QUERIES), ends, strict=True)]


def _probability_count(q: Tensor) -> int:
    """The number of probabilities of all blocks and heads."""
    return q.shape[0] * q.shape[2] * sum(_pairs(q.shape[1]))


def _heads_first(x: Tensor) -> Tensor:
    """(B,T,H,D) -> (B*H,T,D), a copy."""
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _heads_last(x: Tensor, like: Tensor) -> Tensor:
    """(B*H,T,D) -> (B,T,H,D), a view."""
    return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def _fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Empty outputs with the shapes and strides of those of ``_forward``."""
    first = (torch.empty_like(_heads_first(x)).contiguous() for x in (q, k, v))
    return torch.empty_like(v, memory_format=torch.contiguous_format), *first, q.new_empty(_probability_count(q))


def _fake_backward(grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    """Empty outputs with the shapes and strides of those of ``_backward``."""
    return tuple(_heads_last(torch.empty_like(x), grad) for x in (queries, keys, values))


# The compiler calls these unchanged. Its own code would also store the scores, and free memory between the blocks.
_operation = operation("blockwise", _forward, _fake)
_operation_backward = operation("blockwise_backward", _backward, _fake_backward)
