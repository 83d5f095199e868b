"""Checks of an attention kernel by itself: what ``supports`` declares, it does."""

from __future__ import annotations

import torch

from toolkit.conformance.bench import DIM, HEAD_DIM, HEADS, Bench, position_with, relative
from toolkit.conformance.report import Broken, Gauge, NotApplicable, check
from toolkit.context import Mask


@check("values of another width", "attention")
def value_width(bench: Bench) -> Gauge:
    """v (B,S,G,Dv) with Dv other than D gives (B,T,H,Dv), each channel as if it stood alone."""
    gauge = Gauge(1e-5)
    for label, cls in bench.variants():
        q, k, v = _inputs(13)
        kernel, wide = cls(HEADS, HEAD_DIM), torch.cat((v, 2 * v), dim=-1)
        gauge.see(relative(kernel(q, k, wide), torch.cat((kernel(q, k, v), 2 * kernel(q, k, v)), -1)), f"Dv=16{label}")
    return gauge


@check("bias honoured", "attention")
def bias(bench: Bench) -> Gauge:
    """A bias of 0 changes nothing; one of -10,000 on a key removes that key for that head and query, and no other."""
    if not bench.supports("bias"):
        return _refused(bench, "bias", position=position_with("score_bias"))
    gauge = Gauge(1e-5)
    for label, cls in bench.variants():
        for length in (2, 13, 64):
            q, k, v = _inputs(length)
            kernel, none, removed = cls(HEADS, HEAD_DIM), torch.zeros(HEADS, length, length), length - 2
            out = kernel(q, k, v, _mask(length, bias=none))
            gauge.see(relative(out, kernel(q, k, v)), f"zero, T={length}{label}")
            away = none.clone()
            away[1, -1, removed] = -1e4  # head 1, the last query
            k2, v2 = k.clone(), v.clone()
            k2[:, removed], v2[:, removed] = k[:, removed] + 1, v[:, removed] + 1
            one, other = (kernel(q, a, b, _mask(length, bias=away)) for a, b in ((k, v), (k2, v2)))
            gauge.see(relative(other[:, -1, 1], one[:, -1, 1]), f"key removed, T={length}{label}")
            untouched = one.clone()
            untouched[:, -1, 1] = out[:, -1, 1]
            gauge.see(relative(untouched, out), f"other heads and queries, T={length}{label}")
            if relative(one[:, -1, 1], out[:, -1, 1]) < 1e-4:
                raise Broken(f"a bias of -10,000 moves nothing at T={length}{label}")
    return gauge


@check("offset honoured", "attention")
def offset(bench: Bench) -> Gauge:
    """Queries that start at an offset get the rows that they get in the whole sequence, alone and under a bias; keys
    that are not yet written (beyond the last query) are not seen."""
    if not bench.supports("offset"):
        return _cacheless(bench)
    gauge = Gauge(1e-5)
    biases = [None, torch.randn(HEADS, 33, 33)] if bench.supports("bias") else [None]
    for label, cls in bench.variants():
        q, k, v = _inputs(33)
        kernel = cls(HEADS, HEAD_DIM)
        for given in biases:
            whole = kernel(q, k, v, None if given is None else _mask(33, bias=given))
            for start, end in ((0, 1), (0, 4), (4, 5), (4, 13), (32, 33)):
                part = None if given is None else given[:, start:end]
                mask = Mask(torch.tensor(start), end - start, 33, None, part)
                title = "T={}, S=33{}{}".format(end - start, label, "" if given is None else ", bias")
                gauge.see(relative(kernel(q[:, start:end], k, v, mask), whole[:, start:end]), title)
    return gauge


@check("grouped heads equal repeated heads", "attention")
def grouped_values(bench: Bench) -> Gauge:
    """G < H key/value heads give what each of them repeated H / G times gives."""
    if not bench.supports("gqa"):
        raise NotApplicable("it does not declare gqa; the line on grouped heads shows that they are refused")
    gauge = Gauge(1e-5)
    for label, cls in bench.variants():
        for heads in (2, 1):
            q, k, v = _inputs(13, heads)
            repeated = (t.repeat_interleave(HEADS // heads, dim=2) for t in (k, v))
            kernel = cls(HEADS, HEAD_DIM)
            gauge.see(relative(kernel(q, k, v), kernel(q, *repeated)), f"G={heads}{label}")
    return gauge


@check("each document as if alone", "attention")
def documents_alone(bench: Bench) -> Gauge:
    """Under a document mask every document gets what it gets by itself, also queries at an offset."""
    if not bench.supports("documents"):
        raise NotApplicable("it does not declare documents: Experiment.mask_documents is refused with it")
    gauge, index = Gauge(1e-5), torch.tensor([[0] * 5 + [1] * 8, [0] * 1 + [1] * 2 + [2] * 10])
    for label, cls in bench.variants():
        q, k, v = _inputs(13)
        kernel = cls(HEADS, HEAD_DIM)
        out = kernel(q, k, v, _mask(13, documents=index))
        for row, ids in enumerate(index):
            for document in ids.unique():
                alone = kernel(*(t[row : row + 1, ids == document] for t in (q, k, v)))
                gauge.see(relative(out[row : row + 1, ids == document], alone), f"T=13{label}")
        if bench.supports("offset"):
            late = kernel(q[:, 6:], k, v, Mask(torch.tensor(6), 7, 13, index, None))
            gauge.see(relative(late, out[:, 6:]), f"T=7, S=13{label}")
    return gauge


def _inputs(length, heads=HEADS):
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(2, length, HEADS, HEAD_DIM, generator=generator)
    return q, *torch.randn(2, 2, length, heads, HEAD_DIM, generator=generator)


def _mask(length, documents=None, bias=None):
    return Mask(torch.tensor(0), length, length, documents, bias)


def _refused(bench, what, **changes):
    """Not declared: the model has to refuse it when it is built."""
    try:
        bench.model(**changes)
    except ValueError:
        gauge = Gauge(note="refused when built")
        gauge.see(0, f"{what} not declared")
        return gauge
    raise Broken(f"does not declare {what}, yet a model that needs it was built")


def _cacheless(bench):
    """No offset declared: then no mixer may keep a cache for it."""
    if bench.model().init_cache(1) is not None:
        raise Broken("does not declare offset, yet the model keeps a cache for it")
    gauge = Gauge(note="no cache is kept: generation recomputes")
    gauge.see(0, f"offset not declared, C={DIM}")
    return gauge
