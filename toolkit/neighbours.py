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
ROUNDING = 0.25  # of a core that others may use before it counts as theirs
log = logging.getLogger("toolkit")


class Neighbours:
    """Compares this process's time with that of all processes on the cores that it may use. Knows nothing where the
    system does not tell it: only Linux does. ``read`` gives (seconds by the clock, of this process, of all processes,
    cores)."""

    def __init__(self, read=None):
        self._read = read or _seconds
        self._before, self._told = self._read(), False

    def look(self) -> None:
        """Warn, once, where others leave fewer cores than there are threads: each step waits for the slowest thread."""
        now, threads = self._read(), torch.get_num_threads()
        if self._told or threads == 1 or None in (self._before, now):
            return
        clock, own, machine = (b - a for a, b in zip(self._before[:3], now[:3], strict=True))
        if clock < LEAST:
            return
        self._before, cores = now, now[3]
        others = (machine - own) / clock
        fewer = max(1, int(cores - others + ROUNDING))
        if fewer < threads and others >= OTHERS and machine >= FULL * cores * clock:
            self._told = True
            log.warning(
                "other processes use %.1f of %d cores; -p 'Experiment.threads = %d' is likely faster (another number "
                "of threads rounds sums differently)",
                others,
                cores,
                fewer,
            )


def _seconds() -> tuple[float, float, float, int] | None:
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        ticks = [[int(field) for field in line.split()[1:8]] for line in lines if line.split()[0] in ours]
        busy = sum(sum(core[:3]) + sum(core[5:7]) for core in ticks)  # neither idle nor waiting for a disk
        machine = busy / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    return time.perf_counter(), time.process_time(), machine, len(ticks)
