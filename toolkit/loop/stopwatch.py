"""Measures the time of a step, without evaluation, sampling and saving."""

import time


class Stopwatch:
    """Measures time from the start of ``step``. The time between ``pause`` and ``resume`` does not count."""

    def __init__(self, step: int) -> None:
        self._step, self._start = step, time.perf_counter()
        self._pause_start = self._start

    def pause(self) -> None:
        """Stop the clock."""
        self._pause_start = time.perf_counter()

    def resume(self) -> None:
        """Start the clock again."""
        self._start += time.perf_counter() - self._pause_start

    def seconds_per_step(self, next_step: int) -> float:
        """Return the mean time of the steps before ``next_step``, since the last call. Then start a new measurement."""
        now = time.perf_counter()
        seconds = (now - self._start) / (next_step - self._step)
        self._step, self._start = next_step, now
        return seconds
