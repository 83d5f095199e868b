"""Products of matrices on a CPU: large ones of float32 by the faster of the libraries that PyTorch carries.

PyTorch multiplies float32 with MKL, which has no AVX-512 kernel for AMD's processors; oneDNN, which it carries for
convolutions and fused layers, has one. With AVX2 alone the two were alike, on Intel's processors nobody has measured
them here: there MKL it stays. Up to 8 rows, as in decoding, both take two to four times as long for x weight^T as for
weight x^T, and a lone row is left to one core."""

import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.cpu.operation import operation

SMALLEST = 2**25  # multiplications: below that many, oneDNN's call takes longer than its kernel saves
FEW = 8  # rows of x up to which a CPU is faster at weight times columns, where the weight has more elements than LIGHT
LIGHT = 2**16


def _onednn_is_faster() -> bool:
    """Whether this is such a processor, and this PyTorch has both libraries. Known, not timed: a run and its resumption
    take the same way, whatever else the machine does."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not both or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        told = platform.processor()
    return "AuthenticAMD" in told and hasattr(torch.ops.mkldnn, "_linear_pointwise")


ONEDNN = _onednn_is_faster()


def implementation(device: str, dtype: torch.dtype) -> str | None:
    """What multiplies matrices of ``dtype`` on ``device``, in words, for the run's facts; None where nothing is chosen:
    everywhere but for float32 on a CPU."""
    if device != "cpu" or dtype != torch.float32:
        return None
    usual = "MKL" if torch.backends.mkl.is_available() else "PyTorch's BLAS"
    return f"oneDNN from {SMALLEST:,} multiplications on, {usual} below" if ONEDNN else usual


def fits(a: Tensor, b: Tensor) -> bool:
    """Whether ``product(a, b)`` would be oneDNN's: float32 and nothing but that, on a CPU, and large enough."""
    single = a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu"
    if not single or torch.is_autocast_enabled("cpu") or not ONEDNN:
        return False
    return a.numel() * b.shape[0] >= SMALLEST


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (..., I), (O, I), (O,) -> (..., O), as ``F.linear``. Where x has few rows, as in decoding, the
    result may lie in memory by columns."""
    if x.device.type == "cpu" and 0 < x.shape[:-1].numel() <= FEW and weight.numel() > LIGHT:
        out = _few(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)
    elif fits(x, weight):
        out = _Product.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    else:
        return F.linear(x, weight, bias)
    return out if bias is None else out + bias


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T by oneDNN, where ``fits``: (N, I), (O, I) -> (N, O). Either may lie in memory by columns."""
    return (_operation if torch.compiler.is_compiling() else _multiply)(a, b)


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b, written into ``out``: (N, I), (I, O) -> (N, O). Without gradients, as ``torch.mm`` with ``out``."""
    return out.copy_(product(a, b.T)) if fits(a, b.T) else torch.mm(a, b, out=out)


def _few(x, weight):
    if len(x) > 1:
        return torch.mm(weight, x.T).T
    return torch.mm(weight, torch.cat((x, x)).T)[:, :1].T  # a lone column would be one core's work


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = _Product.apply(grad, weight.T) if ctx.needs_input_grad[0] else None
        # MKL's: oneDNN multiplies two matrices that lie by columns more slowly
        return grad_x, grad.T @ x if ctx.needs_input_grad[1] else None


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), None, "none", [], "")


def _dense(x):
    """By rows or by columns, without gaps: oneDNN takes others too, and a thousand times as long."""
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


# A compiler would lower oneDNN's own operation anew, for weights that it could pack, and fail.
_operation = operation("product", _multiply, lambda a, b: a.new_empty(a.shape[0], b.shape[0]))
