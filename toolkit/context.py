"""Inputs of the layers besides the activations: Context (one per forward pass) and Mask (for attention kernels).

Shapes: B batch, T queries, S keys, H heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Caches = list[tuple[Tensor, ...]]  # for each layer, the result of its mixer's init_cache


class Mask:
    """What an attention kernel must apply in addition to a plain causal mask.

    start      int64 tensor (), the position of query 0; key 0 is at position 0
    queries    T
    keys       S
    documents  (B, S) int, the document id of each key, or None. The id of query t is that of position ``start`` + t
    bias       (H, T, S) float, added to the scaled scores, or None
    open       True if every key is allowed and nothing is added: there is only one query, at the last key's position,
               and there are no documents and no bias
    """

    def __init__(
        self, start: Tensor, queries: int, keys: int, documents: Tensor | None, bias: Tensor | None, open: bool = False
    ):
        self.start, self.queries, self.keys = start, queries, keys
        self.documents, self.bias, self.open = documents, bias, open

    def allowed(self) -> Tensor:
        """(B|1, 1, T, S) bool: True where a query may attend to a key."""
        device = self.start.device
        query = self.start + torch.arange(self.queries, device=device)  # (T,)
        causal = query[:, None] >= torch.arange(self.keys, device=device)  # (T, S)
        if self.documents is None:
            return causal[None, None]
        same = self.documents.index_select(1, query)[:, :, None] == self.documents[:, None, :]  # (B, T, S)
        return (causal & same)[:, None]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(B|1, H|1, T, S), a tensor to add to the scaled scores: the bias (or 0) where allowed, -inf elsewhere."""
        allowed = self.allowed()
        base = torch.zeros((), dtype=dtype, device=allowed.device) if self.bias is None else self.bias.to(dtype)
        return torch.where(allowed, base, -torch.inf)


class Context:
    """The state of one forward pass. The model's caller creates it, the model fills it, and parts read and write it.

    positions  (B|1, T) int64, the position of each token
    position   the position parts, one per distinct class
    bias       for each of these parts, its score bias (H, T, S) or None
    documents  (B, S) int64, the document id of each token, or None
    cache      for each layer, the result of its mixer's init_cache; or None
    start      int64 tensor (), the number of tokens already in the cache
    end        start + T as an int, if the caller knows it; attention then reads only the positions before it
    losses     name -> scalar, added to the objective
    metrics    name -> scalar, logged
    shared     values that a part passes to parts of the same class in later layers; each class uses keys of its own

    This is a plain class on purpose: FSDP2 copies dataclasses and dicts that hold tensors with gradients, so an
    auxiliary loss that a layer adds would be lost without an error.
    """

    def __init__(
        self,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Caches | None = None,
        start: Tensor | None = None,
        end: int | None = None,
    ):
        self.positions, self.documents, self.cache, self.start, self.end = positions, documents, cache, start, end
        self.position: list[Any] = []  # typed Any, because the methods of position parts are optional
        self.bias: list[Tensor | None] = []
        self.losses: dict[str, Tensor] = {}
        self.metrics: dict[str, Tensor] = {}
        self.shared: dict[str, Any] = {}

    def mask(self, index: int, queries: int, keys: int) -> Mask | None:
        """The mask for a layer that uses position part ``index``, or None if the plain causal mask is enough."""
        if self.cache is None and self.documents is None and self.bias[index] is None:
            return None
        start = self.start
        if start is None:
            assert self.positions is not None, "the model sets positions first"
            start = torch.zeros((), dtype=torch.int64, device=self.positions.device)
        documents, bias = self.documents, self.bias[index]
        documents = None if documents is None else documents[:, :keys]
        bias = None if bias is None else bias[..., :keys]  # the bias covers the whole cache
        plain = documents is None and bias is None
        return Mask(start, queries, keys, documents, bias, plain and queries == 1 and keys == self.end)
