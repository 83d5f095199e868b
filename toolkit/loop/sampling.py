"""Text from a model: token by token, with caches where the model keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from toolkit.context import Context

HOTTEST = 1e30  # a higher temperature draws evenly, as this does; infinity would give impossible tokens a chance
COLDEST = 1e-30  # a lower temperature leaves all but the likeliest token without a chance, as 0 does


class BrokenModel(ValueError):
    """The model's logits are not finite, so no token can be drawn."""


def stream(
    model,
    ids: list[int],
    count: int,
    *,
    num: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cache: bool = True,
    compiled: bool = False,
    on_slide: Callable[[], None] | None = None,
) -> Iterator[Tensor]:
    """Continue ``ids`` by ``count`` tokens, ``num`` times at once: yields a (num,) int64 tensor per token.

    Keys and values of earlier tokens are kept in caches of fixed size where the model has them (``cache=False``
    recomputes; the tokens are the same). When the context is full, the window moves on by half of it, and ``on_slide``
    is called the first time. ``temperature`` 0 takes the likeliest token; ``top_k`` keeps the k likeliest, ``top_p``
    the fewest whose probabilities reach p. ``compiled`` compiles the step of one token, which on a GPU is then replayed
    as one CUDA graph: for many tokens on a GPU, since it takes a minute and gains nothing on a CPU. Raises ValueError
    where it is asked of a model that keeps no cache, and BrokenModel for logits that are not finite."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.empty(num, len(ids) + count, dtype=torch.int64, device=device)
    tokens[:, : len(ids)] = torch.tensor(ids, device=device)
    half = max(1, model.max_len // 2)
    start, seen = 0, 0
    with torch.inference_mode():
        caches = model.init_cache(num) if cache else None
    if compiled and caches is None:
        raise ValueError("a compiled step needs a cache, and some part of this model keeps none: leave out compiled")
    replay = _compiled(model, caches) if compiled else None
    for length in range(len(ids), len(ids) + count):
        slid = half * -(-max(0, length - model.max_len) // half)
        if slid != start:
            if start == 0 and on_slide:
                on_slide()
            start, seen = slid, 0
        with torch.inference_mode():  # around a step, and never around the caller's code
            new, at = tokens[:, start + seen : length], torch.tensor(seen, device=device)
            if caches is None:
                logits = _logits(model, new, None)
            elif replay is None or new.shape[1] > 1:
                logits = _logits(model, new, Context(cache=caches, start=at, end=length - start))
            else:
                logits = replay(new, at)
            seen = 0 if caches is None else length - start
            tokens[:, length] = _choose(logits, temperature, top_k, top_p, generator)
        yield tokens[:, length]


def generate(model, tokenizer, prompt: str, max_tokens: int, **options) -> str:
    """The prompt and its continuation, which ends at the end of the document or after ``max_tokens``. ``options`` are
    those of ``stream``."""
    ids = list(tokenizer.encode(prompt)) or [tokenizer.eot]
    for chosen in stream(model, ids, max_tokens, **options):
        if chosen.item() == tokenizer.eot:
            break
        ids.append(chosen.item())
    return tokenizer.decode(ids)


def _logits(model, ids, context):
    """(num, T) -> (num, V) in float32: those after the last token."""
    hidden, head = model(ids, context)
    return head.logits(hidden[:, -1]).float()


def _compiled(model, caches):
    """(ids (num, 1), start) -> logits (num, V), which the next call overwrites."""
    for layer in caches:
        for tensor in layer:
            torch._dynamo.mark_static_address(tensor)  # written in place, which a CUDA graph allows only of such

    @partial(torch.compile, fullgraph=True, dynamic=False, mode="reduce-overhead")
    def step(ids, caches, start):
        return _logits(model, ids, Context(cache=caches, start=start))

    def replay(ids, start):
        torch.compiler.cudagraph_mark_step_begin()
        return step(ids.contiguous(), caches, start)

    return replay


def _choose(logits, temperature, top_k, top_p, generator):
    """(num, V) -> (num,), one draw each. Raises BrokenModel for logits that are not finite, or all minus infinity."""
    largest = logits.amax(-1, keepdim=True)
    if not largest.isfinite().all():
        raise BrokenModel(
            "the model's logits are not finite: its weights are broken, or its training diverged; use an earlier "
            "checkpoint"
        )
    if temperature < COLDEST:
        return logits.argmax(-1)
    tokens = None  # of the columns; None where these are the vocabulary in its order
    if top_k is not None:
        logits, tokens = logits.topk(min(top_k, logits.shape[-1]))
    temperature = min(temperature, HOTTEST)
    scaled = logits / temperature
    if temperature < 1:  # the quotient may be too large for a float; differences from the largest logit are not
        shifted = (logits - largest) / temperature
        scaled = torch.where(scaled.abs().amax(-1, keepdim=True).isfinite(), scaled, shifted)
    probabilities = scaled.softmax(-1)
    if top_p is not None:
        probabilities, order = _nucleus(probabilities, top_p)
        tokens = order if tokens is None else tokens.gather(-1, order)
    reached = probabilities.cumsum(-1)
    # Above 0, so that no token without probability is drawn, and never above the last sum, whatever that rounds to.
    level = reached[:, -1:] * (1 - torch.rand(len(logits), 1, generator=generator, device=logits.device))
    drawn = torch.searchsorted(reached, level).clamp_(max=reached.shape[-1] - 1)
    return (drawn if tokens is None else tokens.gather(-1, drawn))[:, 0]


def _nucleus(probabilities, p):
    """The likeliest tokens first, (num, K) probabilities and indices, 0 past those that together reach ``p``. Sorting a
    large vocabulary would cost more than the model, so it is tried with few tokens first."""
    for k in (256, 4096, probabilities.shape[-1]):
        kept, order = probabilities.topk(min(k, probabilities.shape[-1]))
        surplus = kept.cumsum(-1) - kept >= p  # the mass before a token already suffices
        if surplus[:, -1].all():
            break
    return kept.masked_fill(surplus, 0.0), order
