"""What a run writes while it trains: metrics.jsonl, samples.md, and whatever its loggers write.

metrics.jsonl is the record of the run: the training loop writes it, and what could not be written is reported. A
checkpoint holds a digest of the rows before it, and status.json one of all rows at the end, so that damage to them is
noticed. Loggers show the run elsewhere. Each runs in a thread of its own: its errors can't end the run, and the
training loop waits for it only at the end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypedDict

from toolkit.output.errors import clean
from toolkit.store.disk import BINARY, NO_FOLLOW, fsync, write_bytes

if TYPE_CHECKING:
    import numpy as np

QUEUE = 1000  # calls that may wait for one logger; further calls are dropped
PATIENCE = 60.0  # seconds that all loggers together have to close; W&B alone gives up after 30
log = logging.getLogger("toolkit")


class Extent(TypedDict):
    """The beginning of a file: its length in bytes, and its SHA-256 in hex."""

    size: int
    sha256: str


class Journal:
    """Rows and samples of one run, from step ``start`` on. What an earlier attempt wrote at or past ``start`` is cut
    away. ``latest`` holds the newest value of each metric, those before ``start`` included. With ``writing`` False the
    journal keeps ``latest`` and writes nothing: of several processes, one writes. Raises OSError if metrics.jsonl or
    samples.md can't be cut, or metrics.jsonl can't be opened."""

    def __init__(self, run_dir: Path, loggers: list[type], start: int, writing: bool = True):
        self.latest: dict[str, float] = {}
        self.writing = writing
        self.loggers: list[LoggerThread] = []
        for row in read(run_dir / "metrics.jsonl"):
            if row["step"] < start:
                self.latest |= {name: value for name, value in row.items() if name != "step"}
        self.metrics, self.samples = Entries(run_dir / "metrics.jsonl"), Entries(run_dir / "samples.md")
        if writing:
            self.metrics.begin(_lines_before(self.metrics.path, start))
            self.samples.begin(_sections_before(self.samples.path, start))
            self.metrics.open()
            self.loggers = [LoggerThread(cls, run_dir, start) for cls in loggers]

    def row(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line of metrics.jsonl, without a buffer, and pass it to the loggers. If the disk refuses the line,
        it is kept, with a warning, and written with a later row."""
        self.latest |= metrics
        if self.writing:
            self.metrics.add(step, json.dumps({"step": step} | metrics) + "\n")
            for logger in self.loggers:
                logger.tell("log", step, dict(metrics))

    def sample(self, step: int, text: str) -> None:
        """Write a text sampled during training to samples.md, and pass it to the loggers."""
        if self.writing:
            self.samples.add(step, f"## step {step}\n\n{text.strip()}\n\n")
            for logger in self.loggers:
                logger.tell("text", step, "sample", text)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Pass an array of numbers to those loggers that have a method ``histogram``."""
        for logger in self.loggers:
            logger.tell("histogram", step, name, values)

    def sync(self) -> None:
        """Wait until all rows and samples so far are on the disk, so that no checkpoint is newer than they are. Entries
        that the disk refuses are kept. Loggers are asked to flush too, but are not waited for."""
        if self.writing:
            self.metrics.sync()
            self.samples.sync()
            for logger in self.loggers:
                logger.tell("flush")

    def covered(self, step: int) -> dict[str, Extent]:
        """{file: extent} of the entries before a step: a run that resumes at the step begins with these."""
        return {file.path.name: file.covered(step) for file in (self.metrics, self.samples)}

    def close(self) -> None:
        """Close the files and the loggers. Loggers get the latest values, and ``PATIENCE`` seconds for the calls that
        still wait. Raises OSError if entries could not be written or may not be on the disk. While another exception
        is being handled, that one is more important: the error then becomes a warning."""
        for logger in self.loggers:
            logger.end(dict(self.latest))
        errors = [error for file in (self.metrics, self.samples) if (error := file.close())]
        self._wait_for_loggers()
        for error in errors:
            if sys.exc_info()[1] is None:
                raise error
            log.warning("%s", error)

    def _wait_for_loggers(self) -> None:
        """Wait until all loggers are closed, ``PATIENCE`` seconds at most; warns about those that are not."""
        deadline = time.monotonic() + PATIENCE
        for logger in self.loggers:
            logger.join(max(0.0, deadline - time.monotonic()))
        unfinished = [logger.title for logger in self.loggers if logger.is_alive() and not logger.failed]
        if unfinished:
            log.warning(
                "logger %s did not close within %.0f s; its last entries may be missing",
                ", ".join(unfinished),
                PATIENCE,
            )


class Entries:
    """A text file to which whole entries are appended, each of one step; steps do not decrease. Entries that the disk
    refuses wait in memory, in order, and are tried again with each later entry."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: deque[tuple[int, bytes]] = deque()  # (step, entry)
        self.file: BinaryIO | None = None
        self.size, self.torn, self.has_warned = 0, False, False  # torn: part of an entry may follow ``size`` bytes
        self._step, self._digest, self._length = -1, hashlib.sha256(), 0  # of all entries, written or waiting
        self._before = self._digest.copy(), 0  # digest and length of the entries before ``_step``

    def begin(self, kept: bytes) -> None:
        """Start from the content ``kept``: an existing file is replaced by it. Raises OSError."""
        self._digest, self._length = hashlib.sha256(kept), len(kept)
        self._before = self._digest.copy(), self._length
        if self.path.exists() or self.path.is_symlink():
            try:
                write_bytes(self.path, kept)
            except OSError as error:
                raise OSError(
                    f"can't cut {self.path} back to the step of the checkpoint: {error}; nothing was changed"
                ) from error

    def open(self) -> BinaryIO:
        """Open the file to append to it; it is created if missing. Returns it. Raises OSError."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | NO_FOLLOW | BINARY, 0o666)
        file = os.fdopen(handle, "ab", buffering=0)  # a buffer would write refused data a second time
        self.file, self.size = file, os.fstat(file.fileno()).st_size
        return file

    def covered(self, step: int) -> Extent:
        """Size and SHA-256 of the entries before ``step``, which must not be below the step of the last entry."""
        digest, size = self._before if step == self._step else (self._digest, self._length)
        return {"size": size, "sha256": digest.hexdigest()}

    def add(self, step: int, text: str) -> None:
        """Write an entry after those that wait; warns the first time that the disk refuses one."""
        data = text.encode()
        if step != self._step:
            self._step, self._before = step, (self._digest.copy(), self._length)
        self._digest.update(data)
        self._length += len(data)
        self.waiting.append((step, data))
        try:
            self._write_waiting()
        except OSError as error:
            if not self.has_warned:
                log.warning("can't write %s, trying again with each later entry: %s", self.path, error)
            self.has_warned = True

    def sync(self) -> None:
        """Write the waiting entries, and wait until the file is on the disk. Errors are ignored."""
        with contextlib.suppress(OSError):  # ``add`` has warned, and ``close`` reports what is still missing
            self._write_waiting()
            if self.file is not None:
                os.fsync(self.file.fileno())

    def close(self) -> OSError | None:
        """Write the waiting entries, wait until the file is on the disk, and close it. Returns the error, or None."""
        try:
            self._write_waiting()
            if self.file is not None:
                os.fsync(self.file.fileno())  # some file systems report an exceeded quota only at this point
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

    def _write_waiting(self) -> None:
        """Write the waiting entries in order, until one is refused. Raises OSError."""
        while self.waiting:
            file = self.file or self.open()
            try:
                self._append(file, self.waiting[0][1])
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(self.size)  # so that readers find only whole entries
                raise
            self.waiting.popleft()

    def _append(self, file: BinaryIO, data: bytes) -> None:
        """Write one entry at the end of the whole ones. Raises OSError."""
        if self.torn:  # ``_write_waiting`` may have failed to remove the part
            file.truncate(self.size)
        self.torn, written = True, 0
        while written < len(data):  # a nearly full disk writes a part first, and raises at the next write
            written += file.write(data[written:])
        self.torn, self.size = False, self.size + written


class LoggerThread(threading.Thread):
    """A logger that is built and used only in this thread; calls are executed in order. After an error, or sys.exit(),
    there is one warning, the logger is closed once more so that it releases its files, and it is not used again."""

    def __init__(self, cls: type, run_dir: Path, start_step: int):
        super().__init__(name=f"logger {cls.__name__}", daemon=True)  # daemon: must not keep the process alive
        self.run_dir, self.title = run_dir, cls.__name__
        self.failed, self.has_been_full = False, False
        self.logger: Any = None  # a part of kind logger, once it is built
        self.build: Callable[[], Any] = lambda: cls(run_dir, start_step)
        self.entries: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()  # (method, arguments)
        self.start()

    def tell(self, method: str, *arguments: object) -> None:
        """Queue a call of a method of the logger. Never waits: if ``QUEUE`` calls wait already, the call is dropped."""
        if self.failed:
            return
        if self.entries.qsize() < QUEUE:
            self.entries.put((method, arguments))
        elif not self.has_been_full:
            self.has_been_full = True
            log.warning("logger %s is too slow: %s entries are waiting, further ones are dropped", self.title, QUEUE)

    def end(self, summary: dict[str, float]) -> None:
        """Queue the logger's ``close(summary)``, after the calls that wait."""
        self.entries.put(("close", (summary,)))

    def run(self) -> None:
        """Build the logger, and execute the queued calls until ``close``."""
        method = None
        try:
            self.logger = self.build()
            while method != "close":
                method, arguments = self.entries.get()
                if method == "flush":
                    self._flush()
                elif method == "histogram":
                    if callable(histogram := getattr(self.logger, "histogram", None)):
                        histogram(*arguments)
                else:
                    getattr(self.logger, method)(*arguments)
        except BaseException as error:  # SystemExit would end the thread silently
            self.failed = True
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            log.warning("logger %s failed and is not used any more: %s%s", self.title, kind, clean(error))
            if self.logger is not None and method != "close":
                with contextlib.suppress(BaseException):
                    self.logger.close({})

    def _flush(self) -> None:
        """Call the logger's ``flush``, if it has one, and wait until the files in the run's folder are on the disk."""
        if callable(flush := getattr(self.logger, "flush", None)):
            flush()
        for path in self.run_dir.iterdir():
            if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    fsync(path)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without the lines that can't be read; see ``corrupt``."""
    return [row for _, _, row in _lines(path) if row is not None]


def corrupt(path: Path) -> list[int]:
    """The numbers, from 1, of the lines of a metrics.jsonl that can't be read. An incomplete last line, as a process
    that was killed leaves it, is not counted."""
    return [number for number, line, row in _lines(path) if row is None and line.endswith(b"\n")]


def measure(run_dir: Path) -> dict[str, Extent]:
    """{file: extent} of metrics.jsonl and samples.md as they are; a file that can't be read is left out."""
    measured: dict[str, Extent] = {}
    for name in ("metrics.jsonl", "samples.md"):
        with contextlib.suppress(OSError):
            content = (run_dir / name).read_bytes()
            measured[name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return measured


def damage(run_dir: Path, covered: dict[str, Extent], whole: bool = False) -> str | None:
    """How a run's journal differs from what was written, in words; None if it does not. ``covered`` is a result of
    ``Journal.covered`` or ``measure``. ``whole``: bytes that follow those in ``covered`` count as damage too."""
    for name, expected in covered.items():
        path, size = run_dir / name, expected["size"]
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            return f"{path} can't be read: {error.strerror}"
        if len(content) < size:
            return f"{path} has {len(content):,} bytes, but {size:,} were written"
        if hashlib.sha256(content[:size]).hexdigest() != expected["sha256"]:
            return f"{path} is not what was written, somewhere in its first {size:,} bytes"
        if whole and len(content) > size:
            return f"{path} has {len(content) - size:,} bytes more than were written"
    return None


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """(number from 1, line, row) of each line; the row is None if the line is not a complete object with a step."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            step = row.get("step") if isinstance(row, dict) else None
            is_row = isinstance(step, int) and 0 <= step < 10**9 and line.endswith(b"\n")
            yield number, line, row if is_row else None


def _lines_before(path: Path, start: int) -> bytes:
    """The lines of a metrics.jsonl before step ``start``, unchanged."""
    return b"".join(line for _, line, row in _lines(path) if row is not None and row["step"] < start)


def _sections_before(path: Path, start: int) -> bytes:
    """The sections of a samples.md before step ``start``, unchanged."""
    text = path.read_bytes() if path.exists() else b""
    complete = b"".join(text.rpartition(b"\n\n")[:2])  # an incomplete section may follow the last blank line
    sections = re.split(rb"(?m)^(?=## step \d{1,18}$)", complete)
    return b"".join(s for s in sections if s.startswith(b"## step ") and int(s.split(maxsplit=3)[2]) < start)
