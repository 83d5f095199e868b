"""``python -m benchmarks.probes [OVERLAY.gin ...]``: how much time the probes of the shelf take of a training run.

It times training steps and observations in turn, in one process, and prints the share of time that observations take at
one step in ``Experiment.probe_every``: for all probes together, as in gin/probe/all.gin, and for each alone. The bar is
2 % for all. Without overlays it takes the quick start. Other settings are bindings:

    python -m benchmarks.probes gin/model/tiny.gin -p 'GPT.dim = 256'

``--clock cpu`` counts the processor's seconds instead of the clock's, for a machine that is not idle."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import measure
from toolkit.command import run_command
from toolkit.compose import compose, try_build
from toolkit.cpu.allocator import keep_freed_memory
from toolkit.experiment import Experiment, Parts, build, micro_batch_size
from toolkit.loop import step as one_step
from toolkit.loop.prefetch import prefetch
from toolkit.probing.prober import Prober
from toolkit.store.journal import Journal

SHELF = "gin/probe/all.gin"
BAR = 0.02
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments, started = _arguments(argv), time.perf_counter()
    torch.set_num_threads(arguments.threads)
    config, _ = compose([*(arguments.overlays or ["gin/quickstart.gin"]), SHELF], arguments.bindings)
    experiment, blank = try_build(config)
    shares = measured(experiment, blank, arguments.rounds, arguments.steps, CLOCKS[arguments.clock])
    result: dict[str, object] = {
        "benchmark": "probes",
        "minutes": (time.perf_counter() - started) / 60,
        "clock": arguments.clock,
        "shares": shares,
        "bar": BAR,
    }

    def show() -> None:
        rows = [[name, measure.Spread.of([100 * share for share in each]).show()] for name, each in shares.items()]
        caption = (
            f"Percent of the training time at one observation in {experiment.probe_every} steps: median (lowest to "
            f"highest), {arguments.rounds} rounds by the {arguments.clock} clock, {result['minutes']:.1f} min. "
            f"Wanted for all: at most {100 * BAR:.0f}."
        )
        measure.table("probes", ["probe", "percent"], rows, caption)

    measure.report(arguments.json, result, show)
    return 0


def measured(
    experiment: Experiment, blank: Parts, rounds: int, steps: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """{"all", and the name of each probe: the share of time of each round}. A round times ``steps`` training steps,
    then an observation with all probes, and one with each of them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blank.data.prepare()
    parts = build(experiment, device, blank.tokenizer, blank.data)
    module = one_step.training_module(experiment, parts.objective, device)
    size = micro_batch_size(experiment, 1)
    batches = prefetch(lambda index: blank.data.batch("train", index, size), iter(range(1_000_000)), device)

    numbers = itertools.count()

    def train() -> None:
        step = next(numbers)
        one_step.set_learning_rate(parts.optimizer, parts.schedule(step))
        micro_batches = [next(batches) for _ in range(experiment.accumulate)]
        one_step.gradient(experiment, module, micro_batches, step, device)
        one_step.update(parts.optimizer)

    probers = {}
    for names in ([*blank.probes], *([name] for name in blank.probes)):
        parts.probes = {name: blank.probes[name] for name in names}
        probers["all" if len(names) > 1 else names[0]] = _observer(experiment, parts, device)
    train()
    if device.type == "cpu":
        keep_freed_memory()
    train()
    for observe in probers.values():
        observe()
    shares: dict[str, list[float]] = {name: [] for name in probers}
    for _ in range(rounds):
        step_seconds = measure.seconds(train, device, steps, clock) / steps
        for name, observe in probers.items():
            shares[name].append(measure.seconds(observe, device, clock=clock) / (experiment.probe_every * step_seconds))
    batches.close()
    return shares


def _observer(experiment: Experiment, parts: Parts, device: torch.device) -> Callable[[], None]:
    """A function that copies the weights and observes them, as a run does at a step."""
    prober = Prober(experiment, Parts(**vars(parts)), device)
    journal = Journal(Path("without a folder"), [], 0, writing=False)

    def observe() -> None:
        prober.keep_weights(0)
        prober.observe(0, journal)

    return observe


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probes", description="The share of training time that probes take."
    )
    add = parser.add_argument
    add("overlays", metavar="OVERLAY.gin", nargs="*", help="the experiment (default: gin/quickstart.gin)")
    add("-p", dest="bindings", metavar="BINDING", action="append", default=[], help="set one knob: 'GPT.dim = 256'")
    add("--rounds", type=int, default=5, help="default: 5")
    add("--steps", type=int, default=5, help="training steps in a round (default: 5)")
    add("--threads", type=int, default=1, help="default: 1")
    add("--clock", choices=CLOCKS, default="wall", help="wall, or cpu on a busy machine (default: wall)")
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
