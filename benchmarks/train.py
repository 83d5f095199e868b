"""``python -m benchmarks.train``: whole training steps, ours and the peers', eager and compiled, taking turns.

A step is a batch from the loader, forward, loss, backward, gradient clipping and AdamW. On a CPU: a small GPT in
float32, at two sizes of the vocabulary. On a GPU: the default model in bfloat16, and which attention kernel ran.
``--memory`` runs each contestant in a process of its own and reads its peak; ``--loop`` compares ``toolkit.run`` with a
bare loop over the same modules."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks import measure, steps
from benchmarks.measure import Spread, note
from benchmarks.peers import Sizes
from toolkit import run as run_command
from toolkit.command import run_command as guarded
from toolkit.facts import peak_memory

ON_CPU, ON_GPU = Sizes(8192), Sizes(100_277, dim=768, layers=12, heads=12, context=1024, hidden=2048)
VOCABULARIES = {"cpu": (8192, 100_277), "cuda": (100_277, 50_257)}
# bfloat16 matrix products without sparsity, in FLOP/s, as the maker states them
PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
LOOP_STEPS = 20


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    os.environ.setdefault("TOOLKIT_CACHE", os.path.join(tempfile.gettempdir(), "toolkit-benchmarks"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.contestant:
        print(json.dumps(_memory_here(arguments, device)))
        return 0
    measured, started = memory if arguments.memory else loop if arguments.loop else speed, time.perf_counter()
    tables = [measured(_sizes(arguments, vocab), arguments, device) for vocab in _vocabularies(arguments, device)]
    minutes = (time.perf_counter() - started) / 60

    def show():
        for found in tables:
            measure.table(**found["table"])
        print(f"{minutes:.1f} minutes")

    measure.report(arguments.json, {"benchmark": "train", "minutes": minutes, "tables": tables}, show)
    return 0


def speed(sizes: Sizes, arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Tokens per second of every contestant in turn, and the bound that the step's matrix products alone set."""
    contestants = {}
    for name in arguments.only or steps.NAMES:
        started = time.perf_counter()
        contestants[name] = steps.Contestant(name, sizes, arguments.batch, device)
        measure.seconds(contestants[name].step, device, 2)  # compilation, and AdamW's state
        note(f"{name}: ready after {time.perf_counter() - started:.1f} s")
    probe, tokens = steps.products(sizes, arguments.batch, device, arguments.clock), arguments.batch * sizes.context
    turn_steps = arguments.steps or max(1, round(2 / measure.seconds(next(iter(contestants.values())).step, device)))

    def turn(contestant):
        return lambda: turn_steps * tokens / measure.seconds(contestant.step, device, turn_steps, arguments.clock)

    turns = {name: turn(contestant) for name, contestant in contestants.items()}
    rounds = measure.interleave(turns, arguments.rounds, probe, arguments.repeats)
    found = {"sizes": vars(sizes), "batch": arguments.batch, "steps_per_turn": turn_steps, "contestants": {}}
    bound = Spread.of(tokens / (sum(pair) / 2) for pair in rounds.probes)
    rows = []
    for name, contestant in contestants.items():
        about = {"package": contestant.package, "parameters": contestant.parameters, "of_bound": None}
        about |= {"tokens_per_s": rounds.values[name], "of_bound": rounds.of_bound(name, tokens), "over_peer": None}
        peers = [n for n in contestants if n.split()[1] == name.split()[1] and not n.startswith("toolkit")]
        if name.startswith("toolkit") and peers:
            about["peer"] = rounds.best(peers)
            about["over_peer"] = rounds.ratio(name, about["peer"])
        found["contestants"][name] = about
        over = f"{about['over_peer'].show()} x {about['peer']}" if about["over_peer"] else ""
        size, rate = f"{contestant.parameters:,}", rounds.spread(name).show(0)
        rows.append([name, contestant.package.split(" ")[-1], size, rate, about["of_bound"].show(), over])
    found |= {"bound_tokens_per_s": bound, "probes": rounds.probes, "rounds": rounds.summary()}
    caption = f"Median (lowest to highest): {rounds.summary()}; {turn_steps} steps a turn.\nBound: the step's matrix "
    caption += f"products alone, {bound.show(0)} tokens/s = {bound.median * steps.flops(sizes) / 1e9:,.0f} GFLOP/s."
    if device.type == "cuda":
        found["gpu"] = _gpu(contestants, rounds, sizes, device)
        caption += "".join(f"\n{key}: {value}" for key, value in found["gpu"].items())
    columns = ["contestant", "package", "parameters", "tokens/s", "of the bound", "over the fastest peer"]
    return found | {"table": {"title": _title(sizes, arguments), "columns": columns, "rows": rows, "caption": caption}}


def memory(sizes: Sizes, arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Peak memory of every contestant after four steps in a fresh process, and what that held before it was built."""
    found, rows = {}, []
    for name in arguments.only or steps.NAMES:
        command = [sys.executable, "-m", "benchmarks.train", "--contestant", name, "--vocab", str(sizes.vocab)]
        command += ["--threads", str(torch.get_num_threads()), "--batch", str(arguments.batch)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        note(f"{name}: {found[name]['peak'] / 2**20:,.0f} MiB")
    for name, about in found.items():
        peers = [n for n in found if n.split()[1] == name.split()[1] and not n.startswith("toolkit")]
        versus = ""
        if name.startswith("toolkit") and peers:
            least = min(peers, key=lambda n: found[n]["peak"])
            about["over_peer"] = about["peak"] / found[least]["peak"]
            versus = f"{about['over_peer']:.2f} x {least}"
        rows.append([name, f"{about['peak'] / 2**20:,.0f}", f"{about['before'] / 2**20:,.0f}", versus])
    columns = ["contestant", "peak MiB", "of it before the model", "over the leanest peer"]
    title = "peak memory, each in a fresh process: " + _title(sizes, arguments)
    table = {"title": title, "columns": columns, "rows": rows, "caption": "On a CPU: the process's resident set."}
    return {"sizes": vars(sizes), "contestants": found, "table": table}


def loop(sizes: Sizes, arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """``toolkit.run`` with its loggers, evaluation off, against a bare loop over the same modules."""
    from benchmarks.parts import Clock  # registers when it is imported

    tokens, way = arguments.batch * sizes.context, "compiled" if device.type == "cuda" else "eager"
    taken = arguments.steps or LOOP_STEPS
    bare = steps.Contestant(f"toolkit {way}", sizes, arguments.batch, device)
    measure.seconds(bare.step, device, 2)
    probe = steps.products(sizes, arguments.batch, device, arguments.clock)
    given = steps.bindings(sizes, arguments.batch, way == "compiled")
    given += ["Experiment.loggers = [@Console, @TensorBoard, @Clock]", "Experiment.eval_windows = 1"]
    flags = [flag for binding in given for flag in ("-p", binding)] + ["--import", "benchmarks.parts"]

    def whole():
        with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stdout(io.StringIO()):
            stop = 10 * (1 + -(-taken // 10)) + 1  # the loop reports every 10 steps; those up to step 10 warm it up
            run_command.main([*flags, "--runs", runs, "--name", "loop", "--stop-at", str(stop)])
        (first, begun), (last, ended) = next(seen for seen in Clock.seen if seen[0] == 10), Clock.seen[-1]
        return (last - first) * tokens / (ended - begun)

    turns = {"bare loop": lambda: taken * tokens / measure.seconds(bare.step, device, taken), "toolkit.run": whole}
    rounds = measure.interleave(turns, arguments.rounds, probe, arguments.repeats)
    ratio = rounds.ratio("toolkit.run", "bare loop")
    rows = [["bare loop", rounds.spread("bare loop").show(0), ""]]
    rows += [["toolkit.run", rounds.spread("toolkit.run").show(0), ratio.show(3)]]
    title = f"the loop itself, {way}, Console and TensorBoard logging: " + _title(sizes, arguments)
    caption = f"Median (lowest to highest): {rounds.summary()}; {taken} steps a turn."
    table = {"title": title, "columns": ["loop", "tokens/s", "over the bare loop"], "rows": rows, "caption": caption}
    return {"sizes": vars(sizes), "rounds": rounds.values, "ratio": ratio, "table": table}


def _memory_here(arguments, device):
    """Four steps of one contestant: {"before", "peak"} in bytes."""
    sizes = _sizes(arguments, _vocabularies(arguments, device)[0])
    before = peak_memory(device)
    one = steps.Contestant(arguments.contestant, sizes, arguments.batch, device)
    for _ in range(4):
        one.step()
    return {"before": before, "peak": peak_memory(device)}


def _gpu(contestants, rounds, sizes, device):
    """What a GPU adds: its share of the peak, memory, and the attention kernels that the profiler saw."""
    name = torch.cuda.get_device_name(device)
    peak = next((value for key, value in sorted(PEAKS.items(), reverse=True) if key in name), None)
    found = {}
    for contestant, one in contestants.items():
        if contestant.startswith("toolkit"):
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device) - sum(
                _held(other) for other in contestants.values() if other is one
            )
            one.step()
            used = (torch.cuda.max_memory_allocated(device) - held) / 2**30
            found[f"{contestant}, peak memory"] = f"{used:.1f} GiB beside what the other contestants hold"
            if peak:
                rate = rounds.spread(contestant).median * steps.flops(sizes)
                found[f"{contestant}, MFU by the causal count"] = f"{rate / peak:.3f} of {peak / 1e12:,.0f} TFLOP/s"
            found[f"{contestant}, attention kernels"] = ", ".join(_attention_kernels(one)) or "none found by name"
    return found


def _held(contestant):
    """Bytes of parameters and optimizer state."""
    tensors = list(contestant.module.parameters())
    for state in contestant.optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_cuda)


def _attention_kernels(contestant):
    """Names of the GPU kernels of one step that are attention's, the longest-running first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        contestant.step()
        torch.cuda.synchronize()
    kernels = [e for e in profiled.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: event.self_device_time_total, reverse=True)
    marks = ("flash", "fmha", "attention", "sdpa", "efficient")
    return [event.key[:80] for event in kernels if any(mark in event.key.lower() for mark in marks)][:4]


def _title(sizes, arguments):
    precision = "bfloat16" if torch.cuda.is_available() else "float32"
    shape = f"width {sizes.dim}, {sizes.layers} layers, context {sizes.context}, batch {arguments.batch}, {precision}"
    return f"vocabulary {sizes.vocab:,}, {shape}"


def _sizes(arguments, vocab):
    base = ON_GPU if torch.cuda.is_available() else ON_CPU
    given = {name: getattr(arguments, name) for name in ("dim", "layers", "heads", "context", "hidden")}
    return Sizes(vocab, **{name: value or getattr(base, name) for name, value in given.items()})


def _vocabularies(arguments, device):
    return arguments.vocab or VOCABULARIES[device.type]


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.split("\n\n")[1])
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    what.add_argument("--loop", action="store_true", help="toolkit.run against a bare loop instead of the peers")
    what.add_argument("--contestant", choices=steps.NAMES, help="four steps of one, and the peak of this process")
    add("--only", nargs="+", choices=steps.NAMES, metavar="NAME", help=f"some of: {', '.join(steps.NAMES)}")
    add("--vocab", nargs="+", type=int, help="sizes of the vocabulary (CPU: 8192 100277)")
    for name in ("dim", "layers", "heads", "context", "hidden"):
        add(f"--{name}", type=int)
    add("--batch", type=int, default=32 if torch.cuda.is_available() else 8, help="sequences a step")
    add("--rounds", type=int, default=5, help="turns of each contestant (default: 5)")
    add("--repeats", type=int, help="restless rounds that are run again, at most (default: as many as rounds)")
    add("--steps", type=int, help="steps a turn (default: about two seconds' worth)")
    add("--threads", type=int, help="of PyTorch on a CPU")
    add(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help="seconds of processor time, for a machine that others keep busy; give it --threads 1",
    )
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    guarded(main)
