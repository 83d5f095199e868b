"""SIGTERM and SIGINT end a run in good order: what is under way is finished and saved, or dropped where it can be."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator

LISTENED = (signal.SIGTERM, signal.SIGINT)
ALARM = getattr(signal, "SIGALRM", None)  # Windows has none
AGAIN = 1.0  # seconds between two attempts to end what may be dropped
ECHO = 0.5  # seconds in which more signals are the same one: a launcher and the scheduler behind it both send theirs


class Interrupted(BaseException):
    """A signal came while nothing would be lost by stopping at once. No Exception, so that what compiles or tokenises
    does not take it for an error of its own."""


class Signals:
    """Listens inside a ``with`` block. ``caught`` is the first signal's number, None until there is one. A second
    one, half a second later or more, acts as if nobody listened: the process ends on the spot, and what was on disk is
    what is there."""

    def __init__(self):
        self.caught: int | None = None
        self._droppable, self._before = False, {}

    def __enter__(self) -> Signals:
        with contextlib.suppress(ValueError):  # not in the main thread, as in a notebook's worker
            self._before = {number: signal.signal(number, self._note) for number in LISTENED}
            if ALARM is not None:
                self._before[ALARM] = signal.signal(ALARM, self._insist)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def droppable(self, yes: bool = True) -> Iterator[None]:
        """What is done inside can be done again: a signal ends it at once. Raises Interrupted, also for a signal that
        came before. With ``yes`` False it is as any other work.

        Python swallows what is raised while it collects garbage, and so does a compiler that tries this and that. So it
        is raised again each second, until the block is left; never while a block inside cleans up."""
        if yes and self.caught is not None:
            raise Interrupted
        self._droppable = yes
        try:
            yield
        finally:
            self._droppable = False
            if self.caught is not None:
                self._ring(0)

    def _note(self, number, frame):
        self.caught = number
        self._answer(signal.SIG_IGN)
        time.sleep(ECHO)
        self._answer(signal.SIG_DFL)  # not by Python, which would wait for what the main thread is in
        if self._droppable:
            self._ring(AGAIN)
            raise Interrupted

    def _insist(self, number, frame):
        if self._droppable and not isinstance(sys.exception(), Interrupted):
            raise Interrupted

    @staticmethod
    def _ring(seconds):
        if ALARM is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds, seconds)

    @staticmethod
    def _answer(handler):
        for number in LISTENED:
            signal.signal(number, handler)
