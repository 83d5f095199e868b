"""A contestant in its own process, so that no memory or settings are shared. It makes steps when it is told to."""

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
    """Starts the process, which builds the contestant and makes two steps, and sends it commands."""

    def __init__(self, name: str, sizes: Sizes, batch: int, threads: int, clock: str):
        order = {"name": name, "sizes": vars(sizes), "batch": batch, "threads": threads, "clock": clock}
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(order)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name, self.about = name, self._answer()

    def step(self, times: int) -> float:
        """Make ``times`` steps. Returns their seconds, on the worker's clock."""
        return self._ask(f"step {times}")["seconds"]

    def kernels(self) -> list[str]:
        """The names of the attention kernels in one step, on a GPU."""
        return self._ask("kernels")["kernels"]

    def close(self) -> dict[str, int]:
        """End the process. Returns its memory in bytes: {"before" the model was built, "peak"}."""
        memory = self._ask("end")
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        return memory

    def _ask(self, order: str) -> dict:
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(
                f"the process of {self.name} exited with code {self.process.wait()}; its error is printed above"
            )
        return json.loads(line)


def main() -> None:
    """Run the process: answer each line of stdin with a JSON object in one line."""
    order = json.loads(sys.argv[1])
    torch.set_num_threads(order["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    answers, sys.stdout = sys.stdout, sys.stderr  # so that what a package prints does not mix with the answers

    def answer(**what: object) -> None:
        print(json.dumps(what), file=answers, flush=True)

    before, clock = peak_memory(device), CLOCKS[order["clock"]]
    contestant = steps.Contestant(order["name"], Sizes(**order["sizes"]), order["batch"], device)
    measure.seconds(contestant.step, device, 2)  # compilation, and AdamW's state
    answer(package=contestant.package, parameters=contestant.parameters)
    for line in sys.stdin:
        if line.startswith("step"):
            if device.type == "cuda":
                contestant.step()  # allocates again the memory that it released
            answer(seconds=measure.seconds(contestant.step, device, int(line.split()[1]), clock))
            if device.type == "cuda":
                torch.cuda.empty_cache()  # for the other contestants
        elif line.startswith("kernels"):
            answer(kernels=_attention_kernels(contestant))
        else:
            answer(before=before, peak=peak_memory(device))


def _attention_kernels(contestant: steps.Contestant) -> list[str]:
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
    """Start the workers one after the other, so that none compiles while another makes steps."""
    started = []
    for name in names:
        begun = time.perf_counter()
        started.append(Worker(name, sizes, batch, threads, clock))
        measure.note(f"{name}: ready after {time.perf_counter() - begun:.1f} s")
    return started


def close(workers: list[Worker]) -> dict[str, dict[str, int]]:
    """End all workers. Returns the memory of each by name."""
    return {worker.name: worker.close() for worker in workers}


if __name__ == "__main__":
    main()
