"""Generates text with a model, token by token, with key and value caches if the model has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from toolkit.context import Caches, Context
from toolkit.protocols import Model, Tokenizer

MAX_TEMPERATURE = 1e30  # higher temperatures are lowered to this; infinity would make impossible tokens possible
MIN_TEMPERATURE = 1e-30  # lower temperatures count as 0: the likeliest token is taken


class BrokenModel(ValueError):
    """The model's logits are not finite, so no token can be drawn."""


def stream(
    model: nn.Module,
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
    """Continue ``ids`` by ``count`` tokens, as ``num`` samples in parallel. Yields a (num,) int64 tensor per token.

    Caches, if the model has them, keep the keys and values of earlier tokens. ``cache=False`` recomputes all tokens and
    gives the same text. When the context is full, the window moves by half its length; ``on_slide`` is called the first
    time. ``temperature`` 0 takes the likeliest token. ``top_k`` draws from the k likeliest tokens only, ``top_p`` from
    the fewest tokens whose probabilities sum to p. ``compiled`` compiles the step of one token and replays it as one
    CUDA graph. Compiling takes a minute, so it saves time only for many tokens on a GPU.

    Raises ValueError for ``compiled`` with a model without caches, and BrokenModel for logits that are not finite."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.empty(num, len(ids) + count, dtype=torch.int64, device=device)
    tokens[:, : len(ids)] = torch.tensor(ids, device=device)
    max_len = cast(Model, model).max_len  # nn.Module declares every attribute as Tensor | Module
    half_window = max(1, max_len // 2)
    start, cached = 0, 0
    with torch.inference_mode():
        init_cache = getattr(model, "init_cache", None) if cache else None
        caches = init_cache(num) if init_cache else None
    if compiled and caches is None:
        raise ValueError("a compiled step needs a cache, but a part of this model has none: do not compile")
    replay = _compiled(model, caches) if compiled and caches is not None else None
    for length in range(len(ids), len(ids) + count):
        window_start = half_window * -(-max(0, length - max_len) // half_window)
        if window_start != start:
            if start == 0 and on_slide:
                on_slide()
            start, cached = window_start, 0
        with torch.inference_mode():  # around each step only, not around the caller's code
            input_ids, cache_end = tokens[:, start + cached : length], torch.tensor(cached, device=device)
            if caches is None:
                logits = _logits(model, input_ids, None)
            elif replay is None or input_ids.shape[1] > 1:
                logits = _logits(model, input_ids, Context(cache=caches, start=cache_end, end=length - start))
            else:
                logits = replay(input_ids, cache_end)
            cached = 0 if caches is None else length - start
            tokens[:, length] = _choose(logits, temperature, top_k, top_p, generator)
        yield tokens[:, length]


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cache: bool = True,
) -> str:
    """Return the prompt with its continuation, up to the end of the document or ``max_tokens`` tokens. The keywords are
    those of ``stream``."""
    ids = list(tokenizer.encode(prompt)) or [tokenizer.eot]
    tokens = stream(model, ids, max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, cache=cache)
    for chosen in tokens:
        token = int(chosen.item())
        if token == tokenizer.eot:
            break
        ids.append(token)
    return tokenizer.decode(ids)


def _logits(model: nn.Module, ids: Tensor, context: Context | None) -> Tensor:
    """ids (num, T) -> the logits after the last token, (num, V) in float32."""
    hidden, head = model(ids, context)
    return head.logits(hidden[:, -1]).float()


def _compiled(model: nn.Module, caches: Caches) -> Callable[[Tensor, Tensor], Tensor]:
    """Compile the step of one token: (ids (num, 1), start ()) -> logits (num, V), which the next call overwrites."""
    for layer in caches:
        for tensor in layer:
            torch._dynamo.mark_static_address(tensor)  # a CUDA graph may write in place only to such tensors

    @partial(torch.compile, fullgraph=True, dynamic=False, mode="reduce-overhead")
    def step(ids: Tensor, caches: Caches, start: Tensor) -> Tensor:
        return _logits(model, ids, Context(cache=caches, start=start))

    def replay(ids: Tensor, start: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return step(ids.contiguous(), caches, start)

    return replay


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draw a token from each row: (num, V) -> (num,). Raises BrokenModel if a row has NaN, +inf or only -inf."""
    largest = logits.amax(-1, keepdim=True)
    if not largest.isfinite().all():
        raise BrokenModel(
            "the model's logits are not finite: its weights are broken, or its training diverged; use an earlier "
            "checkpoint"
        )
    if temperature < MIN_TEMPERATURE:
        return logits.argmax(-1)
    token_of_column = None  # the token of each column; None while column i is token i
    if top_k is not None:
        logits, token_of_column = logits.topk(min(top_k, logits.shape[-1]))
    temperature = min(temperature, MAX_TEMPERATURE)
    scaled = logits / temperature
    if temperature < 1:  # logits / temperature may overflow; without the largest logit it does not
        shifted = (logits - largest) / temperature
        scaled = torch.where(scaled.abs().amax(-1, keepdim=True).isfinite(), scaled, shifted)
    probabilities = scaled.softmax(-1)
    if top_p is not None:
        probabilities, order = _nucleus(probabilities, top_p)
        token_of_column = order if token_of_column is None else token_of_column.gather(-1, order)
    cumulative = probabilities.cumsum(-1)
    # The threshold is above 0, so no token of probability 0 is drawn. Rounded, it is still at most the last sum.
    threshold = cumulative[:, -1:] * (1 - torch.rand(len(logits), 1, generator=generator, device=logits.device))
    drawn = torch.searchsorted(cumulative, threshold).clamp_(max=cumulative.shape[-1] - 1)
    return (drawn if token_of_column is None else token_of_column.gather(-1, drawn))[:, 0]


def _nucleus(probabilities: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Sort by probability, keep the fewest tokens that together reach ``p``, and set the others to 0. Returns
    probabilities and indices, both (num, K). Sorting a large vocabulary would take longer than the forward pass, so a
    small K is tried first."""
    for k in (256, 4096, probabilities.shape[-1]):
        kept, order = probabilities.topk(min(k, probabilities.shape[-1]))
        is_surplus = kept.cumsum(-1) - kept >= p  # the sum before this token already reaches p
        if is_surplus[:, -1].all():
            break
    return kept.masked_fill(is_surplus, 0.0), order
