"""Checks of an attention kernel by itself: it does what its ``supports`` declares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toolkit.conformance.bench import DIM, HEAD_DIM, HEADS, Bench, new_cache, position_with, relative
from toolkit.conformance.lines import Broken, Gauge, NotApplicable, check
from toolkit.context import Mask


@check(
    "values may have another width",
    "attention",
    look_at="reshapes of v that use head_dim in place of v.shape[-1]",
)
def value_width(bench: Bench) -> Gauge:
    """v (B,S,G,Dv) with Dv other than D gives (B,T,H,Dv), and each channel does not depend on the others."""
    gauge = Gauge(1e-5, "relative difference")
    for label, cls in bench.variants():
        q, k, v = _inputs(13)
        kernel, wide = cls(HEADS, HEAD_DIM), torch.cat((v, 2 * v), dim=-1)
        expected = torch.cat((kernel(q, k, v), 2 * kernel(q, k, v)), -1)
        gauge.record(relative(kernel(q, k, wide), expected), f"Dv=16{label}")
    return gauge


@check(
    "applies or refuses the score bias",
    "attention",
    look_at="mask.bias (H,T,S), which is added to the scaled scores before the softmax",
)
def bias(bench: Bench) -> Gauge:
    """A bias of 0 changes nothing. A bias of -10,000 at one head, query and key removes only that key there."""
    if not bench.supports("bias"):
        return _gauge_refused(bench, "bias", position=position_with("score_bias"))
    gauge = Gauge(1e-5, "relative difference")
    for label, cls in bench.variants():
        for length in (2, 13, 64):
            q, k, v = _inputs(length)
            kernel, zero_bias, removed_key = cls(HEADS, HEAD_DIM), torch.zeros(HEADS, length, length), length - 2
            out = kernel(q, k, v, _mask(length, bias=zero_bias))
            gauge.record(relative(out, kernel(q, k, v)), f"zero, T={length}{label}")
            removing_bias = zero_bias.clone()
            removing_bias[1, -1, removed_key] = -1e4  # head 1, the last query
            other_k, other_v = k.clone(), v.clone()
            other_k[:, removed_key], other_v[:, removed_key] = k[:, removed_key] + 1, v[:, removed_key] + 1
            with_key, with_changed_key = (
                kernel(q, keys, values, _mask(length, bias=removing_bias))
                for keys, values in ((k, v), (other_k, other_v))
            )
            gauge.record(relative(with_changed_key[:, -1, 1], with_key[:, -1, 1]), f"key removed, T={length}{label}")
            expected = with_key.clone()
            expected[:, -1, 1] = out[:, -1, 1]
            gauge.record(relative(expected, out), f"other heads and queries, T={length}{label}")
            if relative(with_key[:, -1, 1], out[:, -1, 1]) < 1e-4:
                raise Broken(
                    f"a bias of -10,000 for one key does not change the output at T={length}{label}, as it must; add "
                    'mask.bias to the scaled scores, or remove "bias" from supports'
                )
    return gauge


@check(
    "applies the offset or keeps no cache",
    "attention",
    look_at="mask.start, the position of the first query: query t may use the keys up to mask.start + t",
)
def offset(bench: Bench) -> Gauge:
    """Queries that start at an offset give the same rows as in the whole sequence, with and without a bias. Keys after
    the last query, which are not yet written, have no effect."""
    if not bench.supports("offset"):
        return _gauge_no_cache(bench)
    gauge = Gauge(1e-5, "relative difference")
    biases = [None, torch.randn(HEADS, 33, 33)] if bench.supports("bias") else [None]
    for label, cls in bench.variants():
        q, k, v = _inputs(33)
        kernel = cls(HEADS, HEAD_DIM)
        for bias in biases:  # (H,T,S) or None
            whole = kernel(q, k, v, None if bias is None else _mask(33, bias=bias))
            for start, end in ((0, 1), (0, 4), (4, 5), (4, 13), (32, 33)):
                bias_rows = None if bias is None else bias[:, start:end]
                mask = Mask(torch.tensor(start), end - start, 33, None, bias_rows)
                title = "T={}, S=33{}{}".format(end - start, label, "" if bias is None else ", bias")
                gauge.record(relative(kernel(q[:, start:end], k, v, mask), whole[:, start:end]), title)
    return gauge


@check(
    "grouped heads equal repeated heads",
    "attention",
    look_at="the order of heads: query head h uses key/value head h // (H / G)",
)
def grouped_values(bench: Bench) -> Gauge:
    """G < H key/value heads give the same output as each of them repeated H / G times."""
    if not bench.supports("gqa"):
        raise NotApplicable(
            "it does not declare gqa; the line on n_kv_head shows that fewer key/value heads are refused"
        )
    gauge = Gauge(1e-5, "relative difference")
    for label, cls in bench.variants():
        for heads in (2, 1):
            q, k, v = _inputs(13, heads)
            repeated = (t.repeat_interleave(HEADS // heads, dim=2) for t in (k, v))
            kernel = cls(HEADS, HEAD_DIM)
            gauge.record(relative(kernel(q, k, v), kernel(q, *repeated)), f"G={heads}{label}")
    return gauge


@check(
    "document mask isolates each document",
    "attention",
    look_at="mask.documents (B,S): a query may use only keys with its own document id",
)
def documents_alone(bench: Bench) -> Gauge:
    """Under a document mask, every document gives the same output as alone; so do queries at an offset."""
    if not bench.supports("documents"):
        raise NotApplicable("it does not declare documents, so Experiment.mask_documents is refused with it")
    gauge, document_ids = (
        Gauge(1e-5, "relative difference"),
        torch.tensor([[0] * 5 + [1] * 8, [0] * 1 + [1] * 2 + [2] * 10]),
    )
    for label, cls in bench.variants():
        q, k, v = _inputs(13)
        kernel = cls(HEADS, HEAD_DIM)
        out = kernel(q, k, v, _mask(13, documents=document_ids))
        for row, ids in enumerate(document_ids):
            for document in ids.unique():
                alone = kernel(*(t[row : row + 1, ids == document] for t in (q, k, v)))
                gauge.record(relative(out[row : row + 1, ids == document], alone), f"T=13{label}")
        if bench.supports("offset"):
            from_offset = kernel(q[:, 6:], k, v, Mask(torch.tensor(6), 7, 13, document_ids, None))
            gauge.record(relative(from_offset, out[:, 6:]), f"T=7, S=13{label}")
    return gauge


def _inputs(length: int, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """Random q (B,T,H,D), k and v (B,T,G,D), with G = ``heads``."""
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(2, length, HEADS, HEAD_DIM, generator=generator)
    return q, *torch.randn(2, 2, length, heads, HEAD_DIM, generator=generator)


def _mask(length: int, documents: Tensor | None = None, bias: Tensor | None = None) -> Mask:
    """A mask for a whole sequence: documents (B,T), bias (H,T,T)."""
    return Mask(torch.tensor(0), length, length, documents, bias)


def _gauge_refused(bench: Bench, feature: str, **changes: Any) -> Gauge:
    """A gauge for a feature that the part does not declare. Raises Broken if a model that needs it can be built."""
    try:
        bench.model(**changes)
    except ValueError:
        gauge = Gauge(note="refused when built")
        gauge.record(0, f"{feature} not declared")
        return gauge
    raise Broken(
        f"it does not declare {feature}, but a model that needs it was built, which must be refused; declare "
        f'supports = {{"{feature}"}} if the kernel implements it'
    )


def _gauge_no_cache(bench: Bench) -> Gauge:
    """A gauge for a part that does not declare offset. Raises Broken if the model keeps a cache nevertheless."""
    if new_cache(bench.model(), 1) is not None:
        raise Broken(
            "it does not declare offset, but the model keeps a cache, which it must not; declare supports = "
            '{"offset"} if the kernel applies mask.start'
        )
    gauge = Gauge(note="no cache is kept, so generation computes every token again")
    gauge.record(0, f"offset not declared, C={DIM}")
    return gauge
