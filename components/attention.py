"""Attention kernels: q (B,T,H,D), k (B,S,G,D), v (B,S,G,Dv) -> (B,T,H,Dv)."""

import importlib.util
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from toolkit.context import Mask
from toolkit.cpu import blockwise
from toolkit.registry import register


@register("attention")
class MathAttention(nn.Module):
    """softmax(q k^T / sqrt(D) + bias) v, as a formula (Vaswani et al. 2017, arXiv:1706.03762, eq. 1). This is the
    readable reference: it keeps all B*H*T*S scores in memory, in float32."""

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int):
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:  # (B,T,H,D) -> (B,T,H,Dv)
        scores = _scores(q, k) * q.shape[-1] ** -0.5 + _causal(q, k, mask).dense(torch.float32)
        return _mix(scores.softmax(-1), v)


@register("attention")
class SDPA(nn.Module):
    """``torch.nn.functional.scaled_dot_product_attention``: PyTorch chooses the kernel. It gets masks and biases
    as one dense (B|1,H|1,T,S) tensor; PyTorch can't use its flash kernel then."""

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int):
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:  # (B,T,H,D) -> (B,T,H,Dv)
        return _sdpa(q, k, v, None if mask is None or mask.open else mask.dense(q.dtype))


@register("attention")
class FlashAttention(nn.Module):
    """Exact attention without the T x S matrix in memory (Dao 2023, arXiv:2307.08691).

    On CUDA, in half precision, it uses the flash-attn package if that is installed, and PyTorch's fused kernels
    otherwise. PyTorch's kernels also compute what the package can't: decoding, where queries start at an offset and
    come with a mask, and values that are wider or narrower than the queries (Dv != D). A score bias and a document
    mask are refused, because neither kernel accepts them.

    PyTorch's kernels train slowly on a CPU. ``blockwise.attention`` replaces them there in float32, as long as the
    probabilities of a layer take no more than 32 MiB."""

    supports = {"offset", "gqa"}

    def __init__(self, n_head: int, head_dim: int):
        super().__init__()
        self.n_head = n_head
        self.package: Callable[..., Tensor] | None = None
        if torch.cuda.is_available() and importlib.util.find_spec("flash_attn"):
            from flash_attn import flash_attn_func

            self.package = flash_attn_func

    def implementation(self, device: str, dtype: torch.dtype, batch: int, length: int) -> str:
        """Describe the kernel that trains on ``device`` in ``dtype`` with inputs (batch, length, H, D)."""
        if self.package and _in_half(device, dtype):
            return "flash-attn package"
        if blockwise.fits(device, dtype, batch, length, self.n_head):
            return f"products over blocks of {blockwise.QUERIES} queries"
        return "PyTorch fused SDPA" + (" (flash-attn is not installed)" if device == "cuda" else "")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:  # (B,T,H,D) -> (B,T,H,Dv)
        if mask is None and q.shape[-1] == v.shape[-1] and self.package and _in_half(q.device.type, q.dtype):
            return self.package(q, k, v, causal=True)
        if mask is None and torch.is_grad_enabled() and blockwise.fits(q.device.type, v.dtype, *q.shape[:3]):
            return blockwise.attention(q.to(v.dtype), k.to(v.dtype), v)
        return _sdpa(q, k, v, None if mask is None or mask.open else mask.dense(q.dtype))


@register("attention")
class FlexAttention(nn.Module):
    """PyTorch's ``flex_attention``: softmax attention with bias, documents, window and soft cap in one fused kernel
    (Dong et al. 2024, arXiv:2412.05496). The kernel skips blocks of pairs that the mask removes. A score is
    q k^T / sqrt(D), then the soft cap is applied, then the bias is added.

    The kernel runs if the model is compiled, on CUDA, for heads of at least 16 channels. In all other cases the same
    numbers are computed with dense scores: the uncompiled flex_attention keeps all scores in memory too, and has no
    gradient on a CPU.

    window    number of positions that a query sees, including its own; None: all positions up to its own
    softcap   bounds the scores: softcap * tanh(score / softcap); None: no bound
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
        """Describe what computes inputs on ``device`` in ``dtype``."""
        dense = "dense SDPA" if self.softcap is None else "dense scores in float32"
        return (
            f"flex_attention where compiled and heads are 16 wide or more, else {dense}" if device == "cuda" else dense
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:  # (B,T,H,D) -> (B,T,H,Dv)
        wide = min(q.shape[-1], v.shape[-1]) >= 16  # narrower heads have no compiled kernel
        if torch.compiler.is_compiling() and q.device.type == "cuda" and wide:
            return self.flex(q, k, v, mask)
        if self.softcap is None:
            return _windowed(q, k, v, mask, self.window)
        return _mix((_capped(q, k, self.softcap) + _dense(q, k, mask, self.window, torch.float32)).softmax(-1), v)

    def flex(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:  # (B,T,H,D) -> (B,T,H,Dv)
        """Call flex_attention itself, on any device. It has no gradient on a CPU."""
        mask = _causal(q, k, mask)
        start, documents, bias = mask.start, mask.documents, mask.bias

        def allowed(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            at = start + t
            seen = at >= s if self.window is None else (at >= s) & (at - s < self.window)
            return seen if documents is None else seen & (documents[b, at] == documents[b, s])

        def changed(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            score = score if self.softcap is None else self.softcap * torch.tanh(score / self.softcap)
            return score if bias is None else score + bias[h, t, s]

        batch = None if documents is None else q.shape[0]
        blocks = create_block_mask(allowed, batch, None, q.shape[1], k.shape[1], device=q.device)
        score_change = None if self.softcap is None and bias is None else changed
        q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))  # (B,T,H,D) -> (B,H,T,D)
        return flex_attention(q, k, v, score_change, blocks, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


@register("attention")
class SlidingWindow(nn.Module):
    """Softmax attention over the last ``window`` positions: query i sees keys i - window + 1 to i (Beltagy et al.
    2020, arXiv:2004.05150; Jiang et al. 2023, arXiv:2310.06825). Through L layers, information still reaches a token
    from L * (window - 1) positions before it.

    This is PyTorch's SDPA with a dense mask, so it costs as much as full attention. To skip the pairs outside the
    window, use FlexAttention with FlexAttention.window. The cache keeps all positions."""

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int, window: Annotated[int, Gt(0)] = 256):
        super().__init__()
        self.window = window

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:  # (B,T,H,D) -> (B,T,H,Dv)
        return _windowed(q, k, v, mask, self.window)


@register("attention")
class SoftcapAttention(nn.Module):
    """softmax(softcap * tanh(q k^T / sqrt(D) / softcap) + bias) v: scores stay between -softcap and softcap (Gemma
    Team 2024, arXiv:2408.00118, with a softcap of 50). Computed as the formula, in float32."""

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int, softcap: Annotated[float, Gt(0)] = 50.0):
        super().__init__()
        self.softcap = softcap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:  # (B,T,H,D) -> (B,T,H,Dv)
        scores = _capped(q, k, self.softcap) + _causal(q, k, mask).dense(torch.float32)
        return _mix(scores.softmax(-1), v)


@register("attention")
class SigmoidAttention(nn.Module):
    """sigmoid(q k^T / sqrt(D) + bias + b) v: the weights do not depend on each other, and their sum need not be 1
    (Ramapuram et al. 2024, arXiv:2409.04431). Computed as the formula, in float32.

    bias    the constant b. None: -log n for a query that sees n keys, so that the weights add up to about 1 at the
            start of training. In the paper n is the length of the sequence, which is not known while decoding
    """

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int, bias: float | None = None):
        super().__init__()
        self.bias = bias

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:  # (B,T,H,D) -> (B,T,H,Dv)
        mask = _causal(q, k, mask)
        b = -mask.allowed().sum(-1, keepdim=True).log() if self.bias is None else self.bias  # (B|1, 1, T, 1)
        scores = _scores(q, k) * q.shape[-1] ** -0.5 + mask.dense(torch.float32)
        return _mix((scores + b).sigmoid(), v)


@register("attention")
class LinearAttention(nn.Module):
    """phi(q) phi(k)^T v divided by the sum of the weights phi(q) phi(k)^T, with phi = elu + 1 instead of a softmax
    (Katharopoulos et al. 2020, arXiv:2006.16236). Computed as the masked T x T product, whose time is quadratic in T;
    the recurrence with linear time is faster only for much longer contexts. A score bias is refused, because there are
    no scores to add it to.

    eps    added to the sum of the weights
    """

    supports = {"offset", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int, eps: Annotated[float, Ge(0)] = 1e-6):
        super().__init__()
        self.eps = eps

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:  # (B,T,H,D) -> (B,T,H,Dv)
        weights = _scores(F.elu(q.float()) + 1, F.elu(k.float()) + 1)  # float32, since elu + 1 cancels below 0
        weights = weights * _causal(q, k, mask).allowed()
        return _mix(weights / (weights.sum(-1, keepdim=True) + self.eps), v)


def _in_half(device: str, dtype: torch.dtype) -> bool:
    """Whether the flash-attn package can compute this."""
    return device == "cuda" and dtype in (torch.float16, torch.bfloat16)


def _causal(q: Tensor, k: Tensor, mask: Mask | None) -> Mask:
    """The mask, or a plain causal mask in place of None."""
    if mask is not None:
        return mask
    return Mask(torch.zeros((), dtype=torch.int64, device=q.device), q.shape[1], k.shape[1], None, None)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T in float32: (B,T,H,D), (B,S,G,D) -> (B,H,T,S)."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)  # (B,S,G,D) -> (B,S,H,D)
    return torch.einsum("bthd,bshd->bhts", q, k).float()


def _capped(q: Tensor, k: Tensor, softcap: float) -> Tensor:
    """The scaled scores with the soft cap: (B,H,T,S)."""
    return softcap * torch.tanh(_scores(q, k) * (q.shape[-1] ** -0.5 / softcap))


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    """(B,H,T,S), (B,S,G,Dv) -> (B,T,H,Dv), in v's dtype."""
    v = v.repeat_interleave(weights.shape[1] // v.shape[2], dim=2)  # (B,S,G,Dv) -> (B,S,H,Dv)
    return torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v)


def _dense(q: Tensor, k: Tensor, mask: Mask | None, window: int | None, dtype: torch.dtype) -> Tensor:
    """The tensor to add to the scores, (B|1,H|1,T,S). It is -inf outside the window as well; None means no window."""
    mask = _causal(q, k, mask)
    dense = mask.dense(dtype)
    if window is None:
        return dense
    at = mask.start + torch.arange(q.shape[1], device=q.device)  # (T,)
    near = at[:, None] - torch.arange(k.shape[1], device=q.device) < window  # (T, S)
    return dense.masked_fill(~near, -torch.inf)


def _windowed(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, window: int | None) -> Tensor:
    """Softmax attention within a window; None means no window."""
    if mask is None and (window is None or window >= k.shape[1]):
        return _sdpa(q, k, v, None)
    return _sdpa(q, k, v, _dense(q, k, mask, window, q.dtype))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, dense: Tensor | None) -> Tensor:
    """Softmax attention by PyTorch, (B,T,H,D) -> (B,T,H,Dv). ``dense`` is added to the scores; None means causal.

    PyTorch's is_causal would align the first query with key 0 even if T < S. It is used only for plain causal
    attention, where T = S. A single query sees all keys and needs no mask."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B,T,H,D) -> (B,H,T,D)
    gqa = q.shape[1] != k.shape[1]
    causal = dense is None and q.shape[2] > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, is_causal=causal, enable_gqa=gqa)
    return out.transpose(1, 2)
