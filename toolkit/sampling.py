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
    tokens = torch.tensor(ids, device=device).expand(num, -1)  # (num, n)
    half = max(1, model.max_len // 2)
    start, seen, caches = 0, 0, None
    with torch.no_grad():
        caches = model.init_cache(num) if cache else None
        for _ in range(count):
            length = tokens.shape[1]
            slid = half * -(-max(0, length - model.max_len) // half)
            if slid != start:
                if start == 0 and on_slide:
                    on_slide()
                start, seen = slid, 0
            if caches is None:
                hidden, head = model(tokens[:, start:])
            else:
                here = torch.tensor(seen, device=device)
                hidden, head = model(tokens[:, start + seen :], Context(cache=caches, start=here))
                seen = length - start
            chosen = _choose(head.logits(hidden[:, -1]).float(), temperature, top_k, top_p, generator)
            tokens = torch.cat((tokens, chosen[:, None]), dim=1)
            yield chosen


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
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, index = probabilities.sort(descending=True)
        surplus = ordered.cumsum(-1) - ordered >= top_p  # the mass before a token already suffices
        probabilities = probabilities.masked_fill(surplus.gather(-1, index.argsort(-1)), 0.0)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
