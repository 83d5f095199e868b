"""Attention kernels: q (B,T,H,D), k (B,S,G,D), v (B,S,G,Dv) -> (B,T,H,Dv)."""

import importlib.util

import torch
import torch.nn.functional as F
from torch import nn

from toolkit.registry import register


@register("attention")
class MathAttention(nn.Module):
    """softmax(q k^T / sqrt(D) + bias) v, written out (Vaswani et al. 2017, arXiv:1706.03762, eq. 1). The readable
    reference: it holds all B*H*T*S scores, in float32."""

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int):
        super().__init__()

    def forward(self, q, k, v, mask=None):
        groups = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)  # (B,S,G,D) -> (B,S,H,D)
        scores = torch.einsum("bthd,bshd->bhts", q, k).float() * q.shape[-1] ** -0.5
        if mask is None:
            future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        else:
            scores = scores + mask.dense(scores.dtype)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1).to(v.dtype), v)


@register("attention")
class SDPA(nn.Module):
    """``torch.nn.functional.scaled_dot_product_attention``: PyTorch picks the kernel. Masks and biases are handed over
    as one dense (B|1,H|1,T,S) tensor, which rules out its flash kernel but honours everything."""

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int):
        super().__init__()

    def forward(self, q, k, v, mask=None):
        return _sdpa(q, k, v, None if mask is None else mask.dense(q.dtype))


@register("attention")
class FlashAttention(nn.Module):
    """Exact attention without the T x S matrix in memory (Dao 2023, arXiv:2307.08691): the flash-attn package where it
    is installed, on CUDA in half precision; everywhere else PyTorch's own fused kernels. Queries that start at an
    offset (decoding) go through PyTorch's with a mask. A score bias or document mask is refused: neither kernel takes
    one."""

    supports = {"offset", "gqa"}

    def __init__(self, n_head: int, head_dim: int):
        super().__init__()
        self.package = None
        if torch.cuda.is_available() and importlib.util.find_spec("flash_attn"):
            from flash_attn import flash_attn_func

            self.package = flash_attn_func

    def implementation(self, device: str, dtype: torch.dtype) -> str:
        """What runs for inputs on ``device`` in ``dtype``, in words, for the run's facts."""
        if self._packaged(device, dtype):
            return "flash-attn package"
        return "PyTorch fused SDPA" + (" (flash-attn is not installed)" if device == "cuda" else "")

    def forward(self, q, k, v, mask=None):
        if mask is None and self._packaged(q.device.type, q.dtype):
            return self.package(q, k, v, causal=True)
        return _sdpa(q, k, v, None if mask is None else mask.dense(q.dtype))

    def _packaged(self, device, dtype):
        return self.package is not None and device == "cuda" and dtype in (torch.float16, torch.bfloat16)


def _sdpa(q, k, v, dense):
    """(B,T,H,D) in and out; causal when ``dense`` is None. is_causal with T < S would align the first query with key 0,
    so it is used for T = S only, which plain causal attention always is."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))  # (B,T,H,D) -> (B,H,T,D)
    gqa = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=dense, is_causal=dense is None, enable_gqa=gqa)
    return out.transpose(1, 2)
