"""Memory that one training step frees is the next one's."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt, from glibc's malloc.h


def keeps_freed_memory() -> bool:
    """Whether the C library can be told to: glibc alone has the switch."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def keep_freed_memory() -> bool:
    """Have the C library keep what this process frees from now on. By default it maps each large tensor anew and hands
    it back when freed, so that a CPU clears the same hundreds of megabytes at every step. Best called when all that
    lasts has its place, optimizer state included: in the gaps of a first step it would be in the way of the second,
    which would take more memory. Returns whether it does."""
    if not keeps_freed_memory():
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(MMAP_MAX, 0) and libc.mallopt(TRIM_THRESHOLD, -1))
