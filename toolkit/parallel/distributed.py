"""Data parallelism: which process this is, what they agree on, and how several are started."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from toolkit.parallel import heartbeat

PATIENCE = timedelta(minutes=30)  # how long a collective waits for ranks that live
_heartbeat: heartbeat.Heartbeat | None = None


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


def device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(own)
    return own


@contextlib.contextmanager
def joined(rank_timeout: int, report: Callable[[str], None]) -> Iterator[torch.device]:
    """Be one of the processes that train together, if there are several; yields this one's device.

    All leave together. One that dies, hangs (no sign of life for ``rank_timeout`` seconds) or fails ends the others
    within seconds: one of them calls ``report`` with a sentence that names it. Raises RankLost in them."""
    global _heartbeat
    if world_size() == 1:
        yield device()
        return
    store, _, _ = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    signs = dist.PrefixStore(f"heartbeat/{attempt}", store.clone())  # a client of its own: others may block theirs
    group = dist.PrefixStore(f"group/{attempt}", store)
    own = device()
    backend = "nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=group, rank=rank(), world_size=world_size(), timeout=PATIENCE)
    _heartbeat = heartbeat.Heartbeat(signs, rank(), world_size(), rank_timeout, report)
    failure = None
    try:
        yield own
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
    """Tell the other processes, if there are any, how far this one is."""
    if _heartbeat:
        _heartbeat.step = step


def agree(what: str, value: int, device: torch.device) -> None:
    """Raises ValueError, in every process, where a number is not the same in all."""
    table = torch.zeros(world_size(), dtype=torch.int64, device=device)
    table[rank()] = value
    values = total(table).tolist()
    if len(set(values)) > 1:
        told = ", ".join(f"{value} in rank {number}" for number, value in enumerate(values))
        raise ValueError(f"the ranks disagree on {what}: {told}; let --runs be a folder that all of them see")


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in each of them; the tensor itself where there is one."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor
