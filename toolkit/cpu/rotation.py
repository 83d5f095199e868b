"""Rotary position encodings with fewer passes over memory. components/position.py has the formulas.

Shapes: B batch, T tokens, H heads, D head dim, R <= D rotated channels."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.cpu import switch
from toolkit.cpu.operation import helps, operation


class OncePerPass:
    """Calls ``function(positions, *arguments)`` once for all layers of a forward pass.

    The layers of a pass share one tensor of positions, so a call with the same tensor and the same arguments returns
    the result of the call before. In a compiled graph, the compiler itself removes repeated calls."""

    def __init__(self, function: Callable[..., tuple[Tensor, Tensor]]):
        self.function = function
        self.last_call: tuple[Tensor | None, tuple, tuple[Tensor, Tensor] | None] = (None, (), None)

    def __call__(self, positions: Tensor, *arguments: float) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or not switch.FAST:
            return self.function(positions, *arguments)
        last_positions, last_arguments, result = self.last_call
        if result is None or last_positions is not positions or last_arguments != arguments:
            result = self.function(positions, *arguments)
            self.last_call = (positions, arguments, result)
        return result


def opaque(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Decorate ``function(positions (B|1, T), frequencies (R/2,)) -> cos, sin``, each (B|1, T, 1, R), so that a model
    compiled for a CPU calls it once. The compiler would otherwise repeat it in every kernel that uses its results."""
    compiled_call = operation("angles", function, _empty_angles)

    @functools.wraps(function)
    def angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        return (compiled_call if helps(positions) else function)(positions, frequencies)

    return angles


def _empty_angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*positions.shape, 1, 2 * len(frequencies))
    return frequencies.new_empty(shape), frequencies.new_empty(shape)


def fits(x: Tensor) -> bool:
    """Whether to use ``rotate``: on a CPU. Code of torch.compile does not need it, because it makes only one pass."""
    return switch.FAST and x.device.type == "cpu" and not torch.compiler.is_compiling()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, H, R), float32, by ``cos`` and ``sin``, each (B|1, T, 1, R): x * cos + swapped * sin. Here
    ``swapped`` is x with its two halves of R/2 channels swapped. No copy of it is made."""
    if x.shape[1] > 1:  # repeated for each head, (B|1, T, H, R), because a CPU multiplies long rows faster
        cos, sin = (angle.expand(-1, -1, x.shape[2], -1).contiguous() for angle in (cos, sin))
    return (_Rotate.apply if torch.is_grad_enabled() else _rotated)(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: by the same angles, with the sines negated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
    rotated = x * cos
    (first, second), (x_first, x_second), (sin_first, sin_second) = (t.chunk(2, dim=-1) for t in (rotated, x, sin))
    first.addcmul_(x_second, sin_first, value=sign)
    second.addcmul_(x_first, sin_second, value=sign)
    return rotated
