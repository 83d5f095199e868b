"""A contestant in a process of its own, so that neither memory nor settings are shared: it steps when it is told to."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import torch

from benchmarks import measure, steps
from benchmarks.peers import Sizes
from toolkit.rundir.facts import peak_memory

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Worker:
    """The other end: starts the process, builds the contestant there and takes two steps."""

    def __init__(self, name: str, sizes: Sizes, batch: int, threads: int, clock: str):
        order = {"name": name, "sizes": vars(sizes), "batch": batch, "threads": threads, "clock": clock}
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(order)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name, self.about = name, self._answer()

    def step(self, times: int) -> float:
        """Seconds that so many steps took, on the worker's clock."""
        return self._ask(f"step {times}")["seconds"]

    def kernels(self) -> list[str]:
        """Names of the attention kernels of one step, on a GPU."""
        return self._ask("kernels")["kernels"]

    def close(self) -> dict[str, int]:
        """End the process. Returns its memory in bytes: {"before" the model was built, "peak"}."""
        memory = self._ask("end")
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        return memory

    def _ask(self, order):
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"the process of {self.name} ended with code {self.process.wait()}; its error is above")
        return json.loads(line)


def main() -> None:
    """The process: one JSON object a line, in answer to each line that comes in."""
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a package prints

    def answer(**what):
        print(json.dumps(what), file=answers, flush=True)

    before, clock = peak_memory(device), CLOCKS[order["clock"]]
    contestant = steps.Contestant(order["name"], Sizes(**order["sizes"]), order["batch"], device)
    measure.seconds(contestant.step, device, 2)  # compilation, and AdamW's state
    answer(package=contestant.package, parameters=contestant.parameters)
    for line in sys.stdin:
        if line.startswith("step"):
            if device.type == "cuda":
                contestant.step()  # takes back the memory that it let go of
            answer(seconds=measure.seconds(contestant.step, device, int(line.split()[1]), clock))
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the others need it
        elif line.startswith("kernels"):
            answer(kernels=_attention_kernels(contestant))
        else:
            answer(before=before, peak=peak_memory(device))


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


def start(names: list[str], sizes: Sizes, batch: int, threads: int, clock: str) -> list[Worker]:
    """One worker after the other, so that none compiles while another steps."""
    started = []
    for name in names:
        begun = time.perf_counter()
        started.append(Worker(name, sizes, batch, threads, clock))
        measure.note(f"{name}: ready after {time.perf_counter() - begun:.1f} s")
    return started


def close(workers: list[Worker]) -> dict[str, dict[str, int]]:
    """Name -> memory."""
    return {worker.name: worker.close() for worker in workers}


if __name__ == "__main__":
    main()
