"""The one switch for everything in this room: the environment variable TOOLKIT_CPU.

"fast", the default, uses the room's own code on a CPU. "plain" turns all of it off: each part then computes its formula
with PyTorch's operations, as it does on a GPU, and threads and memory are left to PyTorch. Both give the same numbers
up to rounding. A run's facts.json tells which it was."""

import os

VARIABLE = "TOOLKIT_CPU"
CHOICES = ("fast", "plain")


def choice() -> str:
    """What the environment chooses: "fast" or "plain". Raises ValueError for any other word."""
    chosen = os.environ.get(VARIABLE) or CHOICES[0]
    if chosen not in CHOICES:
        raise ValueError(
            f"the environment variable {VARIABLE} is {chosen!r}; write {' or '.join(CHOICES)}, or unset it"
        )
    return chosen


FAST = choice() == "fast"
