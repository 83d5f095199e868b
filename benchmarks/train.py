"""``python -m benchmarks.train``: training steps of this toolkit and of its peers, eager and compiled, in turn.

A step consists of a batch from the loader, forward, loss, backward, gradient clipping and AdamW. On a CPU, the model is
a small GPT in float32, with two vocabulary sizes. On a GPU, it is the default model in bfloat16, and the attention
kernels are listed. Each contestant has its own process; the last column is its peak memory. ``--loop`` compares
``toolkit.run`` with a bare loop over the same modules."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks import measure, steps, worker
from benchmarks.measure import Spread
from benchmarks.peers import Sizes
from toolkit import run as run_command
from toolkit.command import run_command as guarded
from toolkit.rundir.facts import peak_flops

ON_CPU, ON_GPU = Sizes(8192), Sizes(100_277, dim=768, layers=12, heads=12, context=1024, hidden=2048)
VOCABULARIES = {"cpu": (8192, 100_277), "cuda": (100_277, 50_257)}
LOOP_STEPS = 20
BOUND, PLAIN = "products alone", "torch.mm alone"  # have their turns like the contestants


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    os.environ.setdefault("TOOLKIT_CACHE", os.path.join(tempfile.gettempdir(), "toolkit-benchmarks"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured, started = loop if arguments.loop else speed, time.perf_counter()
    tables = [measured(_sizes(arguments, vocab), arguments, device) for vocab in _vocabularies(arguments, device)]
    minutes = (time.perf_counter() - started) / 60

    def show() -> None:
        for found in tables:
            measure.table(**found["table"])
        print(f"{minutes:.1f} minutes")

    measure.report(arguments.json, {"benchmark": "train", "minutes": minutes, "tables": tables}, show)
    return 0


def speed(sizes: Sizes, arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Tokens per second of every contestant, and of the step's matrix products alone, which are the bound; and peak
    memory. The eager contestants end before the compiled ones start, so that these have the machine's memory for
    themselves."""
    names, rows = arguments.only or steps.NAMES, []
    found = {"sizes": vars(sizes), "batch": arguments.batch, "contestants": {}, "ways": {}}
    captions = ["Median (lowest to highest). Bound: the step's matrix products alone, each in the fastest way we know."]
    for way in dict.fromkeys(name.split()[1] for name in names):
        contestants, told = _speed([name for name in names if name.endswith(way)], sizes, arguments, device)
        found["contestants"] |= contestants
        found["ways"][way] = told
        bound = told["bound_tokens_per_s"]
        rate = f"{bound.show(0)} tokens/s = {bound.median * steps.flops(sizes) / 1e9:,.0f} GFLOP/s"
        captions.append(f"{way}: {told['rounds']}; {told['steps_per_turn']} steps a turn; bound {rate}.")
        for name, about in contestants.items():
            faster = leaner = ""
            if "over_fastest_peer" in about:
                faster = f"{about['over_fastest_peer'].show()} {about['fastest_peer'].split()[0]}"
                leaner = f" = {about['memory_over_leanest']:.2f} {about['leanest_peer'].split()[0]}"
            row = [name, about["package"].split(" ")[-1], f"{about['parameters']:,}"]
            row += [Spread.of(about["tokens_per_s"]).show(0), about["of_bound"].show(), faster]
            rows.append([*row, f"{about['peak'] / 2**20:,.0f}{leaner}"])
        rate, share = told["plain_tokens_per_s"], told["plain_of_bound"]
        rows.append([f"torch.mm alone, {way}", "", "", rate.show(0), share.show(), "", ""])
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for about in found["contestants"].values():
            about["mfu"] = mfu(about["tokens_per_s"], sizes, name)
        captions += on_gpu(found["contestants"], name)
    columns = ["contestant", "version", "parameters", "tokens/s", "of the bound", "over the fastest peer", "peak MiB"]
    table = {"title": _title(sizes, arguments), "columns": columns, "rows": rows, "caption": "\n".join(captions)}
    return found | {"table": table}


def _speed(
    names: list[str], sizes: Sizes, arguments: argparse.Namespace, device: torch.device
) -> tuple[dict[str, dict], dict]:
    """Measure these contestants. Returns the results of each by name, and those of the rounds."""
    tokens = arguments.batch * sizes.context
    workers = worker.start(names, sizes, arguments.batch, torch.get_num_threads(), arguments.clock)
    times = arguments.steps or max(1, round(2 / workers[0].step(1)))

    def turn(seconds: Callable[[], float]) -> Callable[[], float]:
        return lambda: times * tokens / seconds()

    def alone(plain: bool) -> tuple[Callable[[], float], Callable[[], float]]:
        once = steps.products(sizes, arguments.batch, device, worker.CLOCKS[arguments.clock], plain)
        return once, turn(lambda: sum(once() for _ in range(times)))

    turns = {one.name: turn(functools.partial(one.step, times)) for one in workers}
    (probe, turns[BOUND]), (_, turns[PLAIN]) = alone(plain=False), alone(plain=True)
    rounds = measure.interleave(turns, arguments.rounds, probe, arguments.repeats)
    kernels = {one.name: one.kernels() for one in workers} if device.type == "cuda" else {}
    memory, peers, contestants = worker.close(workers), [name for name in names if "toolkit" not in name], {}
    for one in workers:
        about = one.about | memory[one.name] | {"tokens_per_s": rounds.values[one.name]}
        about |= {"of_bound": rounds.ratio(one.name, BOUND), "of_plain": rounds.ratio(one.name, PLAIN)}
        about["kernels"] = kernels.get(one.name, [])
        if one.name not in peers and peers:
            fastest, leanest = rounds.best(peers), min(peers, key=lambda name: memory[name]["peak"])
            about |= {"fastest_peer": fastest, "over_fastest_peer": rounds.ratio(one.name, fastest)}
            about |= {"leanest_peer": leanest}
            about["memory_over_leanest"] = memory[one.name]["peak"] / memory[leanest]["peak"]
        contestants[one.name] = about
    told = {"bound_tokens_per_s": rounds.spread(BOUND), "plain_tokens_per_s": rounds.spread(PLAIN)}
    told |= {"plain_of_bound": rounds.ratio(PLAIN, BOUND), "probes": rounds.probes, "rounds": rounds.summary()}
    return contestants, told | {"steps_per_turn": times}


def loop(sizes: Sizes, arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """``toolkit.run`` with its loggers and without evaluation, compared with a bare loop over the same modules."""
    from benchmarks.parts import Clock  # registers when it is imported

    tokens, way = arguments.batch * sizes.context, "compiled" if device.type == "cuda" else "eager"
    taken = arguments.steps or LOOP_STEPS
    bare = steps.Contestant(f"toolkit {way}", sizes, arguments.batch, device)
    measure.seconds(bare.step, device, 2)
    clock = worker.CLOCKS[arguments.clock]
    probe = steps.products(sizes, arguments.batch, device, clock)
    given = steps.bindings(sizes, arguments.batch, way == "compiled")
    given += ["Experiment.loggers = [@Console, @TensorBoard, @Clock]", "Experiment.eval_windows = 1"]
    flags = [flag for binding in given for flag in ("-p", binding)] + ["--import", "benchmarks.parts"]

    def whole() -> float:
        with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(io.StringIO()):
            stop = 10 * (1 + -(-taken // 10)) + 1  # the loop reports every 10 steps; those up to step 10 warm it up
            run_command.main([*flags, "--runs", runs, "--name", "loop", "--stop-at", str(stop)])
        begun, ended = next(seen for seen in Clock.seen if seen[0] == 10), Clock.seen[-1]
        column = {"wall": 1, "cpu": 2}[arguments.clock]
        return (ended[0] - begun[0]) * tokens / (ended[column] - begun[column])

    turns = {
        "bare loop": lambda: taken * tokens / measure.seconds(bare.step, device, taken, clock),
        "toolkit.run": whole,
    }
    rounds = measure.interleave(turns, arguments.rounds, probe, arguments.repeats)
    ratio = rounds.ratio("toolkit.run", "bare loop")
    rows = [["bare loop", rounds.spread("bare loop").show(0), ""]]
    rows += [["toolkit.run", rounds.spread("toolkit.run").show(0), ratio.show(3)]]
    title = f"the loop itself, {way}, Console and TensorBoard logging: " + _title(sizes, arguments)
    caption = f"Median (lowest to highest): {rounds.summary()}; {taken} steps a turn."
    table = {"title": title, "columns": ["loop", "tokens/s", "over the bare loop"], "rows": rows, "caption": caption}
    return {"sizes": vars(sizes), "rounds": rounds.values, "ratio": ratio, "table": table}


def mfu(rates: list[float], sizes: Sizes, gpu: str) -> float | None:
    """The share of the GPU's bfloat16 peak that the median rate reaches, by the causal count; None if the peak is not
    known."""
    peak = peak_flops(gpu, torch.bfloat16)
    return None if peak is None else Spread.of(rates).median * steps.flops(sizes) / peak


def on_gpu(contestants: dict[str, dict], gpu: str) -> Iterator[str]:
    """Lines for a GPU: the share of its peak and the attention kernels that the profiler found, per contestant."""
    for contestant, about in contestants.items():
        share = "" if about["mfu"] is None else f"MFU {about['mfu']:.3f}; "
        yield f"{contestant}: {share}attention by {', '.join(about['kernels']) or 'no kernel known by name'}"
    peak = peak_flops(gpu, torch.bfloat16)
    yield f"MFU: causal count, of {peak / 1e12:,.0f} TFLOP/s" if peak else f"no MFU: peak of {gpu} not known"


def _title(sizes: Sizes, arguments: argparse.Namespace) -> str:
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    shape = f"width {sizes.dim}, {sizes.layers} layers, context {sizes.context}, batch {arguments.batch}, {precision}"
    return f"vocabulary {sizes.vocab:,}, {shape}"


def _sizes(arguments: argparse.Namespace, vocab: int) -> Sizes:
    base = ON_GPU if torch.cuda.is_available() else ON_CPU
    given = {name: getattr(arguments, name) for name in ("dim", "layers", "heads", "context", "hidden")}
    return Sizes(vocab, **{name: value or getattr(base, name) for name, value in given.items()})


def _vocabularies(arguments: argparse.Namespace, device: torch.device) -> Sequence[int]:
    return arguments.vocab or VOCABULARIES[device.type][: 1 if arguments.loop else None]  # the loop: shorter steps


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    add("--loop", action="store_true", help="compare toolkit.run with a bare loop, not with the peers")
    add("--only", nargs="+", choices=steps.NAMES, metavar="NAME", help=f"some of: {', '.join(steps.NAMES)}")
    add("--vocab", nargs="+", type=int, help="sizes of the vocabulary (CPU: 8192 100277)")
    for name in ("dim", "layers", "heads", "context", "hidden"):
        add(f"--{name}", type=int)
    add("--batch", type=int, default=32 if torch.cuda.is_available() else 8, help="sequences a step")
    add("--rounds", type=int, default=5, help="rounds, in each of which every contestant has one turn (default: 5)")
    add("--repeats", type=int, help="largest number of unsteady rounds to run again (default: as many as rounds)")
    add("--steps", type=int, help="steps per turn (default: about two seconds)")
    add("--threads", type=int, help="PyTorch's threads on a CPU")
    add(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const="cpu",
        default="wall",
        help="measure processor time, for a machine with other busy processes; use it with --threads 1",
    )
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    guarded(main)
