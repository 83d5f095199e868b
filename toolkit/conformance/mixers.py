"""Checks of a mixer: it uses, refuses or declares to ignore what the model hands to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.conformance.bench import Bench, position_with, tokens
from toolkit.conformance.lines import Broken, Gauge, NotApplicable, check
from toolkit.context import Mask


@check("uses its slots or declares `ignores`", "mixer")
def slots(bench: Bench) -> Gauge:
    """A mixer uses the position part and the attention kernel that it is given, or declares that it ignores them."""
    ids, ignores = tokens(2, 13), getattr(bench.entry.cls, "ignores", ())
    gauge = Gauge(note=f"ignores {', '.join(ignores)}" if ignores else "uses attention and position")
    replacements: list[tuple[str, type]] = [("attention", _ZeroAttention)]
    replacements += [("position", part) for part in map(position_with, ("rotate", "score_bias")) if part]
    for slot, replacement in replacements:
        before = (bench.model() if slot == "attention" else bench.model(position=_NoPosition)).eval()(ids)[0]
        changes: dict[str, Any] = {slot: replacement}
        try:
            after = bench.model(**changes).eval()(ids)[0]
        except ValueError:  # refused when built, with a remedy: this is as good as being used
            gauge.record(0, f"{slot} {replacement.__name__}: refused")
            continue
        if torch.equal(before, after) and slot not in ignores:
            raise Broken(
                f"{replacement.__name__} in the slot GPT.{slot} gives the same output, and must give another; use the "
                f"{slot} part in forward(), or declare ignores = ({slot!r},) in the class"
            )
        gauge.record(0, f"{slot} replaced")
    return gauge


@check(
    "uses or refuses n_kv_head",
    "mixer",
    "attention",
    look_at="the widths of the key and value projections, which must use n_kv_head",
)
def grouped(bench: Bench) -> Gauge:
    """n_kv_head < n_head is used or refused, never ignored. Used means: fewer key/value heads give fewer parameters."""
    if "n_kv_head" in getattr(bench.entry.cls, "ignores", ()):
        raise NotApplicable("it declares that it ignores n_kv_head: a config that binds it for this mixer is refused")
    gauge = Gauge(0.0, "settings ignored")
    full_count = sum(p.numel() for p in bench.model().parameters())
    for n_kv_head in (2, 1):
        try:
            model = bench.model(n_kv_head=n_kv_head)
        except ValueError as error:
            if bench.kind == "attention" and bench.supports("gqa"):
                raise Broken(
                    f"it declares gqa but refuses n_kv_head = {n_kv_head}: {error}; accept k and v with fewer heads "
                    'than q, or remove "gqa" from supports'
                ) from error
            gauge.record(0, f"n_kv_head={n_kv_head}, refused when built")
            continue
        if bench.kind == "attention" and not bench.supports("gqa"):
            raise Broken(
                f"it does not declare gqa, but a model with n_kv_head = {n_kv_head} was built, which must be refused; "
                'declare supports = {"gqa"} if it accepts k and v with fewer heads than q'
            )
        model(tokens(2, 13))
        ignored = sum(p.numel() for p in model.parameters()) == full_count
        gauge.record(float(ignored), f"n_kv_head={n_kv_head}")
    return gauge


class _ZeroAttention(nn.Module):
    """A kernel that returns zeros."""

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        """q (B,T,H,D), v (B,S,G,Dv) -> zeros (B,T,H,Dv)."""
        return torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)


class _NoPosition(nn.Module):
    """A position part that does nothing."""

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int) -> None:
        super().__init__()
