"""The switch for all code in this folder: the environment variable TOOLKIT_CPU.

"fast", the default, uses this folder's code on a CPU. "plain" turns all of it off: each part then computes its formula
with PyTorch's operations, as it does on a GPU, and threads and memory are left to PyTorch. Both give the same numbers
up to rounding. facts.json contains the choice of a run."""

import os

VARIABLE = "TOOLKIT_CPU"
CHOICES = ("fast", "plain")


def choice() -> str:
    """The value of the variable, or "fast" if it is not set. Raises ValueError for any other word."""
    chosen = os.environ.get(VARIABLE) or CHOICES[0]
    if chosen not in CHOICES:
        raise ValueError(
            f"the environment variable {VARIABLE} is {chosen!r}; write {' or '.join(CHOICES)}, or unset it"
        )
    return chosen


FAST = choice() == "fast"
