"""Checks of decoding with a cache, and of documents packed into one sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from toolkit.conformance.bench import LAYERS, MODELS, VOCAB, Bench, new_cache, position_with, relative, tokens
from toolkit.conformance.lines import Broken, Gauge, NotApplicable, check
from toolkit.context import Context

CHUNKS = {"one token at a time": [1] * 33, "chunks of 5/1/7/2/18": [5, 1, 7, 2, 18]}


@check(
    "decoding with a cache changes nothing",
    *MODELS,
    look_at="positions counted from 0 in each call, mask.start, and tensors written outside the cache",
)
def cached(bench: Bench) -> Gauge:
    """A sequence that is fed through the cache in pieces gives the hidden states of one whole forward pass."""
    gauge, ids = Gauge(1e-4, "difference between with and without the cache"), tokens(2, 33)
    for title, changes in _decoding_settings(bench):
        for label, cls in bench.variants():
            try:
                model = bench.model(cls, **changes).eval()
            except ValueError:
                continue  # refused when built; the checks of ``supports`` report it
            whole = model(ids)[0]
            for chunking, sizes in CHUNKS.items():
                cache, start, pieces = new_cache(model, 2), 0, []
                if cache is None:
                    raise NotApplicable("it keeps no cache, so generation computes every token again")
                initial_shapes = [[tensor.shape for tensor in layer] for layer in cache]
                for piece in ids.split(sizes, dim=1):
                    end = start + piece.shape[1] if sizes[0] == 1 else None  # as generation does
                    pieces.append(model(piece, Context(cache=cache, start=torch.tensor(start), end=end))[0])
                    start += piece.shape[1]
                if [[tensor.shape for tensor in layer] for layer in cache] != initial_shapes:
                    raise Broken(
                        "the cache changes its shape while decoding, and must keep it, since compiled decoding needs "
                        "tensors of a fixed size; allocate max_len positions in init_cache() and write into them"
                    )
                gauge.record(relative(torch.cat(pieces, dim=1), whole), f"{chunking}{title}{label}")
    return gauge


@check(
    "packed documents do not mix",
    *LAYERS,
    look_at="mask.documents, which separates the documents, and context.positions, which restart in each",
)
def documents(bench: Bench) -> Gauge:
    """With documents packed as by Experiment.mask_documents (positions restart): no token affects another document, a
    changed document changes its own output, and a packed document gives what it gives alone."""
    if not bench.mixer_supports("documents"):
        raise NotApplicable("it does not declare documents, so Experiment.mask_documents is refused with it")
    gauge = Gauge(1e-4, "relative difference")
    for label, model in bench.models():
        for lengths in ((9, 1, 23), (16, 16), (1, 63), (31, 2)):
            total = sum(lengths)
            ids = tokens(1, total)
            document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
            before = model(ids, Context(documents=document_ids))[0]
            after = model(torch.where(document_ids == 1, (ids + 1) % VOCAB, ids), Context(documents=document_ids))[0]
            leak = relative(after[document_ids != 1], before[document_ids != 1])
            gauge.record(leak, f"other document changed, T={total}{label}")
            if relative(after[document_ids == 1], before[document_ids == 1]) < 1e-4:
                raise Broken(
                    f"changing document 1 of the lengths {lengths} does not change its own output, as it must; look at "
                    "the document mask, which must let a token see its own document"
                )
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
            packed = model(ids, Context(positions, document_ids))[0].split(lengths, dim=1)
            for document, hidden in zip(ids.split(lengths, dim=1), packed, strict=True):
                gauge.record(relative(hidden, model(document)[0]), f"packed and alone, T={total}{label}")
    return gauge


def _decoding_settings(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """(title, changes) of further models for a mixer or kernel: with other position parts, and with fewer key/value
    heads."""
    yield "", {}
    if bench.kind in ("mixer", "attention"):
        for method in ("embed", "score_bias"):
            position = position_with(method)
            if position is not None:
                yield f", {position.__name__}", {"position": position}
        yield ", n_kv_head=2", {"n_kv_head": 2}
