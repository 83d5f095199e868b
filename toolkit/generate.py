"""``python -m toolkit.generate RUN --prompt "Once upon a time"``: text from a checkpoint, as it is sampled."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

from toolkit.command import run_command


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
) -> Iterator:
    """Continue ``ids`` by ``count`` tokens, ``num`` times at once: yields a (num,) int64 tensor per token.

    Keys and values of earlier tokens are kept in caches of fixed size where the model has them (``cache=False``
    recomputes; the tokens are the same). When the context is full, the window moves on by half of it, and ``on_slide``
    is called the first time. ``temperature`` 0 takes the likeliest token; ``top_k`` keeps the k likeliest, ``top_p``
    the fewest whose probabilities reach p."""
    import torch

    from toolkit.context import Context

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
    import torch

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


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(argv)
    import torch

    from toolkit.compose import open_run
    from toolkit.train import autocast

    run = open_run(arguments.run)
    prompt = sys.stdin.read().rstrip("\n") if arguments.prompt == "-" else arguments.prompt
    print(f"{run.checkpoint} on {run.device.type}", file=sys.stderr)

    def on_slide():
        print(f"\n[past the context of {run.model.max_len} tokens: the window slides]", file=sys.stderr)

    ids = [int(i) for i in run.tokenizer.encode(prompt)] or [run.tokenizer.eot]
    options = {"temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p}
    with autocast(run.experiment, run.device), torch.no_grad():
        tokens = stream(
            run.model, ids, arguments.max_tokens, num=arguments.num, seed=arguments.seed, on_slide=on_slide, **options
        )
        if arguments.num == 1:
            _print_as_sampled(tokens, ids, run.tokenizer)
        else:
            _print_all(tokens, ids, run.tokenizer, arguments.num)
    return 0


def _print_as_sampled(tokens, ids, tokenizer):
    """Print what has become certain: a character of several tokens appears when its last byte is there."""
    shown = tokenizer.decode(ids)
    print(shown, end="", flush=True)
    for chosen in tokens:
        if chosen.item() == tokenizer.eot:
            break
        ids.append(chosen.item())
        text = tokenizer.decode(ids)
        if text.startswith(shown) and not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(ids)[len(shown) :])


def _print_all(tokens, ids, tokenizer, num):
    samples = [list(ids) for _ in range(num)]
    open_ones = set(range(num))
    for chosen in tokens:
        for i in list(open_ones):
            if chosen[i].item() == tokenizer.eot:
                open_ones.remove(i)
            else:
                samples[i].append(chosen[i].item())
        if not open_ones:
            break
    for i, sample in enumerate(samples, 1):
        print(f"--- {i} of {num} ---\n{tokenizer.decode(sample)}\n")


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m toolkit.generate", description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "run", metavar="RUN|CHECKPOINT", help="a run (its best checkpoint is used) or a checkpoint folder"
    )
    parser.add_argument("--prompt", default="Once upon a time", help="text to continue; - reads it from standard input")
    parser.add_argument("--max-tokens", type=_positive, default=256, help="stop after so many (default 256)")
    parser.add_argument("--temperature", type=_temperature, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=_positive, help="sample from the k likeliest tokens only")
    parser.add_argument("--top-p", type=_fraction, help="sample from the likeliest tokens that together reach p")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument("--num", type=_positive, default=1, help="samples to draw (default 1)")
    return parser.parse_args(argv)


def _positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def _temperature(text):
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a temperature; it is 0 or more")
    return float(text)


def _fraction(text):
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return float(text)


if __name__ == "__main__":
    run_command(main)
