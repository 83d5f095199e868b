"""``python -m benchmarks.neighbours``: the quick start's steps on an idle machine, and beside other busy processes.

It compares four settings in turn: the default, which adapts to a full machine (toolkit/cpu/neighbours.py); libgomp's
long spin; a spin that is always bounded; and one thread. Each runs beside 0, 1, 2 and 4 busy processes. The tables
contain tokens per second of training steps, without evaluations and start. There are two bars: on an idle machine the
default must reach 0.98 of the long spin, and beside four busy processes 0.8 of one thread. It takes about a quarter of
an hour, and five minutes with --rounds 1."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import measure
from toolkit.command import run_command

ROOT = Path(__file__).parent.parent
BUSY = (0, 1, 2, 4)
WAYS = {
    "default": {},
    "long spin": {"GOMP_SPINCOUNT": "300000"},
    "bounded spin": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OURS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
BINDINGS: tuple[str, ...] = (
    "Experiment.eval_every = 100000",
    "Experiment.sample_every = 100000",
    "Experiment.log_every = 1",
)
BINDINGS += ("Experiment.eval_windows = 1", "SyntheticStories.val_stories = 20")
WARM = 5  # the first steps are not counted, since they allocate memory


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments, started = _arguments(argv), time.perf_counter()
    rates: dict[int, dict[str, list[float]]] = {busy: {way: [] for way in WAYS} for busy in BUSY}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:  # warm up: token cache, torch's files in memory
            _tokens_per_s(way, folder, seconds=1)
        for _ in range(arguments.rounds):
            for busy, ways in rates.items():
                for way, found in ways.items():
                    with _busy(busy):
                        found.append(_tokens_per_s(way, folder, arguments.seconds))
    result: dict[str, object] = {
        "benchmark": "neighbours",
        "minutes": (time.perf_counter() - started) / 60,
        "tokens_per_s": rates,
    }
    result["bars"] = bars(rates)

    def show() -> None:
        rows = [[str(busy), *(measure.Spread.of(ways[way]).show() for way in WAYS)] for busy, ways in rates.items()]
        caption = (
            f"Tokens per second: median (lowest to highest), {arguments.rounds} rounds, {result['minutes']:.1f} min."
        )
        measure.table("beside other processes", ["busy processes", *WAYS], rows, caption)
        rows = [
            [what, f"{figure:.2f}", f"{wanted}", "met" if figure >= wanted else "MISSED"]
            for what, figure, wanted in bars(rates)
        ]
        measure.table("bars", ["", "measured", "wanted", ""], rows, "Ratios of medians.")

    measure.report(arguments.json, result, show)
    return 0


def bars(rates: dict[int, dict[str, list[float]]]) -> list[tuple[str, float, float]]:
    """(what, measured, wanted) of each bar, from {busy processes: {way: tokens per second}}."""
    medians = {busy: {way: statistics.median(found) for way, found in ways.items()} for busy, ways in rates.items()}
    return [
        ("quiet: the default over the long spin", medians[0]["default"] / medians[0]["long spin"], 0.98),
        ("four busy processes: the default over one thread", medians[4]["default"] / medians[4]["one thread"], 0.8),
    ]


@contextlib.contextmanager
def _busy(count: int) -> Iterator[None]:
    """Run ``count`` processes that only compute."""
    loop = [sys.executable, "-c", "while True: pass"]
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen(loop))
            stack.callback(process.kill)
        yield


def _tokens_per_s(way: str, folder: str, seconds: float) -> float:
    """Median tokens per second over the steps that a run of the quick start makes in ``seconds``, from its metrics."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS} | WAYS[way]
    environment |= {"TOOLKIT_CACHE": f"{folder}/cache", "PYTHONPATH": str(ROOT)}
    flags = [flag for binding in BINDINGS for flag in ("-p", binding)]
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        line = ["-m", "toolkit.run", "gin/quickstart.gin", *flags, "--runs", runs, "--name", "n"]
        process = subprocess.Popen([sys.executable, *line], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        rows = Path(runs) / "n" / "metrics.jsonl"
        while process.poll() is None and len(_steps(rows)) < 1:
            time.sleep(0.1)
        time.sleep(seconds)
        while process.poll() is None and len(_steps(rows)) < WARM + 3:
            time.sleep(0.1)
        found = _steps(rows)
        process.kill()
        process.wait()
    return 1000 * 8 * 128 / statistics.median(found[WARM:])


def _steps(rows: Path) -> list[float]:
    """The time of each step so far, in milliseconds."""
    lines = rows.read_text().splitlines(keepends=True) if rows.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row["time/step_ms"] for row in found if "time/step_ms" in row]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.neighbours", description=__doc__.split(": ", 1)[1])
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds, in each of which every setting has one turn (default: 3)"
    )
    parser.add_argument("--seconds", type=float, default=8, help="shortest training time per turn (default: 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
