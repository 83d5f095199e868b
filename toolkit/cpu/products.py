"""Products of float32 matrices on a CPU, computed with the faster of the two libraries that PyTorch contains.

PyTorch multiplies float32 matrices with MKL, which has no AVX-512 kernel for AMD processors. oneDNN, which PyTorch
contains for convolutions and fused layers, has such a kernel. MKL is kept on AMD processors with AVX2 but no AVX-512,
where both are equally fast, and on Intel processors, where they have not been compared. With up to 8 rows, as in
decoding, both libraries take two to four times as long for x weight^T as for weight x^T, and they use only one core for
a single row."""

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.cpu import switch
from toolkit.cpu.operation import operation

SMALLEST = 2**25  # multiplications; for a smaller product, the call of oneDNN costs more time than its kernel saves
FEW = 8  # rows of x: up to this number, weight x^T is faster than x weight^T
LIGHT = 2**16  # elements of weight: FEW applies only to larger weights


def _onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, and this PyTorch has both libraries.

    This is decided from the CPU model, not by timing, so that a resumed run takes the same path."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not has_both or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        description = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        description = platform.processor()
    return "AuthenticAMD" in description and hasattr(torch.ops.mkldnn, "_linear_pointwise")


ONEDNN = _onednn_is_faster()


def implementation(device: str, dtype: torch.dtype) -> str | None:
    """Name the library that multiplies matrices of ``dtype`` on ``device``, for facts.json. None unless this is float32
    on a CPU: otherwise there is no choice."""
    if device != "cpu" or dtype != torch.float32:
        return None
    default = "MKL" if torch.backends.mkl.is_available() else "PyTorch's BLAS"
    return f"oneDNN from {SMALLEST:,} multiplications on, {default} below" if switch.FAST and ONEDNN else default


def fits(a: Tensor, b: Tensor) -> bool:
    """Whether to use ``product(a, b)``, that is oneDNN: for large float32 matrices on a CPU, without autocast."""
    is_float32_on_cpu = a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu"
    if not is_float32_on_cpu or torch.is_autocast_enabled("cpu") or not (switch.FAST and ONEDNN):
        return False
    return a.numel() * b.shape[0] >= SMALLEST


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (..., I), (O, I), (O,) -> (..., O), like ``F.linear``. If x has few rows, as in decoding, the
    result may be stored column by column."""
    if switch.FAST and x.device.type == "cpu" and 0 < x.shape[:-1].numel() <= FEW and weight.numel() > LIGHT:
        out = _few_rows(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)
    elif fits(x, weight):
        out = _Product.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    else:
        return F.linear(x, weight, bias)
    return out if bias is None else out + bias


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T with oneDNN, if ``fits(a, b)``: (N, I), (O, I) -> (N, O). a and b may be stored row by row or by column."""
    return (_operation if torch.compiler.is_compiling() else _multiply)(a, b)


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b, written into ``out``: (N, I), (I, O) -> (N, O). Has no gradient, like ``torch.mm`` with ``out``."""
    return out.copy_(product(a, b.T)) if fits(a, b.T) else torch.mm(a, b, out=out)


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T for few rows of x: (N, I), (O, I) -> (N, O), stored column by column."""
    if len(x) > 1:
        return torch.mm(weight, x.T).T
    return torch.mm(weight, torch.cat((x, x)).T)[:, :1].T  # a single column would be computed on one core


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = _Product.apply(grad, weight.T) if ctx.needs_input_grad[0] else None
        # The second product uses MKL: oneDNN is slower for two matrices that are stored column by column.
        return grad_x, grad.T @ x if ctx.needs_input_grad[1] else None


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), None, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """Copy x unless it is stored by rows or by columns, without gaps. For others, oneDNN is a thousand times slower."""
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()


# Registered because torch.compile would try to pack the weight for oneDNN's own operation, and fail.
_operation = operation("product", _multiply, lambda a, b: a.new_empty(a.shape[0], b.shape[0]))
