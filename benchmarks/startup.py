"""``python -m benchmarks.startup``: seconds until a command answers, each in its own process, in turn.

The last two rows start at the end of ``import torch``. One ends at the first optimizer step of gin/model/tiny.gin, not
compiled and with cached tokens; it includes the evaluation at step 0 and its checkpoint. The other ends when AdamW
alone has updated one matrix, which imports the same modules as every optimizer of PyTorch. It takes about two
minutes."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import measure
from toolkit.command import run_command

ROOT = Path(__file__).parent.parent
CLOCK = "import time, torch; since = time.perf_counter(); "
ADAMW = "w = torch.nn.Parameter(torch.ones(2, 2)); w.sum().backward(); torch.optim.AdamW([w], fused=True).step(); "
ADAMW += "print('seconds', time.perf_counter() - since)"
TINY = """
from torch.optim import optimizer
from toolkit import run
class Stepped(Exception): pass
def stop(*_):
    print('\\nseconds', time.perf_counter() - since)
    raise Stepped
optimizer.register_optimizer_step_post_hook(stop)
line = ["gin/model/tiny.gin", "-p", "Experiment.compile = False", "--runs", {runs!r}]
try: run.main(line)
except Stepped: pass
"""


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments, started = _arguments(argv), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TOOLKIT_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # otherwise each process compiles the toolkit again

        def python(*command: str) -> str:
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
            )
            done.check_returncode()
            return done.stdout

        def whole(*command: str) -> float:
            started = time.perf_counter()
            python(*command)
            return 1 / (time.perf_counter() - started)

        def printed_rate(code: str) -> float:
            return 1 / float(re.findall(r"^seconds (.*)$", python("-c", code), re.MULTILINE)[0])

        def first_step() -> float:
            with tempfile.TemporaryDirectory(dir=folder) as runs:
                return printed_rate(CLOCK + TINY.format(runs=runs))

        turns = {
            "python -m toolkit.run --help": lambda: whole("-m", "toolkit.run", "--help"),
            "python -m toolkit.run --dry-run": lambda: whole("-m", "toolkit.run", "--dry-run"),
            "python -c 'import torch'": lambda: whole("-c", "import torch"),
            "after torch: first step of tiny.gin": first_step,
            "after torch: AdamW on one matrix": lambda: printed_rate(CLOCK + ADAMW),
        }
        for turn in turns.values():  # warm up: token cache, bytecode, torch's files in memory
            turn()
        rounds = measure.interleave(turns, arguments.rounds, _probe, arguments.repeats)
    seconds = {name: measure.Spread.of(1 / rate for rate in rates) for name, rates in rounds.values.items()}
    minutes = (time.perf_counter() - started) / 60

    def show() -> None:
        rows = [[name, spread.show()] for name, spread in seconds.items()]
        caption = f"Median (lowest to highest): {rounds.summary()}. {minutes:.1f} minutes."
        measure.table("startup", ["", "seconds"], rows, caption)

    found = {"benchmark": "startup", "minutes": minutes, "seconds": seconds, "rounds": rounds.summary()}
    measure.report(arguments.json, found, show)
    return 0


def _probe() -> float:
    """Seconds that a fixed piece of Python takes."""
    started = time.perf_counter()
    sum(i * i for i in range(5_000_000))
    return time.perf_counter() - started


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument(
        "--repeats", type=int, help="largest number of unsteady rounds to run again (default: as many as rounds)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
