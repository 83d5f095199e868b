"""Attention kernels: q (B,T,H,D), k (B,S,G,D), v (B,S,G,Dv) -> (B,T,H,Dv)."""

import importlib.util
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from toolkit.context import Mask
from toolkit.cpu import blockwise
from toolkit.registry import register


@register("attention")
class MathAttention(nn.Module):
    """softmax(q k^T / sqrt(D) + bias) v, written out (Vaswani et al. 2017, arXiv:1706.03762, eq. 1). The readable
    reference: it holds all B*H*T*S scores, in float32."""

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int):
        super().__init__()

    def forward(self, q, k, v, mask=None):
        scores = _products(q, k) * q.shape[-1] ** -0.5 + _causal(q, k, mask).dense(torch.float32)
        return _mix(scores.softmax(-1), v)


@register("attention")
class SDPA(nn.Module):
    """``torch.nn.functional.scaled_dot_product_attention``: PyTorch picks the kernel. Masks and biases are handed over
    as one dense (B|1,H|1,T,S) tensor, which rules out its flash kernel but honours everything."""

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int):
        super().__init__()

    def forward(self, q, k, v, mask=None):
        return _sdpa(q, k, v, None if mask is None or mask.open else mask.dense(q.dtype))


@register("attention")
class FlashAttention(nn.Module):
    """Exact attention without the T x S matrix in memory (Dao 2023, arXiv:2307.08691): the flash-attn package where it
    is installed, on CUDA in half precision; everywhere else PyTorch's own fused kernels. These also take what the
    package can't: queries that start at an offset (decoding), with a mask, and values of another width than the
    queries (Dv != D). A score bias or document mask is refused: neither kernel takes one.

    On a CPU these kernels are slow at training: while the probabilities of a layer come to no more than 32 MiB, it is
    ``blockwise.attention`` that trains there, in float32."""

    supports = {"offset", "gqa"}

    def __init__(self, n_head: int, head_dim: int):
        super().__init__()
        self.n_head, self.package = n_head, None
        if torch.cuda.is_available() and importlib.util.find_spec("flash_attn"):
            from flash_attn import flash_attn_func

            self.package = flash_attn_func

    def implementation(self, device: str, dtype: torch.dtype, batch: int, length: int) -> str:
        """What trains on ``device`` in ``dtype``, with inputs (batch, length, H, D), in words, for the run's facts."""
        if self._packaged(device, dtype):
            return "flash-attn package"
        if blockwise.fits(device, dtype, batch, length, self.n_head):
            return f"products over blocks of {blockwise.QUERIES} queries"
        return "PyTorch fused SDPA" + (" (flash-attn is not installed)" if device == "cuda" else "")

    def forward(self, q, k, v, mask=None):
        if mask is None and q.shape[-1] == v.shape[-1] and self._packaged(q.device.type, q.dtype):
            return self.package(q, k, v, causal=True)
        if mask is None and torch.is_grad_enabled() and blockwise.fits(q.device.type, v.dtype, *q.shape[:3]):
            return blockwise.attention(q.to(v.dtype), k.to(v.dtype), v)
        return _sdpa(q, k, v, None if mask is None or mask.open else mask.dense(q.dtype))

    def _packaged(self, device, dtype):
        return self.package is not None and device == "cuda" and dtype in (torch.float16, torch.bfloat16)


@register("attention")
class FlexAttention(nn.Module):
    """PyTorch's ``flex_attention``, softmax attention with bias, documents, window and soft-cap in one fused kernel
    (Dong et al. 2024, arXiv:2412.05496). Blocks of pairs that the mask rules out are skipped. Scores are
    q k^T / sqrt(D), then the soft-cap, then the bias.

    That kernel runs where the model is compiled, on CUDA, for heads of 16 or wider. Everywhere else the same is
    computed densely: PyTorch's uncompiled form holds all scores as well, and has no gradient on a CPU.

    window    a query sees this many positions, its own among them; None: all before it
    softcap   bounds the scores, softcap * tanh(scores / softcap); None leaves them
    """

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(
        self,
        n_head: int,
        head_dim: int,
        window: Annotated[int, Gt(0)] | None = None,
        softcap: Annotated[float, Gt(0)] | None = None,
    ):
        super().__init__()
        self.window, self.softcap = window, softcap

    def implementation(self, device: str, dtype: torch.dtype, batch: int, length: int) -> str:
        """What runs for inputs on ``device`` in ``dtype``, in words, for the run's facts."""
        dense = "dense SDPA" if self.softcap is None else "dense scores in float32"
        return (
            f"flex_attention where compiled and heads are 16 wide or more, else {dense}" if device == "cuda" else dense
        )

    def forward(self, q, k, v, mask=None):
        wide = min(q.shape[-1], v.shape[-1]) >= 16  # narrower heads have no compiled kernel
        if torch.compiler.is_compiling() and q.device.type == "cuda" and wide:
            return self.flex(q, k, v, mask)
        if self.softcap is None:
            return _windowed(q, k, v, mask, self.window)
        return _mix((_capped(q, k, self.softcap) + _dense(q, k, mask, self.window, torch.float32)).softmax(-1), v)

    def flex(self, q, k, v, mask=None):
        """flex_attention itself, wherever the tensors are (on a CPU without gradients)."""
        mask = _causal(q, k, mask)
        start, documents, bias = mask.start, mask.documents, mask.bias

        def allowed(b, h, t, s):
            at = start + t
            seen = at >= s if self.window is None else (at >= s) & (at - s < self.window)
            return seen if documents is None else seen & (documents[b, at] == documents[b, s])

        def score(score, b, h, t, s):
            score = score if self.softcap is None else self.softcap * torch.tanh(score / self.softcap)
            return score if bias is None else score + bias[h, t, s]

        batch = None if documents is None else q.shape[0]
        blocks = create_block_mask(allowed, batch, None, q.shape[1], k.shape[1], device=q.device)
        changed = None if self.softcap is None and bias is None else score
        q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))  # (B,T,H,D) -> (B,H,T,D)
        return flex_attention(q, k, v, changed, blocks, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


@register("attention")
class SlidingWindow(nn.Module):
    """softmax attention over the last ``window`` positions: query i sees keys i - window + 1 to i (Beltagy et al.
    2020, arXiv:2004.05150; Jiang et al. 2023, arXiv:2310.06825). Over L layers a token still draws on L * (window - 1)
    positions before it. PyTorch's SDPA with a dense mask, so no cheaper than full attention: it is FlexAttention, with
    FlexAttention.window, that skips the pairs outside. The cache keeps all positions."""

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int, window: Annotated[int, Gt(0)] = 256):
        super().__init__()
        self.window = window

    def forward(self, q, k, v, mask=None):
        return _windowed(q, k, v, mask, self.window)


@register("attention")
class SoftcapAttention(nn.Module):
    """softmax(softcap * tanh(q k^T / sqrt(D) / softcap) + bias) v: scores stay within +-softcap (Gemma Team 2024,
    arXiv:2408.00118, which caps at 50). Written out, in float32."""

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int, softcap: Annotated[float, Gt(0)] = 50.0):
        super().__init__()
        self.softcap = softcap

    def forward(self, q, k, v, mask=None):
        scores = _capped(q, k, self.softcap) + _causal(q, k, mask).dense(torch.float32)
        return _mix(scores.softmax(-1), v)


@register("attention")
class SigmoidAttention(nn.Module):
    """sigmoid(q k^T / sqrt(D) + bias + b) v: each weight stands alone, and they need not add up to 1 (Ramapuram et al.
    2024, arXiv:2409.04431). Written out, in float32.

    bias    the constant b. None: -log n for a query that sees n keys, so that the weights add up to about 1 at the
            start. The paper takes n to be the length of the sequence; a cached query can't know it, and a number of
            its own keeps the part causal
    """

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int, bias: float | None = None):
        super().__init__()
        self.bias = bias

    def forward(self, q, k, v, mask=None):
        mask = _causal(q, k, mask)
        b = -mask.allowed().sum(-1, keepdim=True).log() if self.bias is None else self.bias  # (B|1, 1, T, 1)
        scores = _products(q, k) * q.shape[-1] ** -0.5 + mask.dense(torch.float32)
        return _mix((scores + b).sigmoid(), v)


@register("attention")
class LinearAttention(nn.Module):
    """phi(q) phi(k)^T v over the sum of its weights, phi = elu + 1, with no softmax (Katharopoulos et al. 2020,
    arXiv:2006.16236). Written as the masked T x T product, which is exact but not linear in time: the
    recurrence pays off at contexts far beyond these. A score bias is refused: there is no score to add it to.

    eps    added to the sum of the weights
    """

    supports = {"offset", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int, eps: Annotated[float, Ge(0)] = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, q, k, v, mask=None):
        weights = _products(F.elu(q.float()) + 1, F.elu(k.float()) + 1)  # float32, since elu + 1 cancels below 0
        weights = weights * _causal(q, k, mask).allowed()
        return _mix(weights / (weights.sum(-1, keepdim=True) + self.eps), v)


def _causal(q, k, mask):
    """The mask, or the one that says plain causal."""
    if mask is not None:
        return mask
    return Mask(torch.zeros((), dtype=torch.int64, device=q.device), q.shape[1], k.shape[1], None, None)


def _products(q, k):
    """q k^T in float32: (B,T,H,D), (B,S,G,D) -> (B,H,T,S)."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)  # (B,S,G,D) -> (B,S,H,D)
    return torch.einsum("bthd,bshd->bhts", q, k).float()


def _capped(q, k, softcap):
    """The scaled scores, bounded: (B,H,T,S)."""
    return softcap * torch.tanh(_products(q, k) * (q.shape[-1] ** -0.5 / softcap))


def _mix(weights, v):
    """(B,H,T,S), (B,S,G,Dv) -> (B,T,H,Dv), in v's dtype."""
    v = v.repeat_interleave(weights.shape[1] // v.shape[2], dim=2)  # (B,S,G,Dv) -> (B,S,H,Dv)
    return torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v)


def _dense(q, k, mask, window, dtype):
    """What to add to the scores, -inf outside the window too (None: no window): (B|1,H|1,T,S)."""
    mask = _causal(q, k, mask)
    dense = mask.dense(dtype)
    if window is None:
        return dense
    at = mask.start + torch.arange(q.shape[1], device=q.device)  # (T,)
    near = at[:, None] - torch.arange(k.shape[1], device=q.device) < window  # (T, S)
    return dense.masked_fill(~near, -torch.inf)


def _windowed(q, k, v, mask, window):
    """softmax attention within a window, or without (None)."""
    if mask is None and (window is None or window >= k.shape[1]):
        return _sdpa(q, k, v, None)
    return _sdpa(q, k, v, _dense(q, k, mask, window, q.dtype))


def _sdpa(q, k, v, dense):
    """(B,T,H,D) in and out; causal when ``dense`` is None. is_causal with T < S would align the first query with key 0,
    so it is used for T = S only, which plain causal attention always is; a query alone may look at everything."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))  # (B,T,H,D) -> (B,H,T,D)
    gqa = q.shape[2] != k.shape[2]
    causal = dense is None and q.shape[1] > 1
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=dense, is_causal=causal, enable_gqa=gqa)
    return out.transpose(1, 2)
