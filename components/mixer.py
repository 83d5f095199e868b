"""Mixers: x (B,T,C) -> (B,T,C), mixing over positions; they own the projections and the decoding cache."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import nn

from toolkit.linear import Linear, Merged
from toolkit.registry import register


@register("mixer")
class SelfAttention(nn.Module):
    """Multi-head self-attention around any attention kernel: merged q/k/v projection, heads, output projection
    (Vaswani et al. 2017, section 3.2.2). With n_kv_head < n_head several query heads share a key/value head
    (Ainslie et al. 2023, arXiv:2305.13245).

    ``qk_norm`` is a norm over the D channels of every head, one for q and one for k (Henry et al. 2020,
    arXiv:2010.04245; Dehghani et al. 2023, arXiv:2302.05442); None leaves q and k as they are. It comes before the
    rotation of the position part, as in Qwen3, or after it with ``qk_norm_after_rotation``, as in Hunyuan: for an RMS
    norm, only its gain tells the two orders apart. ``gate`` multiplies what the heads return by sigmoid(W_g x), element
    by element, before the output projection (Qiu et al. 2025, arXiv:2505.06708): C * C more weights."""

    def __init__(
        self,
        dim: int,
        n_head: int,
        n_kv_head: int,
        position: int,
        attention: type,
        depth: tuple,
        bias: bool = False,
        qk_norm: type | None = None,
        qk_norm_after_rotation: bool = False,
        gate: bool = False,
    ):
        super().__init__()
        if qk_norm_after_rotation and qk_norm is None:
            raise ValueError("SelfAttention.qk_norm_after_rotation moves a norm, and SelfAttention.qk_norm is None")
        self.head_dim, self.position, self.layer = dim // n_head, position, depth[0]
        self.attention, self.supports, self.cache = _kernel(attention, n_head, n_kv_head, self.head_dim)
        self.qkv = _merged_qkv(dim, self.head_dim, n_head, n_kv_head, bias)
        self.q_norm = self.k_norm = None
        if qk_norm is not None:
            self.q_norm, self.k_norm = qk_norm(self.head_dim), qk_norm(self.head_dim)
        self.norm_after_rotation = qk_norm_after_rotation
        self.gate = Linear(dim, dim, bias=bias) if gate else None
        self.out = _into_residual(dim, dim, bias)

    def forward(self, x, context):
        q, k, v = _heads(self.qkv, self.head_dim, x)
        if self.q_norm is not None and not self.norm_after_rotation:
            q, k = _norm(self.q_norm, self.qkv, q), _norm(self.k_norm, self.qkv, k)
        q, k = _rotate(q, k, self.position, context)
        if self.q_norm is not None and self.norm_after_rotation:
            q, k = _norm(self.q_norm, self.qkv, q), _norm(self.k_norm, self.qkv, k)
        k, v = _remember((k, v), self.layer, context)
        mixed = self.attention(q, k, v, context.mask(self.position, q.shape[1], k.shape[1])).flatten(2)  # (B, T, C)
        return self.out(mixed if self.gate is None else mixed * self.gate(x).sigmoid())

    def init_cache(self, batch, max_len):
        """Keys and values of all positions: two (batch, max_len, G, D)."""
        shape = (batch, max_len, self.qkv.merged["k"] // self.head_dim, self.head_dim)
        return _empty(self.qkv, shape, shape)


@register("mixer")
class ValueResidual(nn.Module):
    """Self-attention whose values are mixed with those of layer 0: v_l = (1 - share_l) v_l + share_l v_0 (Zhou et al.
    2024, arXiv:2410.17897: the learnable variant, here with weights that add up to 1). ``share`` is one number per
    layer, free to leave [0, 1], 0.5 at the start. Layer 0 has none: it hands its values on, so it has to be of this
    kind as well, and a list of mixers begins with this one. Layers in between may be of any kind."""

    def __init__(
        self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: tuple, bias: bool = False
    ):
        super().__init__()
        self.head_dim, self.position, self.layer = dim // n_head, position, depth[0]
        self.attention, self.supports, self.cache = _kernel(attention, n_head, n_kv_head, self.head_dim)
        self.qkv = _merged_qkv(dim, self.head_dim, n_head, n_kv_head, bias)
        self.share = nn.Parameter(torch.full((1,), 0.5)) if self.layer else None
        self.out = _into_residual(dim, dim, bias)

    def forward(self, x, context):
        q, k, v = _heads(self.qkv, self.head_dim, x)
        v = self._mix(v, context.shared)
        q, k = _rotate(q, k, self.position, context)
        k, v = _remember((k, v), self.layer, context)
        mixed = self.attention(q, k, v, context.mask(self.position, q.shape[1], k.shape[1]))  # (B, T, H, D)
        return self.out(mixed.flatten(2))

    def init_cache(self, batch, max_len):
        """Keys and mixed values of all positions: two (batch, max_len, G, D)."""
        shape = (batch, max_len, self.qkv.merged["k"] // self.head_dim, self.head_dim)
        return _empty(self.qkv, shape, shape)

    def _mix(self, v, shared):
        if self.share is None:
            shared["ValueResidual"] = v
            return v
        if "ValueResidual" not in shared:  # a layer can't see its siblings while it is built
            raise ValueError(
                f"ValueResidual in layer {self.layer} has no values of layer 0 to mix in, since that layer is another "
                "mixer: put @ValueResidual first in the list GPT.mixer"
            )
        return (v + self.share * (shared["ValueResidual"] - v)).to(v.dtype)


@register("mixer")
class DifferentialAttention(nn.Module):
    """The difference of two attention maps: (A_1 - lambda A_2) v, RMS norm over each head, times 1 - lambda_init (Ye et
    al. 2024, arXiv:2410.05258). Query heads h and H/2 + h are a pair, and so are key/value heads g and G/2 + g, whose
    values, side by side, are the 2D values of both maps: the matrices are those of self-attention. lambda is
    exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init with four learned vectors; lambda_init is 0.8 - 0.6 exp(-0.3 l),
    l = 0 for the first layer. Both heads of a pair are rotated; each has its own score bias. The norm has one gain
    (2D,) for all heads."""

    def __init__(
        self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: tuple, bias: bool = False
    ):
        super().__init__()
        for knob, heads in (("n_head", n_head), ("n_kv_head", n_kv_head)):
            if heads % 2:
                raise ValueError(
                    f"DifferentialAttention subtracts heads in pairs, and GPT.{knob} = {heads} is odd: make it even"
                )
        self.head_dim, self.position, self.layer = dim // n_head, position, depth[0]
        self.attention, self.supports, self.cache = _kernel(attention, n_head, n_kv_head, self.head_dim)
        self.qkv = _merged_qkv(dim, self.head_dim, n_head, n_kv_head, bias)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * self.layer)
        vectors = (nn.Parameter(0.1 * torch.randn(self.head_dim)) for _ in range(4))
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = vectors
        self.norm = nn.RMSNorm(2 * self.head_dim, eps=1e-5)
        self.out = _into_residual(dim, dim, bias)

    def forward(self, x, context):
        q, k, v = _heads(self.qkv, self.head_dim, x)
        q, k = _rotate(q, k, self.position, context)
        k, v = _remember((k, v), self.layer, context)
        mask = context.mask(self.position, q.shape[1], k.shape[1])
        # Two calls, one for each half of the values: fused kernels want values as wide as the keys.
        halves = [self.attention(q, k, torch.cat((half, half), dim=2), mask) for half in v.chunk(2, dim=2)]
        first, second = torch.cat(halves, dim=-1).chunk(2, dim=2)  # (B, T, H/2, 2D) under each map
        mixed = (first - self._lambda() * second).to(v.dtype)
        return self.out((_norm(self.norm, self.qkv, mixed) * (1 - self.lambda_init)).flatten(2))

    def init_cache(self, batch, max_len):
        """Keys and values of all positions: two (batch, max_len, G, D)."""
        shape = (batch, max_len, self.qkv.merged["k"] // self.head_dim, self.head_dim)
        return _empty(self.qkv, shape, shape)

    def _lambda(self):
        first, second = (self.lambda_q1 * self.lambda_k1).sum(), (self.lambda_q2 * self.lambda_k2).sum()
        return first.exp() - second.exp() + self.lambda_init


@register("mixer")
class LatentAttention(nn.Module):
    """Multi-head latent attention: keys and values come from one small vector per position (DeepSeek-AI 2024,
    arXiv:2405.04434, section 2.1). latent = RMS norm of W_d x; k_h = [W_k latent, r], v_h = W_v latent, with r = W_r x
    one rotated key for all heads; q_h = [W_q x, rotated W_s x]. The cache holds latent and r. A position part that
    rotates nothing leaves r an ordinary shared key. Widths, D being that of a head in GPT: the latent ``kv_rank``
    (None: 4D), ``nope_dim`` unrotated channels of q and k (None: D), ``rope_dim`` rotated ones (None: D/2, rounded up
    to an even number), values ``value_dim`` (None: D). ``q_rank`` gives the queries a latent too (None: from x)."""

    def __init__(
        self,
        dim: int,
        n_head: int,
        n_kv_head: int,
        position: int,
        attention: type,
        depth: tuple,
        kv_rank: Annotated[int, Gt(0)] | None = None,
        q_rank: Annotated[int, Gt(0)] | None = None,
        nope_dim: Annotated[int, Gt(0)] | None = None,
        rope_dim: Annotated[int, Gt(0)] | None = None,
        value_dim: Annotated[int, Gt(0)] | None = None,
    ):
        super().__init__()
        if n_kv_head != n_head:
            raise ValueError(f"LatentAttention makes keys for every query head: set GPT.n_kv_head = {n_head} or None")
        head_dim = dim // n_head
        kv_rank, self.nope_dim, self.value_dim = kv_rank or 4 * head_dim, nope_dim or head_dim, value_dim or head_dim
        self.rope_dim = rope_dim or 2 * math.ceil(head_dim / 4)
        if self.rope_dim % 2:
            raise ValueError(f"rotation turns pairs of channels: LatentAttention.rope_dim = {rope_dim} has to be even")
        self.n_head, self.position, self.layer = n_head, position, depth[0]
        key_dim = self.nope_dim + self.rope_dim
        self.attention, self.supports, self.cache = _kernel(attention, n_head, n_head, key_dim)
        self.q_down = Linear(dim, q_rank, bias=False) if q_rank else None
        self.q_norm = nn.RMSNorm(q_rank, eps=1e-6) if q_rank else None
        self.q_up = Linear(q_rank or dim, n_head * key_dim, bias=False)
        self.kv_down = Merged(dim, {"latent": kv_rank, "rotated_key": self.rope_dim})
        self.kv_norm = nn.RMSNorm(kv_rank, eps=1e-6)
        self.kv_up = Merged(kv_rank, {"k": n_head * self.nope_dim, "v": n_head * self.value_dim})
        self.out = _into_residual(n_head * self.value_dim, dim)

    def forward(self, x, context):
        low = x if self.q_down is None else _norm(self.q_norm, self.q_down, self.q_down(x))
        q, turned_q = self.q_up(low).unflatten(2, (self.n_head, -1)).split((self.nope_dim, self.rope_dim), dim=-1)
        latent, turned_k = self.kv_down.each(x)
        turned_q, turned_k = _rotate(turned_q, turned_k[:, :, None], self.position, context)  # (B, T, H | 1, rope_dim)
        latent = _norm(self.kv_norm, self.kv_down, latent)
        latent, turned_k = _remember((latent, turned_k), self.layer, context)
        k, v = (t.unflatten(2, (self.n_head, -1)) for t in self.kv_up.each(latent))  # (B, S, H, dim)
        k = torch.cat((k, turned_k.to(k.dtype).expand(-1, -1, self.n_head, -1)), dim=-1)
        q = torch.cat((q, turned_q.to(q.dtype)), dim=-1)
        mixed = self.attention(q, k, v, context.mask(self.position, q.shape[1], k.shape[1]))  # (B, T, H, value_dim)
        return self.out(mixed.flatten(2))

    def init_cache(self, batch, max_len):
        """Latents (batch, max_len, kv_rank) and rotated keys (batch, max_len, 1, rope_dim)."""
        rank = self.kv_down.merged["latent"]
        return _empty(self.kv_down, (batch, max_len, rank), (batch, max_len, 1, self.rope_dim))


@register("mixer")
class GatedLinearRecurrence(nn.Module):
    """A recurrence in place of attention: h_t = (1 - z_t) h_(t-1) + z_t c_t, element by element, with z = sigmoid(W_z
    x) and c = W_c x (minGRU: Feng et al. 2024, arXiv:2410.01201); the output is W_o (h * silu(W_g x)) (a gated branch
    as in Griffin: De et al. 2024, arXiv:2402.19427). The state is float32 and starts from zero in each document. All
    T states take log2(T) rounds of T * C multiplications, each of which keeps its terms for the backward pass. It needs
    no position part, and has no heads: where no other mixer uses GPT.n_kv_head, binding it is refused."""

    supports = {"offset", "documents"}
    ignores = ("attention", "position", "n_kv_head")

    def __init__(
        self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: tuple, bias: bool = False
    ):
        super().__init__()
        self.layer = depth[0]
        self.zcg = Merged(dim, {"z": dim, "c": dim, "g": dim}, bias)
        self.out = _into_residual(dim, dim, bias)

    def forward(self, x, context):
        projected = self.zcg.each(x)
        z, c, gate = (part.float() for part in projected)
        z = z.sigmoid()
        keep, h = 1 - z, z * c
        documents = _documents(context, x.shape[1], before=1)
        if documents is not None:
            keep = keep * (documents[:, 1:] == documents[:, :-1])[:, :, None]
        if context.cache is not None:
            (state,) = context.cache[self.layer]
            past = keep[:, 0] * state * (context.start > 0)  # a cache may be used again from the start
            h = torch.cat((h[:, :1] + past[:, None], h[:, 1:]), dim=1)
        shift = 1
        while shift < x.shape[1]:  # h and keep of a position now reach over the last ``shift`` positions: double that
            earlier_h, earlier_keep = (F.pad(t, (0, 0, shift, -shift)) for t in (h, keep))
            h, keep, shift = h + keep * earlier_h, keep * earlier_keep, 2 * shift
        if context.cache is not None:
            state.copy_(h[:, -1])
        return self.out((h * F.silu(gate)).to(projected[0].dtype))

    def init_cache(self, batch, max_len):
        """The state: one (batch, C), whatever the length."""
        weight = self.out.weight
        return (torch.zeros(batch, weight.shape[1], device=weight.device),)


@register("mixer")
class ShortConvolution(nn.Module):
    """A gated convolution over the last ``width`` positions: W_o (c * conv(b * u)) with b, c and u projections of x and
    one causal filter per channel (Hyena's gating, Poli et al. 2023, arXiv:2302.10866, with short filters throughout, as
    in LFM2). A document sees zeros before its start. It needs no position part, and has no heads: where no other mixer
    uses GPT.n_kv_head, binding it is refused."""

    supports = {"offset", "documents"}
    ignores = ("attention", "position", "n_kv_head")

    def __init__(
        self,
        dim: int,
        n_head: int,
        n_kv_head: int,
        position: int,
        attention: type,
        depth: tuple,
        width: Annotated[int, Gt(0)] = 4,
    ):
        super().__init__()
        self.layer, self.width = depth[0], width
        self.bcu = Merged(dim, {"b": dim, "c": dim, "u": dim})
        self.conv = nn.Conv1d(dim, dim, width, groups=dim, bias=False)
        self.out = _into_residual(dim, dim)

    def forward(self, x, context):
        length, before = x.shape[1], self.width - 1
        b, c, u = self.bcu.each(x)
        inputs = F.pad(b * u, (0, 0, before, 0))  # (B, width - 1 + T, C)
        if context.cache is not None:
            (past,) = context.cache[self.layer]
            inputs = torch.cat((past * (context.start > 0), inputs[:, before:].to(past.dtype)), dim=1)
            past.copy_(inputs[:, length:])
        documents, mixed = _documents(context, length, before), 0
        for tap, weight in enumerate(self.conv.weight.unbind(-1)):  # (C, 1) each, the last one for the position itself
            shifted = inputs[:, tap : tap + length]
            if documents is not None:
                shifted = shifted * (documents[:, tap : tap + length] == documents[:, before:])[:, :, None]
            mixed = mixed + weight[:, 0] * shifted
        return self.out(c * mixed.to(c.dtype))

    def init_cache(self, batch, max_len):
        """The last inputs of the convolution: one (batch, width - 1, C)."""
        return _empty(self.bcu, (batch, self.width - 1, self.out.weight.shape[1]))


def _kernel(attention, n_head, n_kv_head, head_dim):
    """The kernel, what a mixer around it supports, and whether it can decode with a cache: a kernel without offsets
    can't, and generation recomputes."""
    kernel = attention(n_head, head_dim)
    supports = getattr(kernel, "supports", set())
    if n_kv_head < n_head and "gqa" not in supports:
        name = type(kernel).__name__
        raise ValueError(f"{name} needs as many key/value heads as query heads: set GPT.n_kv_head = {n_head}")
    return kernel, supports, "offset" in supports


def _merged_qkv(dim, head_dim, n_head, n_kv_head, bias):
    return Merged(dim, {"q": n_head * head_dim, "k": n_kv_head * head_dim, "v": n_kv_head * head_dim}, bias)


def _into_residual(inner, dim, bias=False):
    linear = Linear(inner, dim, bias=bias)
    linear.residual = True
    return linear


def _heads(qkv, head_dim, x):
    """q (B,T,H,D), k (B,T,G,D), v (B,T,G,D)."""
    heads = qkv(x).view(*x.shape[:2], -1, head_dim)  # (B, T, H + 2G, D)
    return heads.split_with_sizes([rows // head_dim for rows in qkv.merged.values()], dim=2)


def _norm(norm, linear, x):
    """The norm of what ``linear`` yields, computed in the dtype of the weights: float32 under autocast."""
    return norm(x.to(linear.weight.dtype)).to(x.dtype)


def _rotate(q, k, index, context):
    position = context.position[index]
    return position.rotate(q, k, context.positions) if hasattr(position, "rotate") else (q, k)


def _empty(linear, *shapes):
    """Cache tensors in the dtype that ``linear`` yields, on its device. Those of heads, (B, S, G, D), lie in memory as
    (B, G, S, D): a head's positions side by side, as attention reads them."""
    device = linear.weight.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else linear.weight.dtype
    zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
    return tuple(t if t.ndim < 4 else t.transpose(1, 2).contiguous().transpose(1, 2) for t in zeros)


def _remember(fresh, layer, context):
    """Write tensors (B, T, ...) into this layer's cache at ``context.start``, and return the cache (B, S, ...) in their
    dtypes, up to ``context.end`` where that is known, else whole; without a cache, the tensors as they are."""
    if context.cache is None:
        return fresh
    length, end = fresh[0].shape[1], context.end
    slots = context.start + torch.arange(length, device=fresh[0].device) if end is None else None
    for kept, new in zip(context.cache[layer], fresh, strict=True):
        if end is None:
            kept.index_copy_(1, slots, new.to(kept.dtype))
        else:
            kept[:, end - length : end] = new
    return tuple(kept[:, :end].to(new.dtype) for kept, new in zip(context.cache[layer], fresh, strict=True))


def _documents(context, length, before):
    """Document ids (B, before + T) of the tokens and of ``before`` positions ahead of them, where position 0 stands for
    those that don't exist; None without documents."""
    if context.documents is None:
        return None
    start = 0 if context.start is None else context.start
    at = start + torch.arange(-before, length, device=context.documents.device)
    return context.documents.index_select(1, at.clamp(min=0))
