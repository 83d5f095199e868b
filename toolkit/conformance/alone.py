"""Checks of a layer's part by itself, outside a model: its dtype, its precision, and that positions stay apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toolkit.conformance.bench import DIM, HEAD_DIM, HEADS, LAYERS, LONGEST, MODELS, Bench, relative, tokens
from toolkit.conformance.lines import Broken, Gauge, NotApplicable, check
from toolkit.conformance.positions import NO_METHOD, position_methods
from toolkit.context import Context


@check(
    "output has the input's dtype", *LAYERS, look_at="float32 constants and buffers, and .float() that is not undone"
)
def dtype(bench: Bench) -> Gauge:
    """The output has the input's dtype, in each of three dtypes. Tests the part alone, or for some kinds in a model."""
    if bench.kind == "position" and not position_methods(bench):
        raise NotApplicable(NO_METHOD)
    gauge = Gauge(0.0, "wrong dtypes")
    for expected in (torch.float32, torch.bfloat16, torch.float64):
        for name, out in _outputs_alone(bench, 13, expected):
            gauge.record(float(out.dtype != expected), f"{str(expected)[6:]} {name}".strip())
    return gauge


@check("positions do not affect each other", "norm", "ffn", look_at="means and sums over axis 1, the positions")
def pointwise(bench: Bench) -> Gauge:
    """The output at a position does not depend on other positions."""
    gauge = Gauge(1e-5, "difference between alone and in a sequence")
    for length in (2, 13, 64):
        module, x = bench.cls(DIM).eval(), torch.randn(2, length, DIM)
        whole = _forward(bench, module, x)
        for t in {0, length // 2, length - 1}:
            gauge.record(relative(_forward(bench, module, x[:, t : t + 1]), whole[:, t : t + 1]), f"T={length}")
    return gauge


@check(
    "bfloat16 agrees with float32",
    *MODELS,
    look_at="sums, exponentials and angles, which need float32 inside the part",
)
def bfloat16(bench: Bench) -> Gauge:
    """Bfloat16 adds only rounding errors, both under autocast (as in training) and with the part alone in bfloat16. The
    error is relative, in the 2-norm of the whole output."""
    gauge = Gauge(0.05, "relative error")
    model, ids = bench.model(plain_init=True).eval(), tokens(2, 64)
    expected = model(ids)[0]
    with torch.autocast("cpu", torch.bfloat16):
        gauge.record((model(ids)[0].float() - expected).norm() / expected.norm(), "autocast, T=64")
    if bench.kind in ("attention", "norm", "ffn") or (bench.kind == "position" and position_methods(bench)):
        in_float32, in_bfloat16 = (dict(_outputs_alone(bench, 33, dtype)) for dtype in (torch.float32, torch.bfloat16))
        for name, out in in_bfloat16.items():
            error = (out.float() - in_float32[name]).norm() / in_float32[name].norm().clamp_min(1e-6)
            gauge.record(error, f"alone, T=33 {name}".strip())
    return gauge


def _outputs_alone(bench: Bench, length: int, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """(name, output) of the part alone in a dtype. The inputs are the same for every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    if bench.kind == "attention":
        q, k, v = (draw(2, length, HEADS, HEAD_DIM) for _ in range(3))
        return [("", bench.cls(HEADS, HEAD_DIM).to(dtype).eval()(q, k, v))]
    if bench.kind in ("norm", "ffn"):
        torch.manual_seed(0)
        return [("", _forward(bench, bench.cls(DIM).to(dtype).eval(), draw(2, length, DIM)))]
    if bench.kind == "position":
        torch.manual_seed(0)
        part, positions = bench.cls(DIM, HEADS, HEAD_DIM, LONGEST), torch.arange(length)[None]
        outputs = []
        if hasattr(part, "embed"):
            outputs.append(("embed", part.to(dtype).embed(draw(2, length, DIM), positions)))
        if hasattr(part, "rotate"):
            q, k = part.rotate(draw(2, length, HEADS, HEAD_DIM), draw(2, length, 2, HEAD_DIM), positions)
            outputs += [("rotate q", q), ("rotate k", k)]
        if hasattr(part, "score_bias"):
            bias = part.score_bias(positions[0], positions[0])  # (H, T, S)
            if bias.shape != (HEADS, length, length) or not bias.isfinite().all():
                raise Broken(
                    f"score_bias() returned the shape {tuple(bias.shape)}, finite: {bool(bias.isfinite().all())}; it "
                    f"must return (H, T, S) = ({HEADS}, {length}, {length}), all finite (the mask removes later keys)"
                )
            outputs += [("score_bias", bias.to(dtype))]
        return outputs
    return [("in a model", bench.model().to(dtype)(tokens(2, length))[0])]


def _forward(bench: Bench, module: nn.Module, x: Tensor) -> Tensor:
    """The output of a norm or an ffn: (B, T, C) -> (B, T, C)."""
    return module(x) if bench.kind == "norm" else module(x, Context())
