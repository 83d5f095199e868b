"""What a run writes while it trains: metrics.jsonl and samples.md always, and the loggers, none of which can end it.

metrics.jsonl is the truth: the loop writes it, and it is complete or the run says what it lacks. A logger shows the
run to somebody; each lives in a thread of its own, and the loop waits for none of them before the end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections import deque
from pathlib import Path

from toolkit.command import clean
from toolkit.disk import write_text

QUEUE = 1000  # entries that wait for one logger, at most: what comes on top of them is dropped for it
PATIENCE = 60.0  # seconds in which all loggers have to come to an end; W&B alone gives up after 30
log = logging.getLogger("toolkit")


class Journal:
    """Rows and samples of one run, from ``start`` on: what an earlier attempt wrote at or past it is cut away.
    ``latest`` holds the newest value of each metric. A journal that is not ``writing`` keeps that and writes nothing:
    of several processes, one writes. Raises OSError where metrics.jsonl can't be cut or opened."""

    def __init__(self, run_dir: Path, loggers: list[type], start: int, writing: bool = True):
        self.latest, self.writing, self.loggers = {}, writing, []
        self.metrics, self.samples = Entries(run_dir / "metrics.jsonl"), Entries(run_dir / "samples.md")
        if writing:
            _cut(self.metrics.path, _rows(self.metrics.path, start))
            _cut(self.samples.path, _sections(self.samples.path, start))
            self.metrics.open()
            self.loggers = [LoggerThread(cls, run_dir, start) for cls in loggers]

    def row(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, out of this process when it returns; kept, with a warning, where the disk refuses
        it, and written with a later row."""
        self.latest |= metrics
        if self.writing:
            self.metrics.add(step, json.dumps({"step": step} | metrics) + "\n")
            for logger in self.loggers:
                logger.tell("log", step, dict(metrics))

    def sample(self, step: int, text: str) -> None:
        """Text sampled during training."""
        if self.writing:
            self.samples.add(step, f"## step {step}\n\n{text.strip()}\n\n")
            for logger in self.loggers:
                logger.tell("text", step, "sample", text)

    def sync(self) -> None:
        """Rows so far are on the disk when this returns, so that no checkpoint outlives the rows before it; where the
        disk refuses them, they go on waiting."""
        if self.writing:
            self.metrics.sync()

    def close(self) -> None:
        """End the files, and the loggers, which hear the latest values and have ``PATIENCE`` seconds for all that they
        still hold. Raises OSError when entries are still waiting for room on the disk; an error that is under way
        already is the weightier one, and stays."""
        for logger in self.loggers:
            logger.end(dict(self.latest))
        lost = [error for file in (self.metrics, self.samples) if (error := file.close())]
        self._wait()
        for error in lost:
            if sys.exc_info()[1] is None:
                raise error
            log.warning("%s", error)

    def _wait(self):
        deadline = time.monotonic() + PATIENCE
        for logger in self.loggers:
            logger.join(max(0.0, deadline - time.monotonic()))
        late = [logger.title for logger in self.loggers if logger.is_alive() and not logger.failed]
        if late:
            log.warning("logger %s is not done after %.0f s and is left behind", ", ".join(late), PATIENCE)


class Entries:
    """A text file that grows by whole entries, each of a step. What the disk refuses waits in memory, in order, and is
    tried again with each later entry."""

    def __init__(self, path: Path):
        self.path, self.waiting, self.file = path, deque(), None
        self.size, self.torn, self.warned = 0, False, False  # torn: half an entry may follow the whole ones

    def open(self) -> None:
        """Make the file, or go on at its end. Raises OSError."""
        self.file = open(self.path, "ab", buffering=0)  # a buffer would keep, and write again, what was refused
        self.size = os.fstat(self.file.fileno()).st_size

    def add(self, step: int, text: str) -> None:
        """Write an entry after those that wait; warns the first time that the disk refuses."""
        self.waiting.append((step, text.encode()))
        try:
            self._write()
        except OSError as error:
            if not self.warned:
                log.warning("can't write %s, it is tried again with each later entry: %s", self.path, error)
            self.warned = True

    def sync(self) -> None:
        """Try once more, and wait for the disk."""
        with contextlib.suppress(OSError):  # told when an entry was refused; ``close`` has the last word
            self._write()
            os.fsync(self.file.fileno())

    def close(self) -> OSError | None:
        """Try once more, and see that it is all on the disk. Returns what went wrong."""
        try:
            self._write()
            if self.file is not None:
                os.fsync(self.file.fileno())  # some file systems tell only now that a quota is used up
        except OSError as error:
            if not self.waiting:
                return OSError(f"{self.path} may not be whole on the disk: {error}")
            first = self.waiting[0][0]
            return OSError(
                f"{self.path} lacks its last {len(self.waiting)} entries, from step {first} on: {error}; make room, "
                f"delete the checkpoints past step {first}, and --resume writes them again"
            )
        finally:
            if self.file is not None:
                self.file.close()
                self.file = None
        return None

    def _write(self):
        while self.waiting:
            if self.file is None:
                self.open()
            try:
                self._append(self.waiting[0][1])
            except OSError:
                with contextlib.suppress(OSError):
                    self.file.truncate(self.size)  # readers find whole entries alone
                raise
            self.waiting.popleft()

    def _append(self, data):
        if self.torn:  # taking the part back may have failed as well
            self.file.truncate(self.size)
        self.torn, written = True, 0
        while written < len(data):  # a disk that is nearly full takes a part, and then says why
            written += self.file.write(data[written:])
        self.torn, self.size = False, self.size + written


class LoggerThread(threading.Thread):
    """A logger, built and used in this thread alone, which does what it is told in order. An error, or sys.exit(), at
    any point costs one warning, and the logger, which is closed once more to let go of its files."""

    def __init__(self, cls: type, run_dir: Path, start_step: int):
        super().__init__(name=f"logger {cls.__name__}", daemon=True)  # daemon: one that hangs can't keep the process
        self.title, self.failed, self.full, self.logger = cls.__name__, False, False, None
        self.build, self.entries = lambda: cls(run_dir, start_step), queue.SimpleQueue()
        self.start()

    def tell(self, method: str, *arguments: object) -> None:
        """Call a method of the logger some time soon. Never waits: with ``QUEUE`` calls before it, it is dropped."""
        if self.failed:
            return
        if self.entries.qsize() < QUEUE:
            self.entries.put((method, arguments))
        elif not self.full:
            self.full = True
            log.warning("logger %s is too slow: %s entries wait for it, more are dropped", self.title, QUEUE)

    def end(self, summary: dict[str, float]) -> None:
        """Close the logger after all that waits for it."""
        self.entries.put(("close", (summary,)))

    def run(self) -> None:
        method = None
        try:
            self.logger = self.build()
            while method != "close":
                method, arguments = self.entries.get()
                getattr(self.logger, method)(*arguments)
        except BaseException as error:  # sys.exit() would end a thread without a word
            self.failed = True
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            log.warning("logger %s is left out from here on: %s%s", self.title, kind, clean(error))
            if self.logger is not None and method != "close":
                with contextlib.suppress(BaseException):
                    self.logger.close({})


def read(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line that was cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _rows(path, start):
    """The text of a metrics.jsonl before a step."""
    return "".join(json.dumps(row) + "\n" for row in read(path) if row["step"] < start)


def _sections(path, start):
    """The text of a samples.md before a step."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = "".join(text.rpartition("\n\n")[:2])  # what follows the last blank line is half a heading
    sections = re.split(r"(?m)^(?=## step \d+$)", whole)
    return "".join(s for s in sections if s.startswith("## step ") and int(s.split(maxsplit=3)[2]) < start)


def _cut(path, kept):
    """Leave this text alone in a file."""
    if not path.exists():
        return
    try:
        write_text(path, kept)
    except OSError as error:
        raise OSError(f"can't cut {path} back to where the run goes on: {error}; nothing was changed") from error
