"""Which cores the threads of this process run on, and for how long at a time, where other processes need them too."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import random
import struct
from pathlib import Path

SLICE = 100_000  # nanoseconds, the least that Linux takes; its default is some milliseconds
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # numbers of the system call, which Python has no function for


class FewCores:
    """While it is held, all threads of this process take turns on few of the cores that it may use, in short slices of
    time. Spread over all cores, each would wait for the slowest of them; in slices of the default length, a thread that
    is woken would wait for milliseconds until another process's slice ends. Shares of time stay as they are: a short
    slice comes sooner, and more often.

    Processes that are started meanwhile run there too. Without effect where the system has no such calls (they are
    Linux's), and with default slices before Linux 6.12."""

    def __init__(self):
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self.held = False

    def hold(self, count: int) -> None:
        """Choose so many cores, unless some are held: by chance, as two runs that meet should not choose the same."""
        if not self.held:
            self.held = _place(random.SystemRandom().sample(self.cores, count), SLICE)

    def release(self) -> None:
        """Allow all cores again, in slices of the default length."""
        if self.held:
            _place(self.cores, 0)
            self.held = False


def _place(cores: list[int], nanoseconds: int) -> bool:
    """Let all threads run on these cores, in slices of this length (0 is the default). False if the system refuses."""
    try:
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # a thread that has ended meanwhile
                os.sched_setaffinity(int(task.name), cores)
                _set_slice(int(task.name), nanoseconds)
    except OSError:
        return False
    return True


def _set_slice(thread: int, nanoseconds: int) -> None:
    """sched_setattr(2), but for a thread that is not scheduled in the default way; its niceness stays as it is."""
    call = SCHED_SETATTR.get(platform.machine())
    if call and os.sched_getscheduler(thread) == os.SCHED_OTHER:
        nice = os.getpriority(os.PRIO_PROCESS, thread)
        fields = struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0)
        ctypes.CDLL(None).syscall(ctypes.c_long(call), ctypes.c_int(thread), fields, ctypes.c_uint(0))
