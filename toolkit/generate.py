"""``python -m toolkit.generate RUN --prompt "Once upon a time"``: continue a text with a trained model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from toolkit.command import add_import_flags, run_command
from toolkit.output import escape

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.protocols import Tokenizer


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns the exit code; raises ValueError for an error that the user can correct."""
    arguments = _arguments(argv)
    import torch

    from toolkit.compose import open_run
    from toolkit.cpu import openmp
    from toolkit.cpu.neighbours import watched
    from toolkit.experiment import autocast
    from toolkit.loop.sampling import stream

    prompt = _prompt(arguments.prompt)
    run = open_run(arguments.run, imports=arguments.imports, code=not arguments.no_code)
    openmp.use_threads(run.experiment.threads)
    print(escape.line(f"{run.checkpoint} on {run.device.type}"), file=sys.stderr)

    def report_slide() -> None:
        context = f"context of {run.model.max_len} tokens is full"
        print(f"\n[the {context}: from here on, the window slides]", file=sys.stderr)

    ids = [int(i) for i in run.tokenizer.encode(prompt)] or [run.tokenizer.eot]
    with autocast(run.experiment, run.device), torch.no_grad(), watched(run.device):
        tokens = stream(
            run.model,
            ids,
            arguments.max_tokens,
            num=arguments.num,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            compiled=arguments.compile,
            on_slide=report_slide,
        )
        if arguments.num == 1:
            _print_while_sampling(tokens, ids, run.tokenizer)
        else:
            _print_all(tokens, ids, run.tokenizer, arguments.num)
    return 0


def _prompt(given: str) -> str:
    """The prompt, or the text on standard input if the prompt is "-". Raises ValueError if the text is not UTF-8."""
    try:
        data = sys.stdin.buffer.read() if given == "-" else given.encode("utf-8", "surrogateescape")
        text = data.decode("utf-8")
    except UnicodeEncodeError as error:
        character = given[error.start]
        raise ValueError(
            f"--prompt is not text: {ascii(character)} at character {error.start} is half of a character; remove it"
        ) from error
    except UnicodeDecodeError as error:
        where = "standard input" if given == "-" else "--prompt"
        raise ValueError(
            f"{where} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; convert the text to UTF-8"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").rstrip("\n") if given == "-" else text


def _safe_for_output(text: str) -> str:
    """Escape control characters in the text if standard output is a terminal, which would obey them."""
    return escape.block(text) if sys.stdout.isatty() else text


def _print_while_sampling(tokens: Iterator[Tensor], ids: list[int], tokenizer: Tokenizer) -> None:
    """Print the text token by token; each of ``tokens`` is (1,). A character made of several tokens is printed after
    its last token. ``ids`` holds the prompt; the new ids are appended to it."""
    printed = tokenizer.decode(ids)
    print(_safe_for_output(printed), end="", flush=True)
    for chosen in tokens:
        if chosen.item() == tokenizer.eot:
            break
        ids.append(int(chosen.item()))
        text = tokenizer.decode(ids)
        if text.startswith(printed) and not text.endswith("\ufffd"):
            print(_safe_for_output(text[len(printed) :]), end="", flush=True)
            printed = text
    print(_safe_for_output(tokenizer.decode(ids)[len(printed) :]))


def _print_all(tokens: Iterator[Tensor], ids: list[int], tokenizer: Tokenizer, num: int) -> None:
    """Print ``num`` samples after all of them have ended, at the end of a document or at the maximum length. ``ids`` is
    the prompt; each of ``tokens`` is (num,)."""
    samples = [list(ids) for _ in range(num)]
    unfinished = set(range(num))
    for chosen in tokens:
        for i in list(unfinished):
            if chosen[i].item() == tokenizer.eot:
                unfinished.remove(i)
            else:
                samples[i].append(int(chosen[i].item()))
        if not unfinished:
            break
    for i, sample in enumerate(samples, 1):
        print(f"--- {i} of {num} ---\n{_safe_for_output(tokenizer.decode(sample))}\n")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toolkit.generate",
        description="Continue a text with a trained model, and print it while it is sampled.",
    )
    add = parser.add_argument
    add("run", metavar="RUN|CHECKPOINT", help="folder of a checkpoint, or of a run (its best checkpoint is used)")
    add(
        "--prompt",
        metavar="TEXT",
        default="Once upon a time",
        help="text to continue; '-' reads it from standard input (default: 'Once upon a time')",
    )
    add("--max-tokens", metavar="N", type=_count, default=256, help="sample at most N tokens (default: 256)")
    add(
        "--temperature",
        metavar="T",
        type=_temperature,
        default=0.8,
        help="the logits are divided by T; with 0, the likeliest token is taken each time (default: 0.8)",
    )
    add("--top-k", metavar="K", type=_count, help="sample from the K likeliest tokens only")
    add(
        "--top-p",
        metavar="P",
        type=_fraction,
        help="sample from the fewest tokens whose probabilities sum to P",
    )
    add("--seed", metavar="N", type=_seed, default=0, help="seed of the random sampling (default: 0)")
    add_import_flags(parser)
    add("--num", metavar="N", type=_count, default=1, help="number of samples (default: 1)")
    add("--compile", action="store_true", help="compile the model first: slow, but worth it for long texts on a GPU")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    return _integer_between(text, 1, 10**7)


def _seed(text: str) -> int:
    return _integer_between(text, 0, 2**63 - 1)


def _integer_between(text: str, least: int, most: int) -> int:
    if not text.strip().lstrip("+-").isdecimal() or len(text) > 30 or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not an integer from {least} to {most}")
    return int(text)


def _temperature(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return float(text)


def _fraction(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and at most 1")
    return float(text)


if __name__ == "__main__":
    run_command(main)
