"""Checks of decoding with a cache, and of documents packed into one sequence."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from toolkit.conformance.bench import LAYERS, VOCAB, Bench, position_with, relative, tokens
from toolkit.conformance.lines import Broken, Gauge, NotApplicable, check
from toolkit.context import Context

CHUNKS = {"a token at a time": [1] * 33, "chunks of 5/1/7/2/18": [5, 1, 7, 2, 18]}


@check("cached equals uncached", *LAYERS, "model")
def cached(bench: Bench) -> Gauge:
    """A sequence that is fed through the cache in pieces gives the hidden states of one whole forward pass."""
    gauge, ids = Gauge(1e-4), tokens(2, 33)
    for title, changes in _decoding_settings(bench):
        for label, cls in bench.variants():
            try:
                model = bench.model(cls, **changes).eval()
            except ValueError:
                continue  # refused when built; the checks of ``supports`` report it
            if model.init_cache(2) is None:
                raise NotApplicable("it keeps no cache: generation recomputes")
            whole = model(ids)[0]
            for chunking, sizes in CHUNKS.items():
                cache, start, pieces = model.init_cache(2), 0, []
                initial_shapes = [[tensor.shape for tensor in layer] for layer in cache]
                for piece in ids.split(sizes, dim=1):
                    end = start + piece.shape[1] if sizes[0] == 1 else None  # as generation does
                    pieces.append(model(piece, Context(cache=cache, start=torch.tensor(start), end=end))[0])
                    start += piece.shape[1]
                if [[tensor.shape for tensor in layer] for layer in cache] != initial_shapes:
                    raise Broken("the cache changes its size; compiled decoding needs fixed tensors")
                gauge.record(relative(torch.cat(pieces, dim=1), whole), f"{chunking}{title}{label}")
    return gauge


@check("grouped and multi-query heads", "mixer", "attention")
def grouped(bench: Bench) -> Gauge:
    """n_kv_head < n_head is used or refused, never ignored. Used means: fewer key/value heads give fewer parameters."""
    if "n_kv_head" in getattr(bench.entry.cls, "ignores", ()):
        raise NotApplicable("it declares that it ignores n_kv_head, so binding that for it alone is refused")
    gauge = Gauge(0.0, "settings ignored")
    full_count = sum(p.numel() for p in bench.model().parameters())
    for n_kv_head in (2, 1):
        try:
            model = bench.model(n_kv_head=n_kv_head)
        except ValueError as error:
            if bench.kind == "attention" and bench.supports("gqa"):
                raise Broken(f"declares gqa, and refuses n_kv_head = {n_kv_head}: {error}") from error
            gauge.record(0, f"n_kv_head={n_kv_head}, refused when built")
            continue
        if bench.kind == "attention" and not bench.supports("gqa"):
            raise Broken(f"does not declare gqa, yet n_kv_head = {n_kv_head} was not refused")
        model(tokens(2, 13))
        ignored = sum(p.numel() for p in model.parameters()) == full_count
        gauge.record(float(ignored), f"n_kv_head={n_kv_head}")
    return gauge


@check("documents stay apart", *LAYERS)
def documents(bench: Bench) -> Gauge:
    """With documents packed as by Experiment.mask_documents (positions restart): no token affects another document, a
    changed document changes its own output, and a packed document gives what it gives alone."""
    _require_documents(bench)
    gauge = Gauge(1e-4)
    for label, model in bench.models():
        for lengths in ((9, 1, 23), (16, 16), (1, 63), (31, 2)):
            total = sum(lengths)
            ids = tokens(1, total)
            document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
            before = model(ids, Context(documents=document_ids))[0]
            after = model(torch.where(document_ids == 1, (ids + 1) % VOCAB, ids), Context(documents=document_ids))[0]
            gauge.record(relative(after[document_ids != 1], before[document_ids != 1]), f"leak, T={total}{label}")
            if relative(after[document_ids == 1], before[document_ids == 1]) < 1e-4:
                raise Broken(f"a changed document of {lengths} does not move its own output")
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
            packed = model(ids, Context(positions, document_ids))[0].split(lengths, dim=1)
            for document, hidden in zip(ids.split(lengths, dim=1), packed, strict=True):
                gauge.record(relative(hidden, model(document)[0]), f"packed against alone, T={total}{label}")
    return gauge


def _require_documents(bench: Bench) -> None:
    supports = getattr(bench.model().mixers[0], "supports", ())
    if "documents" not in supports:
        raise NotApplicable("it does not declare documents: Experiment.mask_documents is refused with it")


def _decoding_settings(bench: Bench) -> Iterator[tuple[str, dict[str, object]]]:
    """(title, changes) of further models for a mixer or kernel: with other position parts, and with fewer key/value
    heads."""
    yield "", {}
    if bench.kind in ("mixer", "attention"):
        for method in ("embed", "score_bias"):
            position = position_with(method)
            if position is not None:
                yield f", {position.__name__}", {"position": position}
        yield ", n_kv_head=2", {"n_kv_head": 2}
