"""The threads of torch's CPU kernels: how many there are, and how long a waiting thread spins before it sleeps.

To spin is to wait in a busy loop. torch's OpenMP on Linux (libgomp) spins for milliseconds. This is fast if no other
process runs, because putting a thread to sleep and waking it takes longer than most kernels, above all in a virtual
machine. If other processes run, it is very slow, because spinning threads occupy the cores that the awaited thread
needs. ``ShortSpin`` makes threads spin only briefly. It changes neither the number of threads nor any result."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from toolkit.cpu import switch

CFunction = Callable[..., object]  # a function of a library that ctypes has loaded
OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")  # variables with which users choose how threads wait


def use_threads(count: int | None) -> None:
    """Set torch's number of CPU threads; None keeps torch's own choice."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use ``count`` threads within the ``with`` block, and as many as before after it; None keeps their number."""
    import torch

    before = torch.get_num_threads()
    use_threads(count)
    try:
        yield
    finally:
        if count is not None:
            use_threads(before)


def in_force() -> str:
    """Describe how threads wait, for the facts of a run."""
    settings = [f"{name}={os.environ[name]}" for name in OWN if name in os.environ]
    default = "short while other processes fill the cores" if switch.FAST and _parallel() else "as OpenMP's default is"
    return ", ".join(settings) or default


class ShortSpin:
    """Between ``hold`` and ``release``, libgomp's threads spin for microseconds only, then sleep.

    libgomp does this by itself if a process has more OpenMP threads than cores. ``hold`` starts a second, sleeping team
    of threads, so that the process has more. A separate thread owns the team; both end together. The class has no
    effect if torch uses another OpenMP library."""

    def __init__(self) -> None:
        self._release = threading.Event()
        self._keeper: threading.Thread | None = None

    @property
    def held(self) -> bool:
        """Whether the second team exists."""
        return self._keeper is not None

    def hold(self) -> None:
        """Start the second team, unless it exists already or an environment variable sets how threads wait."""
        parallel = _parallel()
        if not switch.FAST or self.held or parallel is None or any(name in os.environ for name in OWN):
            return
        self._release.clear()
        started = threading.Event()
        self._keeper = threading.Thread(target=_run_second_team, args=(parallel, started, self._release), daemon=True)
        self._keeper.start()
        started.wait()

    def release(self) -> None:
        """End the second team, if it exists."""
        if self._keeper is not None:
            self._release.set()
            self._keeper.join()
            self._keeper = None


def _run_second_team(parallel: CFunction, started: threading.Event, release: threading.Event) -> None:
    """Run a function without effect on a team of threads. Its threads then sleep until this thread ends.

    The team has the smallest sufficient size: together with torch's threads, there is one thread more than cores. If
    libgomp can't start a thread, it ends the process, so a larger team is a risk where the number of threads is
    limited."""
    import torch

    size = max(2, (os.cpu_count() or 1) - torch.get_num_threads() + 2)  # this thread is one of the team
    no_effect = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
    parallel(no_effect, None, ctypes.c_uint(size), ctypes.c_uint(0))
    started.set()
    release.wait()


def _parallel() -> CFunction | None:
    """The function GOMP_parallel of the libgomp that torch uses, or None if torch uses another OpenMP library."""
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        loaded = ctypes.CDLL(str(library))
        return None if hasattr(loaded, "kmp_set_blocktime") else loaded.GOMP_parallel
    except (OSError, AttributeError):
        return None
