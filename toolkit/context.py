"""What travels beside the activations: Mask (which scores count) and Context (one per forward pass)."""

from __future__ import annotations

import torch
from torch import Tensor


class Mask:
    """What an attention kernel has to respect beyond plain causality.

    start      int64 tensor (), the position of query 0; keys start at position 0
    documents  (B, S) int ids, one per key, or None; queries are the slice from ``start``
    bias       (H, T, S) float, added to the scaled scores, or None
    open       nothing is forbidden and nothing added: the one query is that of the last key
    """

    def __init__(
        self, start: Tensor, queries: int, keys: int, documents: Tensor | None, bias: Tensor | None, open=False
    ):
        self.start, self.queries, self.keys = start, queries, keys
        self.documents, self.bias, self.open = documents, bias, open

    def allowed(self) -> Tensor:
        """(B|1, 1, T, S) bool: True where the query may look at the key."""
        device = self.start.device
        q = self.start + torch.arange(self.queries, device=device)  # (T,)
        seen = q[:, None] >= torch.arange(self.keys, device=device)  # (T, S)
        if self.documents is None:
            return seen[None, None]
        same = self.documents.index_select(1, q)[:, :, None] == self.documents[:, None, :]  # (B, T, S)
        return (seen & same)[:, None]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(B|1, H|1, T, S): everything in one tensor to add to the scaled scores, -inf where not allowed."""
        allowed = self.allowed()
        base = torch.zeros((), dtype=dtype, device=allowed.device) if self.bias is None else self.bias.to(dtype)
        return torch.where(allowed, base, -torch.inf)


class Context:
    """One forward pass: made by the model's caller, filled by the model, read and written by the parts.

    positions  (B|1, T) int64, where each token stands         documents  (B, S) int64 ids, or None
    position   the position parts, one per distinct class      bias       their score biases (H, T, S), or None each
    cache      per layer what init_cache returned, or None     start      int64 tensor (): tokens already in the cache
    end        start + T as an int, where the caller knows it: attention then reads no further into the cache
    losses     name -> scalar, added to the objective          metrics    name -> scalar, logged
    shared     values handed from layer to layer; only the part that wrote a key reads it

    A plain class on purpose: FSDP2 copies dataclasses and dicts once they hold tensors with gradients, and an
    auxiliary loss would vanish without a word.
    """

    def __init__(self, positions=None, documents=None, cache=None, start=None, end=None):
        self.positions, self.documents, self.cache, self.start, self.end = positions, documents, cache, start, end
        self.position, self.bias = [], []
        self.losses, self.metrics, self.shared = {}, {}, {}

    def mask(self, index: int, queries: int, keys: int) -> Mask | None:
        """The mask for position part ``index``, or None when plain causal attention is all there is to do."""
        if self.cache is None and self.documents is None and self.bias[index] is None:
            return None
        start = self.start if self.start is not None else torch.zeros((), dtype=torch.int64, device=self._device())
        documents, bias = self.documents, self.bias[index]
        documents = None if documents is None else documents[:, :keys]
        bias = None if bias is None else bias[..., :keys]  # it was computed for the whole cache
        plain = documents is None and bias is None
        return Mask(start, queries, keys, documents, bias, plain and queries == 1 and keys == self.end)

    def _device(self):
        return self.positions.device
