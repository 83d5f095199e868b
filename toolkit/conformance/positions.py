"""Checks of a position part by itself: its methods depend on the given positions only."""

from __future__ import annotations

import torch

from toolkit.conformance.bench import DIM, HEAD_DIM, HEADS, LONGEST, Bench, relative
from toolkit.conformance.lines import Gauge, NotApplicable, check

NO_METHOD = "it has no method embed, rotate or score_bias, so it does nothing"


@check(
    "depends on positions only",
    "position",
    look_at="torch.arange(T) in place of the given positions, and the first row's positions used for every row",
)
def position_pure(bench: Bench) -> Gauge:
    """rotate, embed and score_bias depend only on the given positions: a slice of the sequence gives that slice of the
    result, each row may have its own positions, and heads may have another size."""
    part = bench.cls(DIM, HEADS, HEAD_DIM, LONGEST)
    gauge, positions = Gauge(1e-5, "relative difference"), torch.arange(LONGEST)[None]
    q, k, x = torch.randn(2, 64, HEADS, HEAD_DIM), torch.randn(2, 64, 2, HEAD_DIM), torch.randn(2, 64, DIM)
    row_positions = torch.stack((torch.arange(13), torch.arange(20, 33)))
    for start, end in ((0, 1), (7, 8), (5, 18), (63, 64)):
        slice_positions = positions[:, start:end]
        if hasattr(part, "rotate"):
            whole = part.rotate(q, k, positions)
            of_slice = part.rotate(q[:, start:end], k[:, start:end], slice_positions)
            for from_whole, from_slice in zip(whole, of_slice, strict=True):
                gauge.record(relative(from_slice, from_whole[:, start:end]), "rotate, offset")
        if hasattr(part, "embed"):
            from_slice, from_whole = part.embed(x[:, start:end], slice_positions), part.embed(x, positions)
            gauge.record(relative(from_slice, from_whole[:, start:end]), "embed, offset")
        if hasattr(part, "score_bias"):
            from_whole = part.score_bias(positions[0], positions[0])
            from_slice = part.score_bias(slice_positions[0], positions[0])
            gauge.record(relative(from_slice, from_whole[:, start:end]), "score_bias, offset")
    if hasattr(part, "rotate"):
        both_rows = part.rotate(q[:, :13], k[:, :13], row_positions)[0]
        second_row = part.rotate(q[1:, :13], k[1:, :13], row_positions[1:])[0]
        gauge.record(relative(both_rows[1:], second_row), "rotate, positions by row")
        wide = torch.randn(2, 13, HEADS, 2 * HEAD_DIM)
        gauge.record(float(part.rotate(wide, wide, positions[:, :13])[0].shape != wide.shape), "rotate, heads of 16")
    if hasattr(part, "embed"):
        both_rows = part.embed(x[:, :13], row_positions)
        gauge.record(relative(both_rows[1:], part.embed(x[1:, :13], row_positions[1:])), "embed, positions by row")
    if not gauge.tried:
        raise NotApplicable(NO_METHOD)
    return gauge


def position_methods(bench: Bench) -> list[str]:
    """The optional methods of a position part that the part has."""
    return [method for method in ("embed", "rotate", "score_bias") if hasattr(bench.entry.cls, method)]
