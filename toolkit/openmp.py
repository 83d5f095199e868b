"""How long threads spin where they wait for each other, bounded before torch is loaded.

torch's OpenMP on Linux (libgomp) lets a thread that waits spin for milliseconds. Where other processes use the cores,
the thread that is waited for can't run meanwhile, and a step takes a hundred times as long. A short spin costs nothing
on a quiet machine. A setting of the user's own stays. No number of threads is changed, and no sum."""

from __future__ import annotations

import os
import sys

SPINS = "1000"  # loops of a few nanoseconds; libgomp's own default is 300,000
OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_torch_was_loaded = "torch" in sys.modules
_given = {name: os.environ[name] for name in OWN if name in os.environ}


def bound_spin() -> None:
    """Set GOMP_SPINCOUNT, unless the user says how threads wait. Processes that this one starts inherit it."""
    if not _given:
        os.environ["GOMP_SPINCOUNT"] = SPINS


def in_force() -> str:
    """How threads wait, in words, for the facts of a run."""
    if _given:
        return ", ".join(f"{name}={value}" for name, value in _given.items())
    if _torch_was_loaded:
        return f"GOMP_SPINCOUNT={SPINS} without effect: torch was loaded before toolkit"
    return f"GOMP_SPINCOUNT={SPINS}"
