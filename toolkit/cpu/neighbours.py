"""Detects other processes on the cores of this process, warns once, and adapts without changing any computed number."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from toolkit.cpu.cores import FewCores
from toolkit.cpu.openmp import ShortSpin

EVERY = 1.0  # seconds between two measurements
LEAST = 3  # the warning is logged when this many measurements in a row have found the machine full
FULL = 0.9  # the machine counts as full if at least this fraction of all cores is in use
OTHERS = 0.5  # other processes count only if they use at least this many cores
ROUNDING = 0.25  # a core still counts as free while others use up to this fraction of it
Reading = tuple[float, float, float, int]  # see Neighbours
log = logging.getLogger("toolkit")


class Neighbours:
    """Compares the CPU time of this process with that of all processes on the cores that it may use.

    ``read`` returns (wall-clock seconds, CPU seconds of this process, CPU seconds of all processes, number of cores).
    On systems other than Linux it returns None, and nothing is done. ``alone`` is False for one of several processes
    that train together. Threads are not moved then, because two of these processes could choose the same cores. Nothing
    is logged, because each of these processes would count the others as other processes."""

    def __init__(
        self,
        read: Callable[[], Reading | None] | None = None,
        spin: ShortSpin | None = None,
        few: FewCores | None = None,
        alone: bool = True,
    ):
        self._alone = alone
        self._spin, self._few_cores = spin or ShortSpin(), few or FewCores()
        self._read = read or functools.partial(_seconds, self._few_cores.cores)
        self._before, self._has_warned = self._read(), False
        # Measurements in a row that found the machine full, and the number of them after which threads are moved.
        self._full_in_a_row, self._needed_in_a_row = 0, 1

    def look(self) -> None:
        """Measure, and adapt to the cores that other processes leave free.

        If there are fewer free cores than threads, make waiting threads sleep instead of spin, and warn once. If there
        are free cores for at most half of the threads, put the threads on these cores only, equally many on each."""
        reading, threads = self._read(), torch.get_num_threads()
        if threads == 1 or self._before is None or reading is None:
            return
        clock, own, machine = (b - a for a, b in zip(self._before[:3], reading[:3], strict=True))
        self._before, cores = reading, reading[3]
        others = (machine - own) / clock
        free_cores = max(1, int(cores - others + ROUNDING))
        if free_cores < threads and others >= OTHERS and machine >= FULL * cores * clock:
            self._full_in_a_row += 1
            self._spin.hold()
            if not self._alone:
                return
            if 2 * free_cores <= threads and self._full_in_a_row >= self._needed_in_a_row:
                self._few_cores.hold(max(count for count in range(1, free_cores + 1) if threads % count == 0))
            if self._full_in_a_row == LEAST:
                self._warn(others, cores, free_cores)
        else:
            self._full_in_a_row = 0
            self._needed_in_a_row *= 2 if self._few_cores.held else 1  # so that threads are not moved back and forth
            self.close()

    def close(self) -> None:
        """Allow all cores and the usual spinning again."""
        self._spin.release()
        self._few_cores.release()

    def _warn(self, others: float, cores: int, free_cores: int) -> None:
        """Log the warning, unless it was logged before."""
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "other processes use %.1f of %d cores; -p 'Experiment.threads = %d' may be faster (but another number "
                "of threads rounds sums differently)",
                others,
                cores,
                free_cores,
            )


@contextlib.contextmanager
def watched(device: torch.device, alone: bool = True) -> Iterator[None]:
    """Measure every second in a separate thread during the ``with`` block, if ``device`` is the CPU. ``alone``: see
    ``Neighbours``."""
    if device.type != "cpu":
        yield
        return
    neighbours, ended = Neighbours(alone=alone), threading.Event()

    def watch() -> None:
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


def _seconds(cores: list[int]) -> Reading | None:
    """Read the times for ``Neighbours`` from /proc/stat and this process's clocks. None if /proc/stat can't be read."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        own_cores = {f"cpu{core}" for core in cores}
        ticks = [[int(field) for field in line.split()[1:8]] for line in lines if line.split()[0] in own_cores]
        busy = sum(sum(core[:3]) + sum(core[5:7]) for core in ticks)  # without idle time and time of waiting for a disk
        machine = busy / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    return time.perf_counter(), time.process_time(), machine, len(ticks)
