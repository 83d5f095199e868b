"""Threads of torch's CPU kernels: how many, and how long one that waits for the others spins before it sleeps.

torch's OpenMP on Linux (libgomp) spins for milliseconds. On a quiet machine that is fast: to put a thread to sleep and
wake it takes longer than most kernels, in a virtual machine above all. Beside other processes it is ruinous: the thread
that is waited for can't run on a core that spins. ``ShortSpin`` makes the spin short, which changes neither the number
of threads nor any sum."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")  # variables by which a user says how threads wait


def use_threads(count: int | None) -> None:
    """Compute with so many threads from here on; None leaves torch's own choice."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


def in_force() -> str:
    """How threads wait, in words, for the facts of a run."""
    given = [f"{name}={os.environ[name]}" for name in OWN if name in os.environ]
    adapted = "short while other processes fill the cores" if _parallel() else "as OpenMP's default is"
    return ", ".join(given) or adapted


class ShortSpin:
    """While it is held, libgomp's threads spin for microseconds, then sleep.

    libgomp does so by itself when a process has more OpenMP threads than cores. A second team of threads that sleep,
    kept by a thread of its own, makes it so; when that thread ends, so does its team. Without effect where torch
    computes with another OpenMP."""

    def __init__(self):
        self._release = threading.Event()
        self._keeper: threading.Thread | None = None

    @property
    def held(self) -> bool:
        return self._keeper is not None

    def hold(self) -> None:
        """Start the second team, unless it is there or the user says how threads wait."""
        parallel = _parallel()
        if self.held or parallel is None or any(name in os.environ for name in OWN):
            return
        self._release.clear()
        started = threading.Event()
        self._keeper = threading.Thread(target=_keep, args=(parallel, started, self._release), daemon=True)
        self._keeper.start()
        started.wait()

    def release(self) -> None:
        """End the second team, if it is there."""
        if self._keeper is not None:
            self._release.set()
            self._keeper.join()
            self._keeper = None


def _keep(parallel, started: threading.Event, release: threading.Event) -> None:
    """Run a function that does nothing on more threads than there are cores; they sleep until this thread ends."""
    nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
    parallel(nothing, None, ctypes.c_uint((os.cpu_count() or 1) + 1), ctypes.c_uint(0))
    started.set()
    release.wait()


def _parallel():
    """libgomp's entry point of a parallel region, of the libgomp that torch uses; None if torch uses another OpenMP."""
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        loaded = ctypes.CDLL(str(library))
        return None if hasattr(loaded, "kmp_set_blocktime") else loaded.GOMP_parallel
    except (OSError, AttributeError):
        return None
