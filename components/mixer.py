"""Mixers: x (B,T,C) -> (B,T,C), mixing over positions; they own the projections and the decoding cache."""

import torch
from torch import nn

from toolkit.registry import register


@register("mixer")
class SelfAttention(nn.Module):
    """Multi-head self-attention around any attention kernel: merged q/k/v projection, heads, output projection
    (Vaswani et al. 2017, section 3.2.2). With n_kv_head < n_head several query heads share a key/value head
    (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(
        self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: tuple, bias: bool = False
    ):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, dim // n_head
        self.position, self.layer = position, depth[0]
        self.attention = attention(n_head, self.head_dim)
        self.supports = getattr(self.attention, "supports", set())
        self.cache = "offset" in self.supports  # without it, generation recomputes
        if n_kv_head < n_head and "gqa" not in self.supports:
            name = type(self.attention).__name__
            raise ValueError(f"{name} needs as many key/value heads as query heads: set GPT.n_kv_head = {n_head}")
        self.qkv = nn.Linear(dim, (n_head + 2 * n_kv_head) * self.head_dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.out.residual = True

    def forward(self, x, context):
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.head_dim)  # (B, T, H + 2G, D)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        position = context.position[self.position]
        if hasattr(position, "rotate"):
            q, k = position.rotate(q, k, context.positions)
        if context.cache is not None:
            k, v = self._remember(context, k, v)
        mixed = self.attention(q, k, v, context.mask(self.position, length, k.shape[1]))  # (B, T, H, D)
        return self.out(mixed.flatten(2))

    def init_cache(self, batch, max_len):
        """Keys and values of all positions: two (batch, max_len, G, D), in the dtype that the projections yield."""
        device = self.qkv.weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.qkv.weight.dtype
        shape = (batch, max_len, self.n_kv_head, self.head_dim)
        return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)

    def _remember(self, context, k, v):
        keys, values = context.cache[self.layer]
        slots = context.start + torch.arange(k.shape[1], device=k.device)
        keys.index_copy_(1, slots, k.to(keys.dtype))
        values.index_copy_(1, slots, v.to(values.dtype))
        return keys.to(k.dtype), values.to(v.dtype)
