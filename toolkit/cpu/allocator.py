"""Keeps the memory that a training step frees in the process, so that the next step can use it again."""

import ctypes
import sys

from toolkit.cpu import switch

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # parameters of mallopt, from glibc's malloc.h


def keeps_freed_memory() -> bool:
    """Whether ``keep_freed_memory`` works on this system, and is switched on. Only glibc has the setting."""
    return switch.FAST and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def keep_freed_memory() -> bool:
    """Make the C library keep the memory that this process frees from now on. Returns whether it does.

    By default glibc returns the memory of a large tensor to the system when the tensor is freed, so that the system
    clears the same hundreds of megabytes again at every step. Call this after weights, optimizer state and all other
    lasting tensors are allocated. Otherwise they would be placed into the memory that the first step freed, and the
    second step would need more memory."""
    if not keeps_freed_memory():
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(MMAP_MAX, 0) and libc.mallopt(TRIM_THRESHOLD, -1))
