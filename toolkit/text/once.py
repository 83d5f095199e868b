"""Log a warning once."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger("toolkit")


@functools.cache
def say_once(message: str) -> None:
    """Log a warning, but only the first time that a process gives it."""
    log.warning(message)
