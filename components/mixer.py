"""Mixers: x (B,T,C) -> (B,T,C), the only part of a layer that mixes positions. They own the projections (W_q, W_k, ...)
and the decoding cache, which keeps the keys and values of earlier tokens during generation.

Shapes: B batch, T queries, S keys (S = T without a cache), C model dim, H query heads, G key/value heads, D = C / H."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn

from toolkit.cache import empty_cache, update_cache
from toolkit.context import Context
from toolkit.linear import Linear, Merged
from toolkit.registry import register

Depth = tuple[int, int]  # (index of the layer, number of layers)


@register("mixer")
class SelfAttention(nn.Module):
    """Multi-head self-attention with any attention kernel (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2).

        q, k, v = W_q x, W_k x, W_v x, split into heads;    y = W_o concat_h attention(q_h, k_h, v_h)

    GPT.n_kv_head < GPT.n_head is grouped-query attention: several query heads share a key/value head (Ainslie et al.
    2023, arXiv:2305.13245).

    bias                     add a bias to the four projections
    qk_norm                  a norm over the D channels of each head, one for q and one for k, such as @RMSNorm; None:
                             no norm (Henry et al. 2020, arXiv:2010.04245; Dehghani et al. 2023, arXiv:2302.05442)
    qk_norm_after_rotation   apply this norm after the position part has rotated q and k, as in Hunyuan, and not before,
                             as in Qwen3; for an RMS norm only its gain makes a difference
    gate                     multiply the concatenated heads by sigmoid(W_g x), with W_g (C,C) (Qiu et al. 2025,
                             arXiv:2505.06708)
    head_dim                 D, the channels of a head; None: C / H. Qwen3 and Gemma have wider heads
    """

    def __init__(
        self,
        dim: int,
        n_head: int,
        n_kv_head: int,
        position: int,
        attention: type,
        depth: Depth,
        bias: bool = False,
        qk_norm: type | None = None,
        qk_norm_after_rotation: bool = False,
        gate: bool = False,
        head_dim: Annotated[int, Gt(0)] | None = None,
    ):
        super().__init__()
        if qk_norm_after_rotation and qk_norm is None:
            raise ValueError(
                "SelfAttention.qk_norm_after_rotation: SelfAttention.qk_norm is None; set it to @RMSNorm, say"
            )
        self.head_dim, self.position, self.layer = head_dim or dim // n_head, position, depth[0]
        self.attention, self.supports, self.cache = _build_kernel(attention, n_head, n_kv_head, self.head_dim)
        self.qkv = _merged_qkv(dim, self.head_dim, n_head, n_kv_head, bias)
        self.q_norm = None if qk_norm is None else qk_norm(self.head_dim)
        self.k_norm = None if qk_norm is None else qk_norm(self.head_dim)
        self.norm_after_rotation = qk_norm_after_rotation
        self.gate = Linear(dim, n_head * self.head_dim, bias=bias) if gate else None
        self.out = _residual_projection(n_head * self.head_dim, dim, bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        q, k, v = _split_heads(self.qkv, self.head_dim, x)
        if not self.norm_after_rotation:
            q, k = self._norm_qk(q, k)
        q, k = _rotate(q, k, self.position, context)
        if self.norm_after_rotation:
            q, k = self._norm_qk(q, k)
        k, v = update_cache(context, self.layer, k, v)
        mixed = self.attention(q, k, v, context.mask(self.position, q.shape[1], k.shape[1])).flatten(2)  # (B,T,HD)
        return self.out(mixed if self.gate is None else mixed * self.gate(x).sigmoid())

    def _norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return _apply_norm(self.q_norm, self.qkv, q), _apply_norm(self.k_norm, self.qkv, k)

    def init_cache(self, batch: int, max_len: int) -> tuple[Tensor, ...]:
        """Keys and values of all positions: two (batch, max_len, G, D)."""
        return _empty_kv_cache(self.qkv, self.head_dim, batch, max_len)


@register("mixer")
class ValueResidual(nn.Module):
    """Self-attention whose values are mixed with those of layer 0, v_l = (1 - share_l) v_l + share_l v_0 (Zhou et al.
    2024, arXiv:2410.17897).

    share_l is one learned number per layer. It starts at 0.5, and may leave [0, 1]. This is the paper's learnable
    variant, but with weights that add up to 1. Layer 0 provides v_0 and has no share, so it must be this mixer too: put
    it first in a list of mixers. The layers between may have any mixer. ``bias`` adds a bias to the four
    projections."""

    def __init__(
        self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: Depth, bias: bool = False
    ):
        super().__init__()
        self.head_dim, self.position, self.layer = dim // n_head, position, depth[0]
        self.attention, self.supports, self.cache = _build_kernel(attention, n_head, n_kv_head, self.head_dim)
        self.qkv = _merged_qkv(dim, self.head_dim, n_head, n_kv_head, bias)
        self.share = nn.Parameter(torch.full((1,), 0.5)) if self.layer else None
        self.out = _residual_projection(dim, dim, bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        q, k, v = _split_heads(self.qkv, self.head_dim, x)
        v = self._mix(v, context.shared)
        q, k = _rotate(q, k, self.position, context)
        k, v = update_cache(context, self.layer, k, v)
        mixed = self.attention(q, k, v, context.mask(self.position, q.shape[1], k.shape[1]))  # (B,T,H,D)
        return self.out(mixed.flatten(2))

    def init_cache(self, batch: int, max_len: int) -> tuple[Tensor, ...]:
        """Keys and mixed values of all positions: two (batch, max_len, G, D)."""
        return _empty_kv_cache(self.qkv, self.head_dim, batch, max_len)

    def _mix(self, v: Tensor, shared: dict[str, Tensor]) -> Tensor:
        """Mix in the values of layer 0, (B,T,G,D); layer 0 stores its own in ``shared``."""
        if self.share is None:
            shared["ValueResidual"] = v
            return v
        if "ValueResidual" not in shared:  # not known earlier: a layer is built without the others
            raise ValueError(
                f"ValueResidual in layer {self.layer} needs the values of layer 0, but that layer has another mixer; "
                "put @ValueResidual first in the list GPT.mixer"
            )
        return (v + self.share * (shared["ValueResidual"] - v)).to(v.dtype)


@register("mixer")
class DifferentialAttention(nn.Module):
    """The difference of two attention maps, (A_1 - lambda A_2) v, for each pair of heads (Ye et al. 2024,
    arXiv:2410.05258).

        y = W_o concat((1 - lambda_init) RMSNorm((A_1 - lambda A_2) v))
        lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init,    lambda_init = 0.8 - 0.6 exp(-0.3 l)

    A_1 and A_2 are the attention weights of the two heads of a pair, l_q1 to l_k2 are four learned vectors (D,), and l
    = 0, 1, ... is the layer. Query heads h and H/2 + h form a pair. So do key/value heads g and G/2 + g, whose values,
    side by side, are the values v (2D wide) of both maps: the matrices are as large as in self-attention. Each head is
    rotated and has its own score bias. The norm has one gain (2D,) for all pairs. ``bias`` adds a bias to the four
    projections."""

    def __init__(
        self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: Depth, bias: bool = False
    ):
        super().__init__()
        for knob, heads in (("n_head", n_head), ("n_kv_head", n_kv_head)):
            if heads % 2:
                raise ValueError(
                    f"DifferentialAttention needs pairs of heads, but GPT.{knob} = {heads} is odd: make it even"
                )
        self.head_dim, self.position, self.layer = dim // n_head, position, depth[0]
        self.attention, self.supports, self.cache = _build_kernel(attention, n_head, n_kv_head, self.head_dim)
        self.qkv = _merged_qkv(dim, self.head_dim, n_head, n_kv_head, bias)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * self.layer)
        vectors = (nn.Parameter(0.1 * torch.randn(self.head_dim)) for _ in range(4))
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = vectors
        self.norm = nn.RMSNorm(2 * self.head_dim, eps=1e-5)
        self.out = _residual_projection(dim, dim, bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        q, k, v = _split_heads(self.qkv, self.head_dim, x)
        q, k = _rotate(q, k, self.position, context)
        k, v = update_cache(context, self.layer, k, v)
        mask = context.mask(self.position, q.shape[1], k.shape[1])
        # Two calls, one for each half of the values, since fused kernels need values as wide as the keys.
        halves = [self.attention(q, k, torch.cat((half, half), dim=2), mask) for half in v.chunk(2, dim=2)]
        first, second = torch.cat(halves, dim=-1).chunk(2, dim=2)  # A_1 v, A_2 v: (B,T,H/2,2D)
        mixed = (first - self._lambda() * second).to(v.dtype)
        return self.out((_apply_norm(self.norm, self.qkv, mixed) * (1 - self.lambda_init)).flatten(2))

    def init_cache(self, batch: int, max_len: int) -> tuple[Tensor, ...]:
        """Keys and values of all positions: two (batch, max_len, G, D)."""
        return _empty_kv_cache(self.qkv, self.head_dim, batch, max_len)

    def _lambda(self) -> Tensor:
        first, second = (self.lambda_q1 * self.lambda_k1).sum(), (self.lambda_q2 * self.lambda_k2).sum()
        return first.exp() - second.exp() + self.lambda_init


@register("mixer")
class LatentAttention(nn.Module):
    """Multi-head latent attention (MLA), which computes keys and values from one small vector per position, the latent
    (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1). For head h,

        latent = RMSNorm(W_d x),    r = rotate(W_r x)
        q_h = [W_q x, rotate(W_s x)],    k_h = [W_k latent, r],    v_h = W_v latent

    where [a, b] concatenates channels. W_q, W_s, W_k and W_v differ between heads, but all heads share r. If the
    position part rotates nothing, r is not rotated. The cache holds only latent and r. With D = GPT.dim / GPT.n_head:

    kv_rank     width of the latent; None: 4D
    q_rank      compute the queries from a normed latent of this width as well; None: from x
    nope_dim    channels of q_h and k_h that are not rotated; None: D
    rope_dim    channels of q_h and k_h that are rotated; None: D/2, rounded up to an even number
    value_dim   channels of v_h; None: D"""

    def __init__(
        self,
        dim: int,
        n_head: int,
        n_kv_head: int,
        position: int,
        attention: type,
        depth: Depth,
        kv_rank: Annotated[int, Gt(0)] | None = None,
        q_rank: Annotated[int, Gt(0)] | None = None,
        nope_dim: Annotated[int, Gt(0)] | None = None,
        rope_dim: Annotated[int, Gt(0)] | None = None,
        value_dim: Annotated[int, Gt(0)] | None = None,
    ):
        super().__init__()
        if n_kv_head != n_head:
            raise ValueError(f"LatentAttention has a key for every query head: set GPT.n_kv_head = {n_head} or None")
        head_dim = dim // n_head
        kv_rank, self.nope_dim, self.value_dim = kv_rank or 4 * head_dim, nope_dim or head_dim, value_dim or head_dim
        self.rope_dim = rope_dim or 2 * math.ceil(head_dim / 4)
        if self.rope_dim % 2:
            raise ValueError(f"LatentAttention.rope_dim = {rope_dim} must be even: rotation works on pairs of channels")
        self.n_head, self.position, self.layer, key_dim = n_head, position, depth[0], self.nope_dim + self.rope_dim
        self.attention, self.supports, self.cache = _build_kernel(attention, n_head, n_head, key_dim)
        self.q_down = Linear(dim, q_rank, bias=False) if q_rank else None
        self.q_norm = nn.RMSNorm(q_rank, eps=1e-6) if q_rank else nn.Identity()
        self.q_up = Linear(q_rank or dim, n_head * key_dim, bias=False)
        self.kv_down = Merged(dim, {"latent": kv_rank, "rotated_key": self.rope_dim})
        self.kv_norm = nn.RMSNorm(kv_rank, eps=1e-6)
        self.kv_up = Merged(kv_rank, {"k": n_head * self.nope_dim, "v": n_head * self.value_dim})
        self.out = _residual_projection(n_head * self.value_dim, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        q_latent = x if self.q_down is None else _apply_norm(self.q_norm, self.q_down, self.q_down(x))
        heads = self.q_up(q_latent).unflatten(2, (self.n_head, -1))  # (B,T,H,nope_dim+rope_dim)
        q, rotated_q = heads.split((self.nope_dim, self.rope_dim), dim=-1)
        new_latent, rotated_k = self.kv_down.each(x)
        rotated_q, rotated_k = _rotate(rotated_q, rotated_k[:, :, None], self.position, context)  # (B,T,H|1,rope_dim)
        new_latent = _apply_norm(self.kv_norm, self.kv_down, new_latent)
        latent, rotated_k = update_cache(context, self.layer, new_latent, rotated_k)  # (B,S,kv_rank), (B,S,1,rope_dim)
        k, v = (t.unflatten(2, (self.n_head, -1)) for t in self.kv_up.each(latent))  # (B,S,H,nope_dim|value_dim)
        k = torch.cat((k, rotated_k.to(k.dtype).expand(-1, -1, self.n_head, -1)), dim=-1)
        q = torch.cat((q, rotated_q.to(q.dtype)), dim=-1)
        mixed = self.attention(q, k, v, context.mask(self.position, q.shape[1], k.shape[1]))  # (B,T,H,value_dim)
        return self.out(mixed.flatten(2))

    def init_cache(self, batch: int, max_len: int) -> tuple[Tensor, ...]:
        """Latents (batch, max_len, kv_rank) and shared keys r (batch, max_len, 1, rope_dim)."""
        shapes = (batch, max_len, self.kv_down.merged["latent"]), (batch, max_len, 1, self.rope_dim)
        return empty_cache(self.kv_down, *shapes)


@register("mixer")
class GatedLinearRecurrence(nn.Module):
    """A linear recurrence with gates instead of attention, h_t = (1 - z_t) h_(t-1) + z_t c_t (minGRU: Feng et al. 2024,
    arXiv:2410.01201).

        z = sigmoid(W_z x),    c = W_c x,    y = W_o (h * silu(W_g x))

    The products are per channel, except those with the matrices W. The output gate silu(W_g x) is that of Griffin (De
    et al. 2024, arXiv:2402.19427). h is float32 and restarts from 0 in each document. All T states are computed
    together in log2(T) rounds of T * C multiplications; the backward pass keeps the tensors of each round. It needs no
    position part. It has no heads, so binding GPT.n_kv_head is an error unless another mixer uses it. ``bias`` adds a
    bias to the projections."""

    supports = {"offset", "documents"}
    ignores = ("attention", "position", "n_kv_head")

    def __init__(
        self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: Depth, bias: bool = False
    ):
        super().__init__()
        self.layer = depth[0]
        self.zcg = Merged(dim, {"z": dim, "c": dim, "g": dim}, bias)
        self.out = _residual_projection(dim, dim, bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        projected = self.zcg.each(x)
        z, c, gate = (part.float() for part in projected)
        z = z.sigmoid()
        keep, h = 1 - z, z * c
        documents = _document_ids(context, x.shape[1], before=1)
        if documents is not None:
            keep = keep * (documents[:, 1:] == documents[:, :-1])[:, :, None]
        state = None
        if context.cache is not None:
            assert context.start is not None, "a cache needs a start"
            (state,) = context.cache[self.layer]
            past = keep[:, 0] * state * (context.start > 0)  # from start 0 on, the cache is used again for another text
            h = torch.cat((h[:, :1] + past[:, None], h[:, 1:]), dim=1)
        shift = 1  # the state at t is h[t] + keep[t] * (the state at t - shift); each round doubles shift
        while shift < x.shape[1]:
            earlier_h, earlier_keep = (F.pad(t, (0, 0, shift, -shift)) for t in (h, keep))
            h, keep, shift = h + keep * earlier_h, keep * earlier_keep, 2 * shift
        if state is not None:
            state.copy_(h[:, -1])
        return self.out((h * F.silu(gate)).to(projected[0].dtype))

    def init_cache(self, batch: int, max_len: int) -> tuple[Tensor, ...]:
        """The state h: one (batch, C), for any length."""
        weight = self.out.weight
        return (torch.zeros(batch, weight.shape[1], device=weight.device),)


@register("mixer")
class ShortConvolution(nn.Module):
    """A causal convolution over the last ``width`` positions between two gates, W_o (c * conv(b * u)) (Poli et al.
    2023, arXiv:2302.10866).

    b, c and u are projections of x, and conv has one filter per channel. The gates are those of Hyena; short filters in
    every layer are as in LFM2. Positions before the start of a document count as 0. It needs no position part. It has
    no heads, so binding GPT.n_kv_head is an error unless another mixer uses it."""

    supports = {"offset", "documents"}
    ignores = ("attention", "position", "n_kv_head")

    def __init__(
        self,
        dim: int,
        n_head: int,
        n_kv_head: int,
        position: int,
        attention: type,
        depth: Depth,
        width: Annotated[int, Gt(0)] = 4,
    ):
        super().__init__()
        self.layer, self.width = depth[0], width
        self.bcu = Merged(dim, {"b": dim, "c": dim, "u": dim})
        self.conv = nn.Conv1d(dim, dim, width, groups=dim, bias=False)
        self.out = _residual_projection(dim, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:  # (B,T,C) -> (B,T,C)
        length, before = x.shape[1], self.width - 1
        b, c, u = self.bcu.each(x)
        inputs = F.pad(b * u, (0, 0, before, 0))  # (B,width-1+T,C)
        if context.cache is not None:
            assert context.start is not None, "a cache needs a start"
            (past,) = context.cache[self.layer]
            inputs = torch.cat((past * (context.start > 0), inputs[:, before:].to(past.dtype)), dim=1)
            past.copy_(inputs[:, length:])
        documents, mixed = _document_ids(context, length, before), inputs.new_zeros(())
        for tap, weight in enumerate(self.conv.weight.unbind(-1)):  # (C,1) each; the last is for the position itself
            shifted = inputs[:, tap : tap + length]
            if documents is not None:
                shifted = shifted * (documents[:, tap : tap + length] == documents[:, before:])[:, :, None]
            mixed = mixed + weight[:, 0] * shifted
        return self.out(c * mixed.to(c.dtype))

    def init_cache(self, batch: int, max_len: int) -> tuple[Tensor, ...]:
        """The last inputs of the convolution: one (batch, width - 1, C)."""
        return empty_cache(self.bcu, (batch, self.width - 1, self.out.weight.shape[1]))


def _build_kernel(attention: type, n_head: int, n_kv_head: int, head_dim: int) -> tuple[nn.Module, set[str], bool]:
    """Build the kernel. Returns it, the features that a mixer around it supports, and whether the mixer can decode with
    a cache. A kernel without "offset" can't: generation then recomputes all tokens."""
    kernel = attention(n_head, head_dim)
    supports: set[str] = getattr(kernel, "supports", set())
    if n_kv_head < n_head and "gqa" not in supports:
        name = type(kernel).__name__
        raise ValueError(f"{name} needs as many key/value heads as query heads: set GPT.n_kv_head = {n_head}")
    return kernel, supports, "offset" in supports


def _merged_qkv(dim: int, head_dim: int, n_head: int, n_kv_head: int, bias: bool) -> Merged:
    return Merged(dim, {"q": n_head * head_dim, "k": n_kv_head * head_dim, "v": n_kv_head * head_dim}, bias)


def _residual_projection(inner: int, dim: int, bias: bool = False) -> Linear:
    """The last matrix of a mixer, inner -> C, whose output is added to the residual stream. Most inits make it
    smaller."""
    linear = Linear(inner, dim, bias=bias)
    linear.residual = True
    return linear


def _split_heads(qkv: Merged, head_dim: int, x: Tensor) -> tuple[Tensor, ...]:
    """x (B,T,C) -> q (B,T,H,D), k (B,T,G,D), v (B,T,G,D)."""
    heads = qkv(x).view(*x.shape[:2], -1, head_dim)  # (B,T,H+2G,D)
    return heads.split_with_sizes([rows // head_dim for rows in qkv.merged.values()], dim=2)


def _apply_norm(norm: nn.Module, linear: nn.Linear, x: Tensor) -> Tensor:
    """Norm the output x of ``linear`` in the dtype of its weights, which is float32 even under autocast."""
    return norm(x.to(linear.weight.dtype)).to(x.dtype)


def _rotate(q: Tensor, k: Tensor, index: int, context: Context) -> tuple[Tensor, Tensor]:
    """Rotate q (B,T,H,D) and k (B,T,G,D) by their positions, if position part ``index`` rotates."""
    position = context.position[index]
    return position.rotate(q, k, context.positions) if hasattr(position, "rotate") else (q, k)


def _empty_kv_cache(qkv: Merged, head_dim: int, batch: int, max_len: int) -> tuple[Tensor, ...]:
    shape = (batch, max_len, qkv.merged["k"] // head_dim, head_dim)
    return empty_cache(qkv, shape, shape)


def _document_ids(context: Context, length: int, before: int) -> Tensor | None:
    """The document ids (B, before + T) of the T tokens and of the ``before`` positions that precede them. Positions
    before the text get the id of position 0. None without documents."""
    if context.documents is None:
        return None
    start = 0 if context.start is None else context.start
    positions = start + torch.arange(-before, length, device=context.documents.device)
    return context.documents.index_select(1, positions.clamp(min=0))
