"""Other processes on the cores that a command computes on: told once, and borne with no change of any sum."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from pathlib import Path

import torch

from toolkit.cpu.cores import FewCores
from toolkit.cpu.openmp import ShortSpin

EVERY = 1.0  # seconds between two looks
LEAST = 3  # looks in a row that find the machine full before it is told
FULL = 0.9  # share of all cores in use from which on the machine counts as full
OTHERS = 0.5  # cores that others use, at least
ROUNDING = 0.25  # of a core that others may use before it counts as theirs
log = logging.getLogger("toolkit")


class Neighbours:
    """Compares this process's time with that of all processes on the cores that it may use. Knows nothing where the
    system does not tell it: only Linux does. ``read`` gives (seconds by the clock, of this process, of all processes,
    cores)."""

    def __init__(self, read=None, spin: ShortSpin | None = None, few: FewCores | None = None):
        self._spin, self._few = spin or ShortSpin(), few or FewCores()
        self._read = read or functools.partial(_seconds, self._few.cores)
        self._before, self._told = self._read(), False
        self._full, self._patience = 0, 1  # looks in a row that found the machine full; that it takes to move threads

    def look(self) -> None:
        """Where others leave fewer cores than there are threads, let these wait asleep, and warn, once. Where others
        leave half of the cores or less, let the threads take turns on those, equally many on each."""
        now, threads = self._read(), torch.get_num_threads()
        if threads == 1 or None in (self._before, now):
            return
        clock, own, machine = (b - a for a, b in zip(self._before[:3], now[:3], strict=True))
        self._before, cores = now, now[3]
        others = (machine - own) / clock
        fewer = max(1, int(cores - others + ROUNDING))
        if fewer < threads and others >= OTHERS and machine >= FULL * cores * clock:
            self._full += 1
            self._spin.hold()
            if 2 * fewer <= threads and self._full >= self._patience:
                self._few.hold(max(count for count in range(1, fewer + 1) if threads % count == 0))
            if self._full == LEAST:
                self._tell(others, cores, fewer)
        else:
            self._full = 0
            self._patience *= 2 if self._few.held else 1  # so that threads are not moved to and fro
            self.close()

    def close(self) -> None:
        """Let threads wait as they did before, on all cores."""
        self._spin.release()
        self._few.release()

    def _tell(self, others: float, cores: int, fewer: int) -> None:
        if not self._told:
            self._told = True
            log.warning(
                "other processes use %.1f of %d cores; -p 'Experiment.threads = %d' may be faster (another number of "
                "threads rounds sums differently)",
                others,
                cores,
                fewer,
            )


@contextlib.contextmanager
def watched(device: torch.device):
    """Look every second from a thread of its own, while the work inside computes on the CPU."""
    if device.type != "cpu":
        yield
        return
    neighbours, ended = Neighbours(), threading.Event()

    def watch():
        while not ended.wait(EVERY):
            neighbours.look()

    watcher = threading.Thread(target=watch, name="neighbours", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        neighbours.close()


def _seconds(cores: list[int]) -> tuple[float, float, float, int] | None:
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        ours = {f"cpu{core}" for core in cores}
        ticks = [[int(field) for field in line.split()[1:8]] for line in lines if line.split()[0] in ours]
        busy = sum(sum(core[:3]) + sum(core[5:7]) for core in ticks)  # neither idle nor waiting for a disk
        machine = busy / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    return time.perf_counter(), time.process_time(), machine, len(ticks)
