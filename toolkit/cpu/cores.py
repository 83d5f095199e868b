"""Restricts the threads of this process to few cores and short time slices while other processes use the cores."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
import struct
from pathlib import Path

from toolkit.cpu import switch

SLICE = 100_000  # nanoseconds, the minimum that Linux accepts; its default is some milliseconds
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # the number of the system call, since Python has no function for it


class FewCores:
    """Between ``hold`` and ``release``, all threads of this process run on few of its cores, in short time slices.

    With threads on all cores, each step would wait for the thread on the busiest core. With slices of the default
    length, a thread that wakes up would wait some milliseconds until another process's slice ends. The share of time
    that each process gets stays the same, since shorter slices come more often.

    Processes that are started meanwhile run on the same cores. The class has no effect on systems other than Linux.
    Before Linux 6.12 the slices keep their default length."""

    def __init__(self) -> None:
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.held = False

    def hold(self, count: int) -> None:
        """Put the threads on ``count`` cores, unless ``held`` is True already. The cores are drawn at random, so that
        two runs rarely choose the same cores. If the system refuses, all cores are allowed as before."""
        if switch.FAST and not self.held:
            self.held = True
            if not _place_threads(random.SystemRandom().sample(self.cores, count), SLICE):
                self.release()

    def release(self) -> None:
        """Allow all cores again, with slices of the default length."""
        if self.held:
            _place_threads(self.cores, 0)
            self.held = False


def _place_threads(cores: list[int], nanoseconds: int) -> bool:
    """Put all threads on these cores, in slices of this length (0: the default). Returns whether this was allowed."""
    try:
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # the thread has ended meanwhile
                os.sched_setaffinity(int(task.name), cores)
                _set_slice(int(task.name), nanoseconds)
    except OSError:
        return False
    return True


def _set_slice(thread: int, nanoseconds: int) -> None:
    """Set a thread's slice with sched_setattr(2), and keep its nice value. Threads without default scheduling are not
    changed."""
    call = SCHED_SETATTR.get(platform.machine())
    if call and os.sched_getscheduler(thread) == os.SCHED_OTHER:
        nice = os.getpriority(os.PRIO_PROCESS, thread)
        fields = struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0)
        ctypes.CDLL(None).syscall(ctypes.c_long(call), ctypes.c_int(thread), fields, ctypes.c_uint(0))
