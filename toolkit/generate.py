"""``python -m toolkit.generate RUN --prompt "Once upon a time"``: text from a checkpoint, as it is sampled."""

from __future__ import annotations

import argparse
import sys

from toolkit.command import run_command, take_imports
from toolkit.output import escape


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

    def on_slide():
        print(f"\n[past the context of {run.model.max_len} tokens: the window slides]", file=sys.stderr)

    ids = [int(i) for i in run.tokenizer.encode(prompt)] or [run.tokenizer.eot]
    options = {"temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p}
    options |= {"compiled": arguments.compile}
    with autocast(run.experiment, run.device), torch.no_grad(), watched(run.device):
        tokens = stream(
            run.model, ids, arguments.max_tokens, num=arguments.num, seed=arguments.seed, on_slide=on_slide, **options
        )
        if arguments.num == 1:
            _print_while_sampling(tokens, ids, run.tokenizer)
        else:
            _print_all(tokens, ids, run.tokenizer, arguments.num)
    return 0


def _prompt(given: str) -> str:
    """The prompt, or the text on standard input if the prompt is "-". Raises ValueError if it is not UTF-8."""
    try:
        data = sys.stdin.buffer.read() if given == "-" else given.encode("utf-8", "surrogateescape")
        text = data.decode("utf-8")
    except UnicodeEncodeError as error:
        character = given[error.start]
        raise ValueError(
            f"--prompt is not text: {ascii(character)} at character {error.start} is half of a character"
        ) from error
    except UnicodeDecodeError as error:
        where = "standard input" if given == "-" else "--prompt"
        raise ValueError(
            f"{where} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; convert the text"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").rstrip("\n") if given == "-" else text


def _safe_for_output(text: str) -> str:
    """Escape control characters in a model's text if it goes to a terminal, which would obey them."""
    return escape.block(text) if sys.stdout.isatty() else text


def _print_while_sampling(tokens, ids, tokenizer):
    """Print the text token by token. A character made of several tokens is printed after its last token."""
    printed = tokenizer.decode(ids)
    print(_safe_for_output(printed), end="", flush=True)
    for chosen in tokens:
        if chosen.item() == tokenizer.eot:
            break
        ids.append(chosen.item())
        text = tokenizer.decode(ids)
        if text.startswith(printed) and not text.endswith("\ufffd"):
            print(_safe_for_output(text[len(printed) :]), end="", flush=True)
            printed = text
    print(_safe_for_output(tokenizer.decode(ids)[len(printed) :]))


def _print_all(tokens, ids, tokenizer, num):
    """Print all samples, once each has reached the end of its document or the maximum length."""
    samples = [list(ids) for _ in range(num)]
    unfinished = set(range(num))
    for chosen in tokens:
        for i in list(unfinished):
            if chosen[i].item() == tokenizer.eot:
                unfinished.remove(i)
            else:
                samples[i].append(chosen[i].item())
        if not unfinished:
            break
    for i, sample in enumerate(samples, 1):
        print(f"--- {i} of {num} ---\n{_safe_for_output(tokenizer.decode(sample))}\n")


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m toolkit.generate", description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "run", metavar="RUN|CHECKPOINT", help="a run (its best checkpoint is used) or a checkpoint folder"
    )
    parser.add_argument("--prompt", default="Once upon a time", help="text to continue; - reads it from standard input")
    parser.add_argument("--max-tokens", type=_count, default=256, help="stop after so many (default 256)")
    parser.add_argument("--temperature", type=_temperature, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=_count, help="sample from the k likeliest tokens only")
    parser.add_argument("--top-p", type=_fraction, help="sample from the likeliest tokens that together reach p")
    parser.add_argument("--seed", type=_seed, default=0, help="of the sampling (default 0)")
    take_imports(parser)
    parser.add_argument("--num", type=_count, default=1, help="samples to draw (default 1)")
    parser.add_argument("--compile", action="store_true", help="compile the step first: for long texts on a GPU")
    return parser.parse_args(argv)


def _count(text):
    return _integer_between(text, 1, 10**7)


def _seed(text):
    return _integer_between(text, 0, 2**63 - 1)


def _integer_between(text, least, most):
    if not text.strip().lstrip("+-").isdecimal() or len(text) > 30 or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not an integer from {least} to {most}")
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
