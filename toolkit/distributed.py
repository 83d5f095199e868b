"""Data parallelism: which process this is, what they agree on, and how several are started."""

import os
import signal
import subprocess
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's number under torchrun, else 0."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together: what torchrun says, else 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


def devices_wanted(devices: int | str) -> int:
    """``Experiment.devices`` as a number: "all" is every GPU, or 1 where there is none. Raises ValueError for more
    GPUs than there are."""
    here = torch.cuda.device_count()
    if devices == "all":
        return max(1, here)
    if here and devices > here:
        raise ValueError(f"Experiment.devices = {devices}, but there are {here} GPUs; use at most that or 'all'")
    return devices


def launch(processes: int, module: str, arguments: list[str]) -> int:
    """Run a command again as so many processes under torchrun, and return its exit code."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    process = subprocess.Popen([*command, "-m", module, *arguments], env=environment)
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the processes by itself
    return process.wait()


def setup() -> torch.device:
    """Join the other processes, if there are any, and return this one's device."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    return device


def close() -> None:
    """Leave the group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in each of them; the tensor itself where there is one."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()
