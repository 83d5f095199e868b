"""Exit codes, and an error's name and message as they are shown to users."""

from __future__ import annotations

import re

BAD_INPUT, DIVERGED, STORAGE, PREEMPTED = 2, 3, 4, 75


def kind_of(error: BaseException) -> str:
    """The name of an error's class; "OutOfMemoryError" also for the RuntimeError of PyTorch's CPU allocator."""
    memory = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
    return "OutOfMemoryError" if memory else type(error).__name__


def clean(error: BaseException) -> str:
    """An error's message without the lines that gin appends."""
    return re.sub(r"\n\s*In call to configurable '.*", "", str(error)).strip()
