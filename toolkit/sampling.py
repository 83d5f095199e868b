"""Text from a model: token by token, with caches where the model keeps them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from toolkit.context import Context


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
    on_slide: Callable[[], None] | None = None,
) -> Iterator[Tensor]:
    """Continue ``ids`` by ``count`` tokens, ``num`` times at once: yields a (num,) int64 tensor per token.

    Keys and values of earlier tokens are kept in caches of fixed size where the model has them (``cache=False``
    recomputes; the tokens are the same). When the context is full, the window moves on by half of it, and ``on_slide``
    is called the first time. ``temperature`` 0 takes the likeliest token; ``top_k`` keeps the k likeliest, ``top_p``
    the fewest whose probabilities reach p."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.empty(num, len(ids) + count, dtype=torch.int64, device=device)
    tokens[:, : len(ids)] = torch.tensor(ids, device=device)
    half = max(1, model.max_len // 2)
    start, seen = 0, 0
    with torch.inference_mode():
        caches = model.init_cache(num) if cache else None
    for length in range(len(ids), len(ids) + count):
        slid = half * -(-max(0, length - model.max_len) // half)
        if slid != start:
            if start == 0 and on_slide:
                on_slide()
            start, seen = slid, 0
        with torch.inference_mode():  # around a step, and never around the caller's code
            context = None
            if caches is not None:
                context = Context(cache=caches, start=torch.tensor(seen, device=device), end=length - start)
            hidden, head = model(tokens[:, start + seen : length], context)
            seen = 0 if caches is None else length - start
            logits = head.logits(hidden[:, -1]).float()
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


def _choose(logits, temperature, top_k, top_p, generator):
    """(num, V) -> (num,), one draw each."""
    if temperature == 0:
        return logits.argmax(-1)
    tokens = None  # of the columns; None where these are the vocabulary in its order
    if top_k is not None:
        logits, tokens = logits.topk(min(top_k, logits.shape[-1]))
    probabilities = (logits / temperature).softmax(-1)
    if top_p is not None:
        probabilities, order = _nucleus(probabilities, top_p)
        tokens = order if tokens is None else tokens.gather(-1, order)
    reached = probabilities.cumsum(-1)
    # Above 0, so that no token without probability is drawn, and never above the last sum, whatever that rounds to.
    level = reached[:, -1:] * (1 - torch.rand(len(logits), 1, generator=generator, device=logits.device))
    drawn = torch.searchsorted(reached, level)
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
