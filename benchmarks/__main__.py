"""``python -m benchmarks``: run every benchmark in turn, each in its own process, and compare the results with the
bars.

A bar is the result that we want. On a machine with a GPU the bars are those of a GPU, else those of two CPU cores. The
file (``--out``) contains all results and a description of the machine; the table says which bars were met. It takes
about 35 minutes on two cores, during which the machine should do nothing else."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import measure
from toolkit.store.disk import write_text

RUNS = {  # name -> command
    "train": ["benchmarks.train"],
    "loop": ["benchmarks.train", "--loop"],
    "loss": ["benchmarks.loss"],
    "tokenise": ["benchmarks.tokenise", "--no-hugging-face"],
    "generate": ["benchmarks.generate"],
    "evaluation": ["benchmarks.evaluation"],
    "startup": ["benchmarks.startup"],
}


@dataclass(frozen=True)
class Bar:
    """The value that we want of a figure, and how to find the figure in the results."""

    what: str
    benchmark: str
    wanted: float
    of: Callable[[dict], float]
    most: bool = False  # True: ``wanted`` is an upper bound, else a lower bound


def cpu() -> Iterator[Bar]:
    """The bars of two CPU cores."""
    for vocab, compiled, eager in ((8192, 1.1, 1.25), (100_277, 1.05, 1.3)):
        for way, wanted in (("compiled", compiled), ("eager", eager)):
            what = f"training, {way}, {vocab:,} tokens: over the fastest peer"
            yield Bar(what, "train", wanted, _step(vocab, way, lambda one: one["over_fastest_peer"]["median"]))
        for products, share in (("products by torch.mm", "of_plain"), ("products by the faster library", "of_bound")):
            what = f"training, compiled, {vocab:,} tokens: of its {products} alone"
            yield Bar(what, "train", 0.85, _step(vocab, "compiled", lambda one, share=share: one[share]["median"]))
    for way in ("compiled", "eager"):
        what = f"peak memory, {way}, 100,277 tokens: of the leanest peer's"
        yield Bar(what, "train", 0.6, _step(100_277, way, lambda one: one["memory_over_leanest"]), most=True)
    yield Bar("toolkit.run over a bare loop", "loop", 0.98, lambda found: found["tables"][0]["ratio"]["median"])
    yield Bar(
        "text to token files, over tiktoken", "tokenise", 5, lambda found: found["ours_over"]["tiktoken"]["median"]
    )
    yield from generation(1.2)
    for case in ("tiny", "default"):
        for task in ("MinimalPairs", "MultipleChoice"):
            over = _evaluation(case, lambda one, task=task: one["over_lm_eval"][task]["median"])
            yield Bar(f"{task}, {case} model: over lm-eval's loop", "evaluation", 2, over)
            share = _evaluation(case, lambda one, task=task: one["of_training"][f"{task}, toolkit"]["median"])
            yield Bar(f"{task}, {case} model: tokens/s, of training's", "evaluation", 0.1, share)
    for what, name, wanted in (
        ("--help, seconds", "python -m toolkit.run --help", 0.3),
        ("--dry-run of the default, seconds", "python -m toolkit.run --dry-run", 8),
        ("first step of tiny.gin after torch, seconds", "after torch: first step of tiny.gin", 2),
    ):
        yield Bar(what, "startup", wanted, lambda found, name=name: found["seconds"][name]["median"], most=True)


def gpu() -> Iterator[Bar]:
    """The bars of an H200, the default model."""
    for vocab, rate in ((100_277, 433_000), (50_257, 530_000)):
        tokens = _step(vocab, "compiled", lambda one: sorted(one["tokens_per_s"])[len(one["tokens_per_s"]) // 2])
        yield Bar(f"training, {vocab:,} tokens: tokens/s", "train", rate, tokens)
        over = _step(vocab, "compiled", lambda one: one["over_fastest_peer"]["median"])
        yield Bar(f"training, {vocab:,} tokens: over the fastest compiled peer", "train", 1.25, over)
    share = _step(100_277, "compiled", lambda one: one["mfu"] or 0.0)
    yield Bar("training, 100,277 tokens: of the bf16 peak, causal count", "train", 0.45, share)
    peak = _step(100_277, "compiled", lambda one: one["peak"] / 2**30)
    yield Bar("peak memory, GiB", "train", 15, peak, most=True)
    yield from generation(1.2)
    rate = _text(100_277, 1, lambda one: _middle(one, "toolkit"))
    yield Bar("generation, batch 1, 100,277 tokens: tokens/s", "generate", 3000, rate)


def generation(over_cache: float) -> Iterator[Bar]:
    """Generation against transformers'."""
    for batch in (1, 8):
        again = _text(8192, batch, lambda one: one["ratio"]["transformers, recomputing"]["median"])
        yield Bar(f"512 new tokens, batch {batch}: over recomputation", "generate", 8, again)
        for vocab in (8192, 100_277):
            cached = _text(vocab, batch, lambda one: one["ratio"]["transformers"]["median"])
            what = f"generation, batch {batch}, {vocab:,} tokens: over transformers' cache"
            yield Bar(what, "generate", over_cache, cached)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns 0 if every benchmark ran, whether or not its bars were met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n\n")[1])
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="file for all results")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help=", ".join(RUNS))
    arguments = parser.parse_args(argv)
    found = {}
    for name in arguments.only:
        found[name] = _run(RUNS[name])
        if arguments.out:  # after each benchmark, so that its results remain if the next one fails
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(arguments.out, json.dumps(found, indent=1) + "\n")
    bars = [bar for bar in (gpu() if torch.cuda.is_available() else cpu()) if bar.benchmark in found]
    rows = []
    for bar in bars:
        value = bar.of(found[bar.benchmark])
        met = value <= bar.wanted if bar.most else value >= bar.wanted
        sign = "at most" if bar.most else "at least"
        rows.append([bar.what, f"{value:,.2f}", f"{sign} {bar.wanted:,g}", "met" if met else "MISSED"])
    measure.table("bars", ["", "measured", "wanted", ""], rows, "Medians over the rounds of each benchmark.")
    return 0


def _run(command: list[str]) -> dict:
    done = subprocess.run([sys.executable, "-m", *command, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _step(vocab: int, way: str, figure: Callable[[dict], float]) -> Callable[[dict], float]:
    """A figure of the toolkit in the training benchmark."""

    def of(found: dict) -> float:
        return figure(next(t for t in found["tables"] if t["sizes"]["vocab"] == vocab)["contestants"][f"toolkit {way}"])

    return of


def _text(vocab: int, batch: int, figure: Callable[[dict], float]) -> Callable[[dict], float]:
    """A figure of the generation benchmark."""
    return lambda found: figure(next(t for t in found["tables"] if (t["vocab"], t["batch"]) == (vocab, batch)))


def _evaluation(case: str, figure: Callable[[dict], float]) -> Callable[[dict], float]:
    """A figure of the evaluation benchmark."""
    return lambda found: figure(next(t for t in found["tables"] if t["case"] == case))


def _middle(one: dict, name: str) -> float:
    return sorted(one["tokens_per_s"][name])[len(one["tokens_per_s"][name]) // 2]


if __name__ == "__main__":
    sys.exit(main())
