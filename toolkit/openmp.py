"""How long threads spin where they wait for each other, bounded before torch is loaded.

torch's OpenMP on Linux (libgomp) lets a thread that waits spin for milliseconds, that of its macOS and Windows builds
(libomp, libiomp5) for 200. Where other processes use the cores, the thread that is waited for can't run meanwhile: on
Linux a step took a hundred times as long; elsewhere nothing was measured. A setting of the user's own stays. No number
of threads is changed, and no sum."""

from __future__ import annotations

import os
import sys

NAME, VALUE = ("GOMP_SPINCOUNT", "1000") if sys.platform == "linux" else ("KMP_BLOCKTIME", "1")  # loops; milliseconds
OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
_torch_was_loaded = "torch" in sys.modules
_given = {name: os.environ[name] for name in OWN if name in os.environ}


def bound_spin() -> None:
    """Bound the spin, unless the user says how threads wait. Processes that this one starts inherit it."""
    if not _given:
        os.environ[NAME] = VALUE


def use_threads(count: int | None) -> None:
    """Compute with so many threads from here on; None leaves torch's own choice."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


def in_force() -> str:
    """How threads wait, in words, for the facts of a run."""
    if _given:
        return ", ".join(f"{name}={value}" for name, value in _given.items())
    if _torch_was_loaded:
        return f"{NAME}={VALUE} without effect: torch was loaded before toolkit"
    return f"{NAME}={VALUE}"
