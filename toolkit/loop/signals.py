"""SIGTERM and SIGINT end a run: the current work is finished and saved, or dropped if it can be repeated."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

LISTENED = (signal.SIGTERM, signal.SIGINT)
ALARM = getattr(signal, "SIGALRM", None)  # Windows has no such signal
AGAIN = 1.0  # seconds between two attempts to interrupt a droppable block
ECHO = 0.5  # seconds in which more signals count as one: a launcher and the scheduler may both send a signal
Handler = Callable[[int, FrameType | None], object] | int | None  # what signal.signal takes and returns


class Interrupted(BaseException):
    """A signal came during work that can be repeated. This is not an Exception, so that an interrupted compiler or
    tokenizer does not handle it like an error of its own."""


class Signals:
    """Catches signals inside a ``with`` block. ``caught`` is the number of the first signal, or None.

    A second signal, at least half a second after the first, is not caught: it ends the process at once, and only what
    is on disk by then is kept. With ``second_ends_process`` False, it is handled as if this object did not exist: a
    second Ctrl-C then raises KeyboardInterrupt, and a notebook keeps its other variables."""

    def __init__(self, second_ends_process: bool = True) -> None:
        self.caught: int | None = None
        self.second_ends_process = second_ends_process
        self._droppable = False
        self._old_handlers: dict[int, Handler] = {}

    def __enter__(self) -> Signals:
        with contextlib.suppress(ValueError):  # not in the main thread: signals are not caught
            self._old_handlers = {number: signal.signal(number, self._on_signal) for number in LISTENED}
            if ALARM is not None:
                self._old_handlers[ALARM] = signal.signal(ALARM, self._on_alarm)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def droppable(self, enabled: bool = True) -> Iterator[None]:
        """Mark a block whose work can be repeated: a signal interrupts it at once. Raises Interrupted, also for a
        signal that came before the block. With ``enabled`` False, the block is not interrupted.

        Python ignores an exception that is raised during garbage collection, and a compiler ignores exceptions of code
        that it only tries. Therefore Interrupted is raised again every second until the block ends, except while the
        block handles Interrupted."""
        if enabled and self.caught is not None:
            raise Interrupted
        self._droppable = enabled
        try:
            yield
        finally:
            self._droppable = False
            if self.caught is not None:
                self._set_alarm(0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        for each in LISTENED:
            signal.signal(each, signal.SIG_IGN)
        time.sleep(ECHO)
        for each in LISTENED:  # SIG_DFL ends the process at once; a Python handler would wait
            signal.signal(each, signal.SIG_DFL if self.second_ends_process else self._old_handlers[each])
        if self._droppable:
            self._set_alarm(AGAIN)
            raise Interrupted

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._droppable and not isinstance(sys.exception(), Interrupted):
            raise Interrupted

    @staticmethod
    def _set_alarm(seconds: float) -> None:
        if ALARM is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
