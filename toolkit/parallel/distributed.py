"""Data parallelism: starts and joins several processes, and computes sums over all of them."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from toolkit.parallel import heartbeat

PATIENCE = timedelta(minutes=30)  # how long a collective operation waits for ranks that are alive
_heartbeat: heartbeat.Heartbeat | None = None


def rank() -> int:
    """The rank of this process under torchrun, or 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes that train together: as torchrun set it, or 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def process_count(devices: int | Literal["all"]) -> int:
    """Convert ``Experiment.devices`` to a number: "all" is the number of GPUs, or 1 without GPUs."""
    return max(1, torch.cuda.device_count()) if devices == "all" else devices


def check_devices(processes: int) -> None:
    """Raise ValueError for more processes than the machine has GPUs, if it has any."""
    available = torch.cuda.device_count()
    if available and processes > available:
        raise ValueError(
            f"Experiment.devices = {processes}, but there are {available} GPUs; use at most {available}, or 'all'"
        )


def launch(processes: int, module: str, arguments: list[str]) -> int:
    """Run ``python -m module`` as ``processes`` processes under torchrun. Returns the exit code of torchrun."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    process = subprocess.Popen([*command, "-m", module, *arguments], env=environment)
    signal.signal(signal.SIGTERM, lambda number, frame: process.send_signal(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to the processes too
    return process.wait()


def device() -> torch.device:
    """Select this process's GPU and return it; without GPUs, return the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpu = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(gpu)
    return gpu


@contextlib.contextmanager
def joined(rank_timeout: int, report: Callable[[str], None]) -> Iterator[torch.device]:
    """Join the process group, if several processes train together, and leave it on exit. Yields this process's device.

    Each process waits on exit until all others leave too. If one dies, hangs (no sign of life for ``rank_timeout``
    seconds) or fails, the others end within seconds: they raise RankLost, and one of them calls ``report`` with a
    sentence that names the lost process."""
    global _heartbeat
    if world_size() == 1:
        yield device()
        return
    store, _, _ = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    signs = dist.PrefixStore(f"heartbeat/{attempt}", store.clone())  # own client: other waits do not block it
    group_store = dist.PrefixStore(f"group/{attempt}", store)
    own_device = device()
    backend = "nccl" if own_device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=group_store, rank=rank(), world_size=world_size(), timeout=PATIENCE)
    _heartbeat = heartbeat.Heartbeat(signs, rank(), world_size(), rank_timeout, report)
    failure = None
    try:
        yield own_device
    except BaseException as error:
        failure = error
        raise
    finally:
        lost = _heartbeat.leave(failure, PATIENCE.total_seconds())
        _heartbeat = None
        dist.destroy_process_group()
        if lost:
            raise lost from failure


def beat(step: int) -> None:
    """Tell the other processes, if any, the current step of this one."""
    if _heartbeat:
        _heartbeat.step = step


def agree(what: str, value: int, device: torch.device) -> None:
    """Raise ValueError in every process unless ``value`` is the same in all of them."""
    value_of_rank = torch.zeros(world_size(), dtype=torch.int64, device=device)
    value_of_rank[rank()] = value
    values = total(value_of_rank).tolist()
    if len(set(values)) > 1:
        listing = ", ".join(f"{value} in rank {number}" for number, value in enumerate(values))
        raise ValueError(f"the ranks disagree on {what}: {listing}; give --runs a folder that all of them share")


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; the same answer in all of them."""
    return total(torch.tensor(float(flag), device=device)).item() > 0


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes, in each of them. With one process, return the tensor itself."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor
