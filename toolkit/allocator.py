"""Memory that one training step frees is the next one's."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt, from glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have the C library keep what this process frees, for good. By default it maps each large tensor anew and hands it
    back when freed, so that a CPU clears the same hundreds of megabytes at every step. Returns whether it does: glibc
    alone has the switch."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(MMAP_MAX, 0) and libc.mallopt(TRIM_THRESHOLD, -1))
