"""Whether other processes use the cores that a run computes on: told once, with what to do."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import torch

LEAST = 3.0  # seconds that are looked at together
FULL = 0.9  # share of all cores in use from which on the machine counts as full
OTHERS = 0.5  # cores that others use, at least
log = logging.getLogger("toolkit")


class Neighbours:
    """Compares this process's time with that of the whole machine. Knows nothing where the system does not tell it:
    only Linux does. ``read`` gives (seconds by the clock, of this process, of all processes, cores)."""

    def __init__(self, read=None):
        self._read = read or _seconds
        self._before, self._told = self._read(), False

    def look(self) -> None:
        """Warn, once, where others use so much that one thread is likely faster than several."""
        now = self._read()
        if self._told or torch.get_num_threads() == 1 or None in (self._before, now):
            return
        clock, own, machine = (b - a for a, b in zip(self._before[:3], now[:3], strict=True))
        if clock < LEAST:
            return
        self._before, cores = now, now[3]
        others = (machine - own) / clock
        if others >= OTHERS and machine >= FULL * cores * clock:
            self._told = True
            log.warning(
                "other processes use %.1f of %d cores; -p 'Experiment.threads = 1' is likely faster (another number of "
                "threads rounds sums differently)",
                others,
                cores,
            )


def _seconds() -> tuple[float, float, float, int] | None:
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        user, nice, system, _, _, irq, softirq = map(int, lines[0].split()[1:8])
    except (OSError, ValueError):
        return None
    machine = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    cores = sum(line.startswith("cpu") for line in lines) - 1
    return time.perf_counter(), time.process_time(), machine, cores
